"""A divergence from a reference of which only the log-probs of some tokens are known."""

import torch
from jaxtyping import Float
from torch import Tensor

from rlstab.errors import ShapeError
from rlstab.losses._checks import check_range
from rlstab.losses._divergence import Divergence, at_least_float32


def top_k_divergence(
    generator: Divergence,
    logp: Float[Tensor, "*shape K"],
    ref_logp: Float[Tensor, "*shape K"],
    *,
    resolution: float = 1e-6,
) -> Float[Tensor, "*shape"]:
    r"""A lower bound of the exact divergence, from K tokens and one bucket for all others.

    $$\sum_{v \in K} \text{ref}_v f(u_v) + \text{ref}_T f(u_T) \le D, \qquad
    \text{ref}_T = 1 - \sum_{v \in K} \text{ref}_v, \quad u_T = \pi_T / \text{ref}_T$$

    For a reference behind a server that returns its top log-probs only. Two distributions cannot be told apart better
    after tokens are thrown into one bucket (data processing), whichever K tokens were chosen, so the bound holds for
    every generator; it rises as K grows, to the divergence itself. $\sum_K \pi \log(\pi/\text{ref})$ alone is no bound
    and may be negative.

    A bucket's probability is what the others leave of 1, so that it is as uncertain as their rounding. Probabilities
    below `resolution` count as `resolution`: that moves the smaller of the two towards the larger, or both to the same
    number, and thus lowers the bound.

    Args:
        generator: a divergence such as `ReverseKL()`; only its parameters count.
        logp: log-probs of the K tokens under the policy.
        ref_logp: log-probs of the same tokens under the reference.
        resolution: the smallest probability of the bucket that is not taken for rounding.

    Returns:
        Nats per position, with gradient in `logp` (also by way of the bucket). Half precision is raised to float32.

    Raises:
        ConfigError: unless `resolution` is between 0 and 1.
        ShapeError: if the two have different shapes.

    >>> from rlstab.losses import ReverseKL
    >>> policy, reference = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.25, 0.5]).log()
    >>> top_k_divergence(ReverseKL(), policy[:1], reference[:1])  # 1/2 log 2 + 1/2 log 2/3, of 1/4 log 2
    tensor(0.1438)
    >>> top_k_divergence(ReverseKL(), policy[:2], reference[:2])
    tensor(0.1733)
    """
    if logp.shape != ref_logp.shape:
        raise ShapeError(f"ref_logp: expected the shape of logp {list(logp.shape)}, got {list(ref_logp.shape)}")
    check_range("resolution", resolution, 0, 1)
    ours, theirs = (_with_bucket(at_least_float32(x), resolution) for x in (logp, ref_logp))
    return generator.surrogate(ours, theirs.detach(), torch.zeros_like(theirs)).sum(-1)


def _with_bucket(logp: Float[Tensor, "*shape K"], resolution: float) -> Float[Tensor, "*shape K+1"]:
    left = -torch.expm1(logp.logsumexp(-1, keepdim=True))
    return torch.cat([logp, left.clamp(min=resolution).log()], dim=-1)
