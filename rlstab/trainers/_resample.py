"""Dynamic sampling: groups whose rewards are all alike give way to groups of other prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor
from torch.nn import functional

from rlstab.errors import ConfigError
from rlstab.trainers import _batches

__all__ = ["Resample", "Resampler", "has_signal", "joined_rows"]

PROMPT_KEYS = ("prompt_ids", "prompt_mask")
COUNT = "num_items_in_batch"

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Resample:
    """Sample other prompts in place of those whose completions are all rewarded alike, as DAPO, ProRL and GPG do.

    A generation is made as ever; then as many groups of new prompts are sampled as lack a signal, again and again,
    until every group has one or the attempts are used up. Groups that still have none stay, and give no gradient under
    an advantage that centres. The statistics of the log are those of everything that was sampled.

    Args:
        attempts: most further generations for one.
        spread: a group has a signal if its rewards differ by more than this.

    Raises:
        ConfigError: for a number out of range.

    Reference: DAPO, https://arxiv.org/abs/2503.14476; GPG, https://arxiv.org/abs/2504.02546

    >>> Resample(attempts=0)
    Traceback (most recent call last):
    ...
    rlstab.errors.ConfigError: Resample.attempts: expected at least 1, got 0
    """

    attempts: int = 3
    spread: float = 0.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ConfigError(f"Resample.attempts: expected at least 1, got {self.attempts}")
        if not self.spread >= 0:
            raise ConfigError(f"Resample.spread: expected a number of at least 0, got {self.spread!r}")


def has_signal(rewards: Tensor, group: int, spread: float) -> Tensor:
    """Of each group of rewards, whether they differ by more than `spread`; those that are NaN do not count.

    >>> has_signal(torch.tensor([1.0, 0.0, 1.0, 1.0, torch.nan, torch.nan]), 2, 0.0)
    tensor([ True, False, False])
    """
    known = rewards.view(-1, group)
    high = known.nan_to_num(nan=-torch.inf).amax(-1)
    low = known.nan_to_num(nan=torch.inf).amin(-1)
    return high - low > spread


def joined_rows(outputs: Sequence[Mapping[str, Any]], rows: Sequence[Sequence[int]], padding: int) -> dict[str, Any]:
    """Some rows of several generations as one: prompts padded on the left, completions on the right.

    Args:
        outputs: the host's dictionaries.
        rows: which rows to take of each.
        padding: the token that fills up.
    """
    joined: dict[str, Any] = {}
    for key, first in outputs[0].items():
        values = [output[key] for output in outputs]
        if isinstance(first, Tensor) and first.dim():
            parts = [value[list(chosen)] for value, chosen in zip(values, rows, strict=True)]
            joined[key] = torch.cat(_of_one_width(key, parts, outputs, padding))
        elif isinstance(first, list):
            joined[key] = [value[i] for value, chosen in zip(values, rows, strict=True) for i in chosen]
        else:
            joined[key] = first
    return joined


def _of_one_width(key: str, parts: list[Tensor], outputs: Sequence[Mapping[str, Any]], padding: int) -> list[Tensor]:
    if parts[0].dim() < 2:
        return parts
    left = key in PROMPT_KEYS
    widths = [output["prompt_ids" if left else "completion_ids"].size(1) for output in outputs]
    if [part.size(1) for part in parts] != widths:
        return parts  # not of tokens
    filling = padding if key.endswith("_ids") else 0
    padded = []
    for part in parts:
        gap = max(widths) - part.size(1)
        sides = (gap, 0) if left else (0, gap)
        padded.append(functional.pad(part, (0, 0) * (part.dim() - 2) + sides, value=filling))
    return padded


class Resampler:
    """Replaces the groups of a generation that have no signal.

    Args:
        trainer: whose prompts and process group these are.
        settings: how often.
    """

    def __init__(self, trainer: Any, settings: Resample) -> None:
        args = trainer.args
        self._trainer = trainer
        self._settings = settings
        self._group = args.num_generations
        rows = args.per_device_train_batch_size * args.steps_per_generation
        if rows % self._group:
            raise ConfigError(
                f"resample: each process has {rows} rows of a generation, which cut groups of {self._group} apart; "
                "make per_device_train_batch_size * steps_per_generation a multiple of num_generations"
            )
        if trainer.advantage is None and args.scale_rewards == "batch":
            raise ConfigError(
                "resample: args.scale_rewards='batch' scales by the rewards of all groups, those that are replaced "
                "included: pass advantage=BatchStd()"
            )
        if isinstance(trainer.train_dataset, IterableDataset):
            raise ConfigError("resample: draws prompts at random, expected a dataset with a length, not a stream")

    def __call__(self, generate: Callable[[Rows], dict[str, Any]], inputs: Rows) -> tuple[Rows, dict[str, Any]]:
        """A generation of the same size with as many signals as could be had, and the dataset rows behind it."""
        asked, outputs = [inputs], [generate(inputs)]
        if "pixel_values" in outputs[0]:
            raise ConfigError("resample: takes no image inputs yet: leave resample unset for this dataset")
        signals = [self._signals(outputs[0])]
        for attempt in range(self._settings.attempts):
            missing = self._most(len(signals[0]) - sum(int(signal.sum()) for signal in signals))
            if missing <= 0:
                break
            asked.append(self._other_prompts(inputs, missing, attempt))
            outputs.append(generate(asked[-1]))
            signals.append(self._signals(outputs[-1]))
        return self._chosen(asked, outputs, signals)

    def _signals(self, output: Mapping[str, Any]) -> Tensor:
        return has_signal(output["rlstab_rewards"], self._group, self._settings.spread).cpu()

    def _most(self, missing: int) -> int:
        """Over all ranks, which have to take part in every generation alike."""
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1:
            return missing
        return int(accelerator.gather(torch.tensor([missing], device=accelerator.device)).max())

    def _other_prompts(self, inputs: Rows, groups: int, attempt: int) -> Rows:
        """Prompts drawn by a generator of their own, that the step decides: a resumed run draws the same."""
        trainer = self._trainer
        place = trainer._step * trainer.accelerator.num_processes + trainer.accelerator.process_index
        seed = (trainer.args.seed * 1_000_003 + place) * 1_009 + attempt
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(trainer.train_dataset), (groups,), generator=generator).tolist()
        rows = [trainer.train_dataset[index] for index in drawn]
        return [{key: row[key] for key in inputs[0]} for row in rows for _ in range(self._group)]

    def _chosen(
        self, asked: Sequence[Rows], outputs: Sequence[dict[str, Any]], signals: Sequence[Tensor]
    ) -> tuple[Rows, dict[str, Any]]:
        """Groups with a signal, the first ones; if they are too few, also those of the first generation without."""
        groups = len(signals[0])
        wanted = [(which, place) for which, signal in enumerate(signals) for place in signal.nonzero()[:, 0].tolist()]
        wanted += [(0, place) for place in (~signals[0]).nonzero()[:, 0].tolist()]
        taken = sorted(wanted[:groups])
        logged = self._trainer._metrics["train" if self._trainer.model.training else "eval"]
        logged["resample/generations"].append(float(len(outputs) - 1))
        replaced = torch.tensor([sum(which > 0 for which, _ in taken) / groups])
        accelerator = self._trainer.accelerator
        logged["resample/replaced"].append(float(accelerator.gather(replaced.to(accelerator.device)).mean()))
        if len(outputs) == 1:
            return asked[0], outputs[0]
        rows = [
            [place * self._group + i for source, place in taken if source == which for i in range(self._group)]
            for which in range(len(outputs))
        ]
        joined = joined_rows(outputs, rows, self._trainer._tokenizer.pad_token_id)
        _, loss_mask = _batches.completion_masks(joined)
        joined[COUNT] = self._trainer.accelerator.gather(loss_mask.sum()).sum()
        return [asked[which][i] for which, chosen in enumerate(rows) for i in chosen], joined
