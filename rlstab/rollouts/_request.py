"""What is asked of an engine: a prompt to continue, and how to sample."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from rlstab.errors import ConfigError

__all__ = ["Request", "Sampling", "Truncation"]

Truncation = Literal["refuse", "renormalise", "ignore_tail"]
"""What to do about truncated sampling: see `Sampling`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One prompt to be continued once; `n` completions of a prompt are `n` requests.

    Args:
        prompt_ids: the prompt, at least one token.
        max_new_tokens: a limit of this request's own, below that of `Sampling`.
        seed: seed of this request's random stream. By default the stream follows from the seed of `Sampling` and the
            request's place in the call.
        images: raw images, uint8 of shape [height, width, channels], for engines that run the processor themselves.
        features: what the processor made of them, as keyword arguments of the model, for engines that run the model
            directly. The first axis is that of images or patches; `token_type_ids` and `mm_token_type_ids` are vectors
            with one number per prompt token.

    Raises:
        ConfigError: if the prompt is empty or the limit is not positive.

    Example:
        >>> Request(prompt_ids=[5, 6, 7]).prompt_ids
        (5, 6, 7)
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int | None = None
    seed: int | None = None
    images: Sequence[Tensor] = ()
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", tuple(self.prompt_ids))
        object.__setattr__(self, "images", tuple(self.images))
        if not self.prompt_ids:
            raise ConfigError("Request: prompt_ids is empty; expected at least one token")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError(f"Request: max_new_tokens {self.max_new_tokens}; expected at least 1, or None")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn: from softmax(logits / temperature), until a stop token or the limit.

    The log-probs that come back are those of this distribution: a trainer compares them with its own at the same
    temperature.

    Truncated sampling (top-p, top-k, min-p) draws from fewer tokens than the trainer's policy has. What was cut off has
    no sample to correct by, so no weight on the samples repairs it. `truncation` says what to do:

    - `refuse` (default): it is an error.
    - `renormalise`: the sampler's log-probs are renormalised over the kept tokens, and the kept tokens of each position
      come back with the rollout, for the trainer to renormalise its log-probs over the same set
      (`renormalised_logprobs`). Without bias for the truncated policy. Engines that cannot record the sets refuse.
    - `ignore_tail`: the log-probs are those of the whole distribution. The ratio stays near one, and the tail is
      missing from the gradient: tokens outside the kept sets are never pushed down.

    Args:
        max_new_tokens: longest completion, in tokens.
        temperature: divides the logits. 0 is greedy decoding, with the log-probs of temperature 1.
        top_p: keep the most probable tokens until their mass reaches this; 1 is off.
        top_k: keep that many of the most probable tokens; 0 is off.
        min_p: keep tokens of at least this share of the largest probability; 0 is off.
        truncation: what to do where one of the three is on.
        stop_ids: tokens that end a completion and belong to it; by default the engine's end-of-sequence tokens.
        forbidden_ids: tokens that are never drawn, such as placeholders of images, which a trainer could not read back.
            Meant for tokens of next to no probability: the log-probs of the others do not make up for it.
        seed: seed of the call. The same seed gives the same completions; by default one is drawn from torch's global
            generator, so that a run that restores the generator repeats its samples.

    Raises:
        ConfigError: if a value is outside its range, or if truncation is on and refused.

    Example:
        >>> Sampling(max_new_tokens=8, top_p=0.9)
        Traceback (most recent call last):
        ...
        rlstab.errors.ConfigError: Sampling: top_p 0.9 truncates the distribution that the trainer believes in...
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    truncation: Truncation = "refuse"
    stop_ids: tuple[int, ...] | None = None
    forbidden_ids: tuple[int, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "a number of at least 0"),
            "top_p": (0 < self.top_p <= 1, "a number above 0, at most 1 (off)"),
            "top_k": (self.top_k >= 0, "at least 0 (off)"),
            "min_p": (0 <= self.min_p <= 1, "a number from 0 (off) to 1"),
            "truncation": (self.truncation in ("refuse", "renormalise", "ignore_tail"), "a known way"),
        }
        for key, (holds, expected) in checks.items():
            if not holds:
                raise ConfigError(f"Sampling: {key} {vars(self)[key]!r}; expected {expected}")
        if self.truncated and self.truncation == "refuse":
            settings = ", ".join(f"{key} {vars(self)[key]}" for key in self._truncating)
            raise ConfigError(
                f"Sampling: {settings} truncates the distribution that the trainer believes in, and importance weights "
                "cannot make up for tokens that are never drawn; switch it off, or set truncation='renormalise' "
                "(trains the truncated policy) or 'ignore_tail' (the tail is missing from the gradient)"
            )

    @property
    def truncated(self) -> bool:
        """Is the distribution cut to fewer tokens?"""
        return bool(self._truncating)

    @property
    def _truncating(self) -> list[str]:
        off = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
        return [key for key, value in off.items() if vars(self)[key] != value]
