"""Divergences summed over the whole vocabulary."""

import torch
from jaxtyping import Float
from torch import Tensor

from rlstab.errors import ShapeError
from rlstab.losses._checks import check_positive

ELEMENTS_AT_ONCE = 2**24


@torch.no_grad()
def exact_kl(
    logits: Float[Tensor, "*shape V"], ref_logits: Float[Tensor, "*shape V"], *, temperature: float = 1.0
) -> Float[Tensor, "*shape"]:
    r"""$\mathrm{KL}(\pi \Vert \text{ref})$ at each position, summed over the vocabulary, as a number without gradient.

    Works through the positions in portions, so that beside the logits only a few million numbers are held. Tokens with
    $\pi = 0$ count 0; one with $\pi > 0$ and $\text{ref} = 0$ makes the divergence $+\infty$. Half precision is raised
    to float32.

    Args:
        logits: logits of the policy.
        ref_logits: logits of the reference over the same vocabulary.
        temperature: divisor of both logits.

    Returns:
        Nats per position.

    Raises:
        ShapeError: if the two have different shapes.

    >>> policy, reference = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> exact_kl(policy, reference)  # log(2) / 2 + log(2 / 3) / 2
    tensor([0.1438])
    """
    check_positive("temperature", temperature)
    if logits.shape != ref_logits.shape:
        raise ShapeError(f"ref_logits: expected the shape of logits {list(logits.shape)}, got {list(ref_logits.shape)}")
    vocabulary = logits.shape[-1]
    ours, theirs = logits.reshape(-1, vocabulary), ref_logits.reshape(-1, vocabulary)
    rows = max(1, ELEMENTS_AT_ONCE // vocabulary)
    portions = [
        _kl(_log_probs(ours[i : i + rows], temperature), _log_probs(theirs[i : i + rows], temperature))
        for i in range(0, max(1, len(ours)), rows)
    ]
    return torch.cat(portions).reshape(logits.shape[:-1])


def _log_probs(logits: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, "N V"]:
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return (logits / temperature).log_softmax(-1)


def _kl(logp: Float[Tensor, "N V"], ref_logp: Float[Tensor, "N V"]) -> Float[Tensor, "N"]:
    """The sum of `π a - π + ref`, which rounding of the normalisers changes in second order only."""
    a, p = logp - ref_logp, logp.exp()
    near = p * (torch.expm1(-a) + a)
    far = ref_logp.exp() - p + p * a
    summand = torch.where(a > -1, near, far)
    return torch.where(p > 0, summand, ref_logp.exp()).sum(-1)
