"""Evaluation on held-out prompts: pass@k, reward, entropy and length, with standard errors over prompts."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlstab.errors import ConfigError
from rlstab.losses import clustered_ratio
from rlstab.models import isolated_rng
from rlstab.tasks import Task

__all__ = ["Estimate", "Evaluation", "Example", "evaluate", "pass_at_k"]

SHOWN_EXAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over prompts with its standard error.

    Args:
        mean: the estimate.
        se: its standard error, clustered by prompt; NaN for a single prompt.

    Both are NaN if nothing could be judged.

    Example:
        >>> found = Estimate(mean=0.35, se=0.02)
        >>> f"{found.mean:.2f} ± {2 * found.se:.2f}"
        '0.35 ± 0.04'
    """

    mean: float
    se: float


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sampled completion with its reward, None where the task could not judge it.

    Example:
        >>> Example(prompt="503=", completion="035", reward=1.0).reward
        1.0
    """

    prompt: str
    completion: str
    reward: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model does on a set of prompts.

    Args:
        pass_at: k to the probability that at least one of k samples is correct (a reward of 1 or more).
        reward: mean reward per sample.
        entropy: mean entropy of the sampling distribution per sampled token, in nats.
        length: mean number of sampled tokens per completion, the end of sequence among them.
        prompts: number of prompts.
        samples: samples per prompt.
        unscored: samples that the task could not judge; they count in entropy and length only.
        examples: the first sample of each of the first prompts.
    """

    pass_at: Mapping[int, Estimate]
    reward: Estimate
    entropy: Estimate
    length: Estimate
    prompts: int
    samples: int
    unscored: int
    examples: tuple[Example, ...]


def pass_at_k(*, samples: int, correct: int, k: int) -> float:
    r"""The unbiased estimate of pass@k from `correct` among `samples` independent samples.

    $1 - \binom{n - c}{k} \big/ \binom{n}{k}$

    Args:
        samples: n, the number of samples of one prompt.
        correct: c, how many of them are correct.
        k: number of attempts, at most n.

    Returns:
        The probability that k samples drawn without replacement hold a correct one.

    Example:
        >>> pass_at_k(samples=4, correct=1, k=2)
        0.5

    Reference: Evaluating Large Language Models Trained on Code, https://arxiv.org/abs/2107.03374.
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def evaluate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    prompts: Dataset,
    *,
    samples: int = 8,
    ks: Sequence[int] = (1, 8),
    temperature: float = 1.0,
    max_new_tokens: int,
    seed: int = 0,
    batch_size: int = 512,
) -> Evaluation:
    """Sample completions and score them; the training trajectory is not touched.

    Sampling is plain (no top-k, top-p or penalties) from a random state of its own, so the global one is left as it
    was; so are the model's mode and its gradients. The entropy is exact over the vocabulary, taken while sampling, at
    the sampling temperature. Standard errors treat prompts as the independent units.

    Args:
        model: the causal language model that samples, with or without adapters; unwrapped, on any one device.
        tokenizer: encodes prompts, with its chat template where they are conversational; needs a padding token.
        task: scores the completions.
        prompts: rows of `task.prompts`, usually of the held-out split.
        samples: completions per prompt.
        ks: the k of pass@k, each at most `samples`.
        temperature: sampling temperature, positive.
        max_new_tokens: longest completion, in tokens.
        seed: seed of the sampling; together with `batch_size` it fixes the result.
        batch_size: most completions sampled at once; at least one prompt's are.

    Returns:
        The evaluation; `pass_at` leaves out prompts of which fewer than k samples could be judged.

    Raises:
        ConfigError: if an argument is outside its range, or if the tokenizer has no padding token.
        RewardError: if the task cannot score a batch.

    Example:
        >>> from rlstab.models import tiny_causal_lm, tiny_tokenizer
        >>> from rlstab.tasks import SortDigits
        >>> task = SortDigits(digits=3)
        >>> tokenizer = tiny_tokenizer(task.alphabet)
        >>> found = evaluate(
        ...     tiny_causal_lm(tokenizer), tokenizer, task, task.prompts(10, split="test"), max_new_tokens=4
        ... )
        >>> sorted(found.pass_at), found.prompts, found.samples
        ([1, 8], 10, 8)
        >>> bool(found.entropy.mean <= math.log(len(tokenizer)))
        True
    """
    _check(samples=samples, ks=ks, temperature=temperature, max_new_tokens=max_new_tokens, prompts=len(prompts))
    if tokenizer.pad_token_id is None:
        raise ConfigError("evaluate: the tokenizer has no padding token; set `tokenizer.pad_token`")
    sampling = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        num_return_sequences=samples,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    per_call = max(1, batch_size // samples)
    outcomes: list[_Outcome] = []
    was_training = model.training
    model.eval()
    try:
        with isolated_rng(seed, device=model.device):
            for start in range(0, len(prompts), per_call):
                outcomes += _outcomes(model, tokenizer, task, prompts[start : start + per_call], sampling)
    finally:
        model.train(was_training)
    return _summary(outcomes, ks=ks, samples=samples)


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """The samples of one prompt; entropy is summed over the sampled tokens."""

    prompt: str
    completions: list[str]
    rewards: list[float | None]
    tokens: int
    entropy: float

    @property
    def judged(self) -> list[float]:
        return [reward for reward in self.rewards if reward is not None]


class _EntropyRecorder(LogitsProcessor):
    """Keeps the entropy of each sampling distribution while `generate` runs, and leaves the scores alone."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probs = torch.softmax(scores.float() / self.temperature, dim=-1)
        self.steps.append(torch.special.entr(probs).sum(dim=-1))
        return scores


