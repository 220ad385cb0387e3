"""Supervised warm-up: teach a model the format of a task, and most of the skill, from demonstrations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlstab.errors import ConfigError
from rlstab.models import isolated_rng
from rlstab.recipes._evaluate import prompt_ids
from rlstab.tasks import EmbeddedTask

__all__ = ["WarmUp", "warm_up"]

OnStep = Callable[[int, int, float], None]

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """Settings of the supervised warm-up.

    Args:
        steps: optimizer steps; 0 leaves the model as it is.
        batch_size: demonstrations per step, each shown once.
        learning_rate: constant step size of AdamW.
        noise: share of demonstrations with one wrong digit, in [0, 1].
        max_grad_norm: global norm at which the gradient is clipped.

    Raises:
        ConfigError: if a value is outside its range.

    Example:
        >>> settings = WarmUp(steps=100)
        >>> settings.steps * settings.batch_size  # demonstrations in all
        6400
    """

    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 4e-3
    noise: float = 0.7
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        checks = {
            "steps": (self.steps, self.steps >= 0, "at least 0"),
            "batch_size": (self.batch_size, self.batch_size >= 1, "at least 1"),
            "learning_rate": (self.learning_rate, self.learning_rate > 0, "a positive number"),
            "noise": (self.noise, 0 <= self.noise <= 1, "a probability between 0 and 1"),
            "max_grad_norm": (self.max_grad_norm, self.max_grad_norm > 0, "a positive number"),
        }
        for key, (value, holds, expected) in checks.items():
            if not holds:
                raise ConfigError(f"WarmUp: {key} {value}; expected {expected}")


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: EmbeddedTask,
    settings: WarmUp,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> list[float]:
    """Train `model` in place on fresh demonstrations of `task`, one batch a step.

    The loss is the mean over the batch's completion tokens, the end of sequence among them, of −log π(token | prefix),
    plus the auxiliary loss that the model's configuration turns on, if any; prompt tokens carry none. Demonstrations
    come from the training split only. The result depends on the arguments alone, and the global random state is left
    as it was.

    Args:
        model: a causal language model, on any one device; its mode (training or evaluation) is restored.
        tokenizer: encodes prompts and completions; needs a padding and an end-of-sequence token.
        task: gives the demonstrations.
        settings: length and step size of the warm-up, and the noise in the demonstrations.
        seed: seed of the demonstrations and of dropout, where the model has any.
        on_step: called after each step with the step (from 1), the number of steps and the loss in nats per token.

    Returns:
        The loss of every step, in nats per token.

    Raises:
        ConfigError: if the tokenizer lacks a padding or an end-of-sequence token.

    Example:
        >>> from rlstab.models import tiny_causal_lm, tiny_tokenizer
        >>> from rlstab.tasks import SortDigits
        >>> task = SortDigits(digits=3)
        >>> tokenizer = tiny_tokenizer(task.alphabet)
        >>> losses = warm_up(tiny_causal_lm(tokenizer), tokenizer, task, WarmUp(steps=20))
        >>> len(losses), losses[-1] < losses[0]
        (20, True)
    """
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise ConfigError("warm_up: the tokenizer has no padding or no end-of-sequence token; set both")
    if settings.steps == 0:
        return []
    demonstrations = task.demonstrations(settings.steps * settings.batch_size, seed=seed, noise=settings.noise)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    losses: list[float] = []
    was_training = model.training
    model.train()
    try:
        with isolated_rng(seed, device=model.device):
            for step, start in enumerate(range(0, len(demonstrations), settings.batch_size), start=1):
                rows = demonstrations[start : start + settings.batch_size]
                batch = _encode(rows["prompt"], rows["completion"], tokenizer)
                losses.append(_step(model, optimizer, batch, max_grad_norm=settings.max_grad_norm))
                if on_step is not None:
                    on_step(step, settings.steps, losses[-1])
    finally:
        model.train(was_training)
        optimizer.zero_grad(set_to_none=True)
    return losses


def _encode(prompts: list[Any], completions: list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    ids, labels = [], []
    encoded = zip(prompt_ids(tokenizer, prompts), tokenizer(completions)["input_ids"], strict=True)
    for prompt, completion in encoded:
        answer = [*completion, tokenizer.eos_token_id]
        ids.append(torch.tensor([*prompt, *answer]))
        labels.append(torch.tensor([IGNORED] * len(prompt) + answer))
    label_batch = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor([len(sequence) for sequence in ids])
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        "attention_mask": (torch.arange(label_batch.shape[1]) < lengths[:, None]).long(),
        "labels": label_batch,
    }


def _step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], *, max_grad_norm: float
) -> float:
    loss: Tensor = model(**{key: tensor.to(model.device) for key, tensor in batch.items()}).loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return float(loss.detach())
