"""What samples the completions of a run."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, final

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlstab.rollouts import Engine, TransformersEngine

__all__ = ["EngineSource", "Transformers"]


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class EngineSource(ABC):
    """A rollout engine by its settings: it is built on the policy when the trainer has prepared it.

    Example:
        >>> from rlstab.models import tiny_causal_lm, tiny_tokenizer
        >>> class Small(EngineSource):
        ...     def __call__(self, model, tokenizer):
        ...         return TransformersEngine(model, tokenizer, slots=32)
        >>> tokenizer = tiny_tokenizer("0123456789=")
        >>> Small()(tiny_causal_lm(tokenizer), tokenizer).health().alive
        True
    """

    @abstractmethod
    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
        """The engine that samples for this policy."""


@final
@dataclass(frozen=True, kw_only=True)
class Transformers(EngineSource):
    """Continuous batching with the policy itself, or with a copy of it in another precision.

    Args:
        dtype: precision of a copy that samples; None samples with the policy itself.
        slots: completions that are sampled at a time.
        routes: return the experts that every token went to, for a mixture of experts: to replay them, or to see where
            trainer and engine disagree about them.

    Example:
        >>> Transformers(dtype="bfloat16").slots
        256
    """

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    slots: int = 256
    routes: bool = False

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
        """The engine that samples for this policy."""
        if self.dtype is None:
            return TransformersEngine(model, tokenizer, slots=self.slots, routes=self.routes)
        return TransformersEngine(
            model, tokenizer, share=False, dtype=DTYPES[self.dtype], slots=self.slots, routes=self.routes
        )
