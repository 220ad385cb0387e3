"""How routes differ, and how evenly they use the experts."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

__all__ = ["expert_load", "flipped", "load_entropy"]


def flipped(one: Integer[Tensor, "*grid L K"], other: Integer[Tensor, "*grid L K"]) -> Bool[Tensor, "*grid L"]:
    """Where two routes of a token send it to different sets of experts; their order does not matter.

    Args:
        one: expert ids.
        other: expert ids of the same tokens.

    Example:
        >>> flipped(torch.tensor([[[0, 1], [2, 3]]]), torch.tensor([[[1, 0], [2, 4]]]))
        tensor([[False,  True]])
    """
    return (one.sort(-1).values != other.sort(-1).values).any(-1)


def expert_load(
    experts: Integer[Tensor, "*grid L K"], mask: Bool[Tensor, "*grid"], num_experts: int
) -> Float[Tensor, "L E"]:
    """How many tokens each expert of each layer got.

    Args:
        experts: expert ids.
        mask: tokens that count.
        num_experts: number of experts E of each layer.

    Example:
        >>> expert_load(torch.tensor([[[0, 1]], [[0, 2]]]), torch.tensor([True, True]), 4)
        tensor([[2., 1., 1., 0.]])
    """
    chosen = experts[mask].long().movedim(-2, 0).flatten(1)
    load = torch.zeros(len(chosen), num_experts, device=experts.device)
    return load.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=load.dtype))


def load_entropy(load: Float[Tensor, "L E"]) -> Float[Tensor, "L"]:
    """Entropy of the load of each layer over log E: 1 if all experts get as many tokens, 0 if one gets all.

    Args:
        load: from `expert_load`.

    Example:
        >>> load_entropy(torch.tensor([[5.0, 5.0, 5.0, 5.0], [9.0, 0.0, 0.0, 0.0]]))
        tensor([1., 0.])
    """
    share = load / load.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(share).sum(-1)
    return entropy / math.log(load.shape[-1])
