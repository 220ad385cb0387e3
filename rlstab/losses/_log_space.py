"""Logarithms that stay accurate where their argument is near 0, and finite where it would overflow."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

LARGE = 80.0  # exp(LARGE) still fits float32
SERIES_BELOW = 0.4
SERIES_TERMS = 13
SERIES_TERMS_FLOAT32 = 8


def log1mexp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""$\log(1 - e^{-|x|})$; $\log|e^x - 1|$ is this plus $\max(x, 0)$.

    >>> log1mexp(torch.tensor([-torch.inf, 0.0, 0.6931472]))
    tensor([ 0.0000,    -inf, -0.6931])
    """
    return torch.log(-torch.expm1(-x.abs()))


def log_mix(x: Float[Tensor, "*shape"], share: float, rest: float) -> Float[Tensor, "*shape"]:
    r"""$\log(\text{rest} + \text{share} \cdot e^x)$ where the two add up to 1. Differentiable.

    >>> log_mix(torch.tensor([0.0, 200.0]), 0.5, 0.5)
    tensor([  0.0000, 199.3069])
    """
    bounded = x.clamp(max=LARGE)
    change = share * torch.expm1(bounded)
    near = torch.where(change > -0.5, torch.log1p(change), torch.log(rest + share * torch.exp(bounded)))
    far = x + torch.log(share + rest * torch.exp(-x.clamp(min=0)))
    return torch.where(x > LARGE, far, near)


def log_excess(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""$\log\left( (e^x - 1 - x) / \max(1, e^x) \right)$.

    >>> log_excess(torch.tensor([-torch.inf, -1.0, 0.0, 1.0]))  # at -1: log(1 / e)
    tensor([    inf, -1.0000,    -inf, -1.3309])
    """
    beyond = x.clamp(1, 1e4)
    large = torch.log1p(-(1 + beyond) * torch.exp(-beyond))
    near = x.clamp(-SERIES_BELOW, SERIES_BELOW)
    series = power_series(near, [1.0] * SERIES_TERMS)
    small = torch.log(torch.where(near == x, series, torch.expm1(x) - x)) - x.relu()
    return torch.where(x > 1, large, small)


def power_series(x: Float[Tensor, "*shape"], factors: list[float]) -> Float[Tensor, "*shape"]:
    r"""$\sum_{n \ge 2} c_n x^n / n!$ for the factors $c_2, c_3, \dots$; without gradient.

    >>> power_series(torch.tensor([0.1]), [1.0, 1.0])
    tensor([0.0052])
    """
    coefficients = [factor / math.factorial(n) for n, factor in enumerate(factors, start=2)]
    return power_sum(x, coefficients if x.dtype == torch.float64 else coefficients[:SERIES_TERMS_FLOAT32]).mul_(x)


def power_sum(x: Float[Tensor, "*shape"], coefficients: list[float]) -> Float[Tensor, "*shape"]:
    r"""$\sum_{n \ge 1} c_n x^n$ for at least two coefficients $c_1, c_2, \dots$; without gradient.

    >>> power_sum(torch.tensor([2.0]), [1.0, 3.0])
    tensor([14.])
    """
    *lower, last = coefficients
    total = last * x
    for coefficient in lower[:0:-1]:
        total.add_(coefficient).mul_(x)
    return total.add_(lower[0]).mul_(x)
