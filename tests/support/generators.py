"""Generators of f-divergences as the papers write them, as functions of u: what the terms are compared with."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlstab.losses import (
    AlphaDivergence,
    ChiSquared,
    ChiSquaredMixture,
    ClippedAlpha,
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    Hellinger,
    Jeffreys,
    JensenShannon,
    ReverseChiSquared,
    ReverseKL,
    SkewJSD,
    SoftenedKL,
)


def reverse_kl(u: Tensor) -> Tensor:
    return u * u.log() - u + 1


def forward_kl(u: Tensor) -> Tensor:
    return u - 1 - u.log()


def generalized_jsd(beta: float) -> Callable[[Tensor], Tensor]:
    def f(u: Tensor) -> Tensor:
        m = beta + (1 - beta) * u
        return (1 - beta) * u * (u / m).log() - beta * m.log()

    return f


def skew_jsd(alpha: float) -> Callable[[Tensor], Tensor]:
    return lambda u: generalized_jsd(alpha)(u) / (alpha * (1 - alpha))


def alpha_divergence(alpha: float) -> Callable[[Tensor], Tensor]:
    return lambda u: (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))


def clipped_alpha(alpha: float, clip: float) -> Callable[[Tensor], Tensor]:
    """The alpha-divergence up to the ratio at which the clip acts, and its tangent beyond."""
    plain = alpha_divergence(alpha)
    edge = torch.tensor(clip ** (-1 / alpha), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(plain(edge), [edge])
    at_edge = plain(edge).detach()
    edge = edge.detach()

    def f(u: Tensor) -> Tensor:
        beyond = u < edge if alpha > 0 else u > edge
        return torch.where(beyond, at_edge + (u - edge) * slope, plain(torch.where(beyond, edge, u)))

    return f


FAMILY: list[tuple[Divergence, Callable[[Tensor], Tensor]]] = [
    (ReverseKL(), reverse_kl),
    (ForwardKL(), forward_kl),
    (JensenShannon(), lambda u: (u * u.log() - (u + 1) * ((u + 1) / 2).log()) / 2),
    (GeneralizedJSD(beta=0.2), generalized_jsd(0.2)),
    (GeneralizedJSD(beta=0.9), generalized_jsd(0.9)),
    (SkewJSD(alpha=0.0), forward_kl),
    (SkewJSD(alpha=0.3), skew_jsd(0.3)),
    (SkewJSD(alpha=1.0), reverse_kl),
    (AlphaDivergence(alpha=-1.5), alpha_divergence(-1.5)),
    (AlphaDivergence(alpha=0.0), reverse_kl),
    (AlphaDivergence(alpha=0.2), alpha_divergence(0.2)),
    (AlphaDivergence(alpha=1.0), forward_kl),
    (AlphaDivergence(alpha=2.5), alpha_divergence(2.5)),
    (ClippedAlpha(), clipped_alpha(-1.0, 5.0)),
    (ClippedAlpha(alpha=0.5, clip=2.0), clipped_alpha(0.5, 2.0)),
    (ChiSquared(), lambda u: (u - 1) ** 2),
    (ReverseChiSquared(), lambda u: (1 - u) ** 2 / u),
    (Hellinger(), lambda u: (1 - u.sqrt()) ** 2),
    (Jeffreys(), lambda u: (u - 1) * u.log()),
    (ChiSquaredMixture(), lambda u: (1 - u) ** 2 / (2 * (1 + u))),
    (SoftenedKL(), lambda u: (1 + u) * ((1 + u) / 2).log() - (u - 1)),
]
NAMES = [term.name for term, _ in FAMILY]


def derivative(f: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """f'(u) by automatic differentiation."""
    u = u.detach().requires_grad_()
    (slope,) = torch.autograd.grad(f(u).sum(), [u])
    return slope
