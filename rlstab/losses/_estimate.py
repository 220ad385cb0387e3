"""Losses known by their value and their slope: one node in the graph, however long the formula."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Estimate(NamedTuple):
    """A value, such as an estimate of a divergence, and its slope in the log-probs of π; neither carries gradient.

    >>> import torch
    >>> found = Estimate(value=torch.tensor([0.5]), slope=torch.tensor([1.0]))
    >>> logp = torch.tensor([-1.0], requires_grad=True)
    >>> (found.value + found.slope * (logp - logp.detach())).sum().backward()  # as a loss: this value, this gradient
    >>> logp.grad
    tensor([1.])
    """

    value: Tensor
    slope: Tensor


def attached(estimate: Estimate, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The value, with the slope for its derivative in `x`, which must be finite.

    >>> import torch
    >>> x = torch.tensor([3.0], requires_grad=True)
    >>> loss = attached(Estimate(value=torch.tensor([9.0]), slope=torch.tensor([6.0])), x)
    >>> loss.backward(); loss.detach(), x.grad
    (tensor([9.]), tensor([6.]))
    """
    return estimate.value + estimate.slope * (x - x.detach())
