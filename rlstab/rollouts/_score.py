"""What a transformers model in this process says about given tokens."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["sequence_logprobs"]


@torch.no_grad()
def sequence_logprobs(model: Any, sequence: Int[Tensor, "T"], temperature: float = 1.0) -> Float[Tensor, "_"]:
    """Log-probs of a sequence's tokens but the first, by one forward without cache, padding or neighbours.

    Args:
        model: a causal language model, in evaluation mode.
        sequence: token ids.
        temperature: divides the logits.

    Returns:
        A vector of float32 on the CPU, one shorter than the sequence.
    """
    ids = sequence.to(model.device)
    logits: Tensor = model(input_ids=ids[None]).logits[0, :-1]
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return logprobs.gather(-1, ids[1:, None]).squeeze(-1).cpu()
