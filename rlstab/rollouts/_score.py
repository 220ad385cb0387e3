"""What a transformers model in this process says about given tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["evaluating", "sequence_logits", "sequence_logprobs"]


@torch.no_grad()
def sequence_logits(
    model: PreTrainedModel, sequence: Int[Tensor, "T"], temperature: float = 1.0
) -> Float[Tensor, "_ V"]:
    """Logits that precede each of a sequence's tokens but the first, by one forward without cache or neighbours.

    Args:
        model: a causal language model, in evaluation mode.
        sequence: token ids.
        temperature: divides the logits.

    Returns:
        A row of float32 for each token but the first, on the CPU.
    """
    logits: Tensor = model(input_ids=sequence.to(model.device)[None]).logits[0, :-1]
    return logits.float().cpu() / temperature


def sequence_logprobs(
    model: PreTrainedModel, sequence: Int[Tensor, "T"], temperature: float = 1.0
) -> Float[Tensor, "_"]:
    """Log-probs of a sequence's tokens but the first: see `sequence_logits`."""
    logprobs = sequence_logits(model, sequence, temperature).log_softmax(-1)
    return logprobs.gather(-1, sequence[1:, None]).squeeze(-1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; the mode of each module comes back after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