def _outcomes(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Mapping[str, list[Any]],
    sampling: GenerationConfig,
) -> list[_Outcome]:
    ids, entropies = _sample(model, tokenizer, rows["prompt"], sampling)
    ended = ids == tokenizer.eos_token_id
    sampled = ended.cumsum(dim=1) - ended.long() == 0
    repeated = {
        column: [value for value in values for _ in range(sampling.num_return_sequences)]
        for column, values in rows.items()
    }
    completions = tokenizer.batch_decode(ids.masked_fill(~sampled, tokenizer.pad_token_id), skip_special_tokens=True)
    rewards = task.reward(repeated.pop("prompt"), completions, **repeated)
    tokens = sampled.sum(dim=1).tolist()
    entropy = (entropies.double() * sampled).sum(dim=1).tolist()
    outcomes = []
    for index, prompt in enumerate(rows["prompt"]):
        own = slice(index * sampling.num_return_sequences, (index + 1) * sampling.num_return_sequences)
        outcomes.append(
            _Outcome(
                prompt=prompt if isinstance(prompt, str) else prompt[-1]["content"],
                completions=completions[own],
                rewards=rewards[own],
                tokens=sum(tokens[own]),
                entropy=sum(entropy[own]),
            )
        )
    return outcomes


@torch.no_grad()
def _sample(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Any],
    sampling: GenerationConfig,
) -> tuple[Tensor, Tensor]:
    """Completion ids and, for each of them, the entropy it was drawn with: both `[len(prompts) * samples, T]`."""
    encoded = encode_prompts(tokenizer, prompts)
    recorder = _EntropyRecorder(sampling.temperature)
    generate = cast(Callable[..., Tensor], model.generate)
    sequences = generate(
        input_ids=encoded["input_ids"].to(model.device),
        attention_mask=encoded["attention_mask"].to(model.device),
        generation_config=sampling,
        logits_processor=LogitsProcessorList([recorder]),
    )
    return sequences[:, encoded["input_ids"].shape[1] :], torch.stack(recorder.steps, dim=1)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: list[Any]) -> list[list[int]]:
    """Ids of plain or conversational prompts."""
    if isinstance(prompts[0], str):
        return cast(list[list[int]], tokenizer(prompts)["input_ids"])
    return cast(list[list[int]], tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=False))


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[Any]) -> Mapping[str, Tensor]:
    """Ids and attention mask of plain or conversational prompts, padded on the left."""
    if isinstance(prompts[0], str):
        return cast(Mapping[str, Tensor], tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt"))
    encoded = tokenizer.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},
    )
    return cast(Mapping[str, Tensor], encoded)


def _summary(outcomes: Sequence[_Outcome], *, ks: Sequence[int], samples: int) -> Evaluation:
    judged = [outcome.judged for outcome in outcomes]
    tokens = [outcome.tokens for outcome in outcomes]
    return Evaluation(
        pass_at={k: _pass_estimate(judged, k) for k in ks},
        reward=_ratio([math.fsum(rewards) for rewards in judged], [len(rewards) for rewards in judged]),
        entropy=_ratio([outcome.entropy for outcome in outcomes], tokens),
        length=_ratio([float(count) for count in tokens], [samples] * len(outcomes)),
        prompts=len(outcomes),
        samples=samples,
        unscored=len(outcomes) * samples - sum(map(len, judged)),
        examples=tuple(
            Example(prompt=outcome.prompt, completion=outcome.completions[0], reward=outcome.rewards[0])
            for outcome in outcomes[:SHOWN_EXAMPLES]
        ),
    )


def _pass_estimate(judged: Sequence[Sequence[float]], k: int) -> Estimate:
    values = [
        pass_at_k(samples=len(rewards), correct=sum(reward >= 1.0 for reward in rewards), k=k)
        for rewards in judged
        if len(rewards) >= k
    ]
    return _ratio(values, [1] * len(values))


def _ratio(numerators: Sequence[float], denominators: Sequence[int]) -> Estimate:
    """Σ num / Σ den over prompts, with its standard error."""
    sums, counts = (torch.tensor(numbers, dtype=torch.float64) for numbers in (numerators, denominators))
    mean, se = clustered_ratio(sums, counts, torch.arange(len(sums)))
    return Estimate(mean=mean.item(), se=se.item())


def _check(*, samples: int, ks: Sequence[int], temperature: float, max_new_tokens: int, prompts: int) -> None:
    checks = {
        "prompts": (prompts, prompts >= 1, "at least one row"),
        "samples": (samples, samples >= 1, "at least 1"),
        "ks": (tuple(ks), all(1 <= k <= samples for k in ks), f"each between 1 and samples ({samples})"),
        "temperature": (temperature, temperature > 0, "a positive number"),
        "max_new_tokens": (max_new_tokens, max_new_tokens >= 1, "at least 1"),
    }
    for key, (value, holds, expected) in checks.items():
        if not holds:
            raise ConfigError(f"evaluate: {key} {value}; expected {expected}")
