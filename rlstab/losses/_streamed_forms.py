r"""Divergences as sums over tiles of two distributions, in few operations and without loss of digits.

Everything is written in $a = \log\pi - \log\text{ref}$ and in quantities that are small where $\pi$ is near the
reference and bounded elsewhere: with $t = e^{-|a|} - 1$, the difference $\pi - \text{ref}$ is
$\max(\pi, \text{ref}) \cdot |t|$ with the sign of $a$. So the rounding of a summand $\text{ref} \cdot f(u)$, of
order $a^2$ itself, is of order $a$ and not 1. Other generators, and distributions that exclude tokens, use
`Divergence.estimate`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property, singledispatch

import torch
from jaxtyping import Float
from torch import Tensor

from rlstab.batch import Generator
from rlstab.errors import ConfigError
from rlstab.losses._divergence import Divergence
from rlstab.losses._divergences import (
    AlphaDivergence,
    ChiSquared,
    ChiSquaredMixture,
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
from rlstab.losses._exact import CauchySchwarz
from rlstab.losses._log_space import LARGE
from rlstab.losses._streamed_head import is_impossible

NEAR_AN_END = 0.05  # mixtures with a smaller share lose digits here
NEAR_ONE = 0.1  # likewise powers this close to 1
NEAR_ZERO = 0.1  # powers below need a difference without cancellation also in their slope

Tile = Float[Tensor, "N V"]
Rows = Float[Tensor, "N"]


class Pair:
    """A tile of log-probs of the policy and of a reference, and what the forms share; each computed at most once."""

    def __init__(self, logp: Tile, ref_logp: Tile) -> None:
        self.logp = logp
        self.ref_logp = ref_logp

    @cached_property
    def a(self) -> Tile:
        """The log-ratio."""
        return self.logp - self.ref_logp

    @cached_property
    def t(self) -> Tile:
        """$e^{-|a|} - 1$."""
        return self.a.abs().neg_().expm1_()

    @cached_property
    def s(self) -> Tile:
        r"""$(\pi - \text{ref}) / \max(\pi, \text{ref})$."""
        return torch.copysign(self.t, self.a)

    @cached_property
    def p(self) -> Tile:
        """The policy."""
        return self.logp.exp()

    @cached_property
    def q(self) -> Tile:
        """The reference."""
        return self.ref_logp.exp()

    @cached_property
    def larger(self) -> Tile:
        r"""$\max(\pi, \text{ref})$."""
        return torch.maximum(self.logp, self.ref_logp).exp_()

    @cached_property
    def gap(self) -> Tile:
        r"""$\pi - \text{ref}$."""
        return self.larger * self.s

    @cached_property
    def over_middle(self) -> Tile:
        r"""$\log(\max(\pi, \text{ref}) / m)$ with $m = (\pi + \text{ref}) / 2$."""
        return (self.t / 2).log1p_().neg_()


class Form(ABC):
    """A divergence whose value is found from sums over the vocabulary, row by row; see the subclasses."""

    @abstractmethod
    def sums(self, pair: Pair) -> Float[Tensor, "K N"]:
        """What a tile contributes to the sums."""

    def merge(self, left: Float[Tensor, "K N"], right: Float[Tensor, "K N"]) -> Float[Tensor, "K N"]:
        """The sums over both parts of the vocabulary."""
        return left + right

    @abstractmethod
    def value(self, sums: Float[Tensor, "K N"]) -> Rows:
        """The divergence."""

    @abstractmethod
    def mean_slope(self, sums: Float[Tensor, "K N"]) -> Rows:
        """The sum of the slopes over the vocabulary."""

    @abstractmethod
    def slope(self, pair: Pair, sums: Float[Tensor, "K N"]) -> Tile:
        r"""The derivative in each $\log\pi_v$, taken as free variables, but for the rounding of $\pi_v$."""


class FForm(Form):
    r"""An f-divergence: sums of $\text{ref} \cdot f(u)$ and of $\pi f'(u)$."""

    @abstractmethod
    def both(self, pair: Pair) -> tuple[Tile, Tile]:
        r"""$\text{ref} \cdot f(u)$ and $\pi f'(u)$."""

    def sums(self, pair: Pair) -> Float[Tensor, "2 N"]:
        """Of summands and slopes."""
        value, slope = self.both(pair)
        return torch.stack([value.sum(-1), slope.sum(-1)])

    def value(self, sums: Float[Tensor, "2 N"]) -> Rows:
        """The sum, which rounding must not take below 0."""
        return sums[0].clamp(min=0)

    def mean_slope(self, sums: Float[Tensor, "2 N"]) -> Rows:
        r"""$E_\pi f'(u)$."""
        return sums[1]

    def slope(self, pair: Pair, sums: Float[Tensor, "2 N"]) -> Tile:
        r"""$\pi f'(u)$."""
        return self.both(pair)[1]


@dataclass(frozen=True)
class Estimated(FForm):
    """Any f-divergence, by its own `estimate`: right everywhere, and several times slower."""

    generator: Divergence

    def both(self, pair: Pair) -> tuple[Tile, Tile]:
        """As `Divergence.estimate`."""
        logps = (x.masked_fill(is_impossible(x), -torch.inf) for x in (pair.logp, pair.ref_logp))
        value, slope = self.generator.estimate(*logps)
        return value, bounded(slope)


@dataclass(frozen=True)
class Power(FForm):
    r"""$c \cdot D_\alpha$: reverse KL ($\alpha = 0$), forward KL (1), Hellinger, $\chi^2$ and the like.

    $\pi f' = \pi (1 - e^{-\alpha a}) / \alpha$ and $\text{ref} \cdot f = (\pi f' - (\pi - \text{ref})) / (1 - \alpha)$.
    """

    alpha: float
    scale: float = 1.0

    def both(self, pair: Pair) -> tuple[Tile, Tile]:
        """Summand and slope."""
        slope = self._slope(pair)
        if self.alpha == 1:
            value = pair.gap - pair.q * pair.a
        else:
            value = (slope - pair.gap).mul_(self.scale / (1 - self.alpha))
        return value, self._scaled(slope)

    def slope(self, pair: Pair, sums: Float[Tensor, "2 N"]) -> Tile:
        r"""By a plain difference, $\pi - \pi e^{-\alpha a}$."""
        if abs(self.alpha) < NEAR_ZERO:
            return self._scaled(self._slope(pair))
        if self.alpha == 1:
            return self._scaled(pair.p - pair.q)
        moved = (pair.a * -self.alpha).add_(pair.logp).exp_()
        return self._scaled(moved.neg_().add_(pair.p).div_(self.alpha))

    def _slope(self, pair: Pair) -> Tile:
        if self.alpha == 0:
            return pair.p * pair.a
        if self.alpha == 1:
            return pair.gap
        exponent = self.alpha * pair.a
        factor = pair.s if abs(self.alpha) == 1 else torch.copysign(exponent.abs().neg_().expm1_(), pair.a)
        return exponent.neg_().relu_().add_(pair.logp).exp_().mul_(factor).div_(abs(self.alpha))

    def _scaled(self, slope: Tile) -> Tile:
        scaled = slope if self.scale == 1 else slope * self.scale
        return scaled if 0 <= self.alpha <= 1 else bounded(scaled)


@dataclass(frozen=True)
class Mixture(FForm):
    r"""$c (\beta \mathrm{KL}(\text{ref} \Vert M) + (1-\beta) \mathrm{KL}(\pi \Vert M))$.

    $M = \beta \text{ref} + (1-\beta) \pi$.
    """

    beta: float
    scale: float = 1.0

    def both(self, pair: Pair) -> tuple[Tile, Tile]:
        """Summand and slope."""
        over_mixture = self._over_mixture(pair)
        slope = self._ours(pair, over_mixture)
        theirs = (over_mixture - pair.a.relu()).mul_(pair.q).mul_(self.beta * self.scale)
        return theirs.add_(slope), slope

    def slope(self, pair: Pair, sums: Float[Tensor, "2 N"]) -> Tile:
        r"""By $\log(\pi / M) = -\log(1 + \beta (e^{-a} - 1))$, which is not looked at where $\pi < e^{-80}$."""
        over = pair.a.clamp(min=-LARGE).neg_().expm1_().mul_(self.beta).log1p_()
        return over.mul_(pair.p).mul_((self.beta - 1) * self.scale)

    def _ours(self, pair: Pair, over_mixture: Tile) -> Tile:
        less = pair.a.clamp(max=0)
        return less.add_(over_mixture).mul_(pair.p).mul_((1 - self.beta) * self.scale)

    def _over_mixture(self, pair: Pair) -> Tile:
        r"""$\log(\max(\pi, \text{ref}) / M)$."""
        if self.beta == 0.5:
            return pair.over_middle
        above = pair.s.clamp(min=0).mul_(-self.beta)
        return above.add_(pair.s.clamp(max=0), alpha=1 - self.beta).log1p_().neg_()


@dataclass(frozen=True)
class Softened(FForm):
    r"""$2 \mathrm{KL}(m \Vert \text{ref})$, $m = (\pi + \text{ref}) / 2$."""

    def both(self, pair: Pair) -> tuple[Tile, Tile]:
        """Summand and slope."""
        grown = self._grown(pair)
        return ((pair.p + pair.q) * grown).sub_(pair.gap), grown.mul_(pair.p)

    def slope(self, pair: Pair, sums: Float[Tensor, "2 N"]) -> Tile:
        """Without the summand."""
        return self._grown(pair).mul_(pair.p)

    def _grown(self, pair: Pair) -> Tile:
        r"""$\log(m / \text{ref})$."""
        return pair.a.relu().sub_(pair.over_middle)


@dataclass(frozen=True)
class Symmetric(FForm):
    """Jeffreys: the sum of the two KLs."""

    def both(self, pair: Pair) -> tuple[Tile, Tile]:
        """Summand and slope."""
        return pair.gap * pair.a, (pair.p * pair.a).add_(pair.gap)

    def slope(self, pair: Pair, sums: Float[Tensor, "2 N"]) -> Tile:
        """That of both, by a plain difference."""
        return (pair.p * pair.a).add_(pair.p).sub_(pair.q)


@dataclass(frozen=True)
class SquaredMixture(FForm):
    r"""$\chi^2(\text{ref} \Vert m)$, $m = (\pi + \text{ref}) / 2$."""

    def both(self, pair: Pair) -> tuple[Tile, Tile]:
        """Summand and slope."""
        share = pair.s / (pair.t + 2)  # (π - ref) / (π + ref)
        return (pair.gap * share).div_(2), self._slope(pair)

    def slope(self, pair: Pair, sums: Float[Tensor, "2 N"]) -> Tile:
        """Without the summand."""
        return self._slope(pair)

    def _slope(self, pair: Pair) -> Tile:
        r"""$\pi (\frac12 - 2 \rho^2)$ with $\rho = \text{ref} / (\pi + \text{ref})$."""
        return pair.a.neg().sigmoid_().square_().mul_(-2).add_(0.5).mul_(pair.p)


@dataclass(frozen=True)
class Overlap(Form):
    r"""Cauchy-Schwarz: $\log(AB/C^2)$ with $A = \sum\pi^2$, $B = \sum\text{ref}^2$, $C = \sum\pi\,\text{ref}$.

    It cancels near the reference; $\log(1 - f^2) - 2 \log(1 - e)$ does not, where
    $e = \sum(\pi - \text{ref})^2 / (A + B)$ and $f = (A - B) / (A + B)$.
    """

    def sums(self, pair: Pair) -> Float[Tensor, "5 N"]:
        r"""$A$, $B$, $\sum\pi(\pi - \text{ref})$, $\sum(\pi - \text{ref})^2$ and $\log C$."""
        squares = (pair.p.square(), pair.q.square(), pair.p * pair.gap, pair.gap.square())
        product = (pair.logp + pair.ref_logp).logsumexp(-1)  # two distributions may have nothing in common
        return torch.stack([*(x.sum(-1) for x in squares), product])

    def merge(self, left: Float[Tensor, "5 N"], right: Float[Tensor, "5 N"]) -> Float[Tensor, "5 N"]:
        """Sums, and the log-sum of the last."""
        return torch.cat([left[:4] + right[:4], torch.logaddexp(left[4:], right[4:])])

    def value(self, sums: Float[Tensor, "5 N"]) -> Rows:
        """By whichever of the two expressions keeps its digits."""
        ours, theirs, projected, apart, log_product = sums
        both = ours + theirs
        near = torch.log1p(-(((2 * projected - apart) / both) ** 2)) - 2 * torch.log1p(-apart / both)
        far = ours.log() + theirs.log() - 2 * log_product.masked_fill(is_impossible(log_product), -torch.inf)
        return torch.where(apart < both / 2, near, far).clamp(min=0)

    def mean_slope(self, sums: Float[Tensor, "5 N"]) -> Rows:
        """Zero: the divergence does not depend on the scale of the policy."""
        return torch.zeros_like(sums[0])

    def slope(self, pair: Pair, sums: Float[Tensor, "5 N"]) -> Tile:
        r"""$2 \pi_v (\pi_v / A - \text{ref}_v / C)$, written with $\pi_v - \text{ref}_v$ and $A - C$."""
        ours, _, projected, _, log_product = sums.unsqueeze(-1)
        shared = log_product.masked_fill(is_impossible(log_product), 0.0)  # nothing in common: no gradient of C
        product = (pair.logp + pair.ref_logp).sub_(shared).exp_().mul_(projected)
        return (pair.p - pair.q).mul_(pair.p).sub_(product).mul_(2 / ours)


def bounded(slope: Tile) -> Tile:
    """Slopes that can be summed over any vocabulary, and multiplied with its weights, within the dtype."""
    bound = math.sqrt(torch.finfo(slope.dtype).max)
    return slope.clamp(-bound, bound)


@singledispatch
def form_of(generator: Generator) -> Form:
    """How tiles of this divergence are summed."""
    raise ConfigError(
        f"{generator.name}: cannot be summed tile by tile: expected a Divergence (of generators df and log_scaled_f) "
        "or CauchySchwarz; exact_divergence takes any"
    )


@form_of.register
def _(generator: Divergence) -> Form:
    return Estimated(generator)


@form_of.register
def _(generator: ReverseKL) -> Form:
    return Power(0.0)


@form_of.register
def _(generator: ForwardKL) -> Form:
    return Power(1.0)


@form_of.register
def _(generator: ChiSquared) -> Form:
    return Power(-1.0, 2.0)


@form_of.register
def _(generator: ReverseChiSquared) -> Form:
    return Power(2.0, 2.0)


@form_of.register
def _(generator: Hellinger) -> Form:
    return Power(0.5, 0.5)


@form_of.register
def _(generator: AlphaDivergence) -> Form:
    accurate = generator.alpha == 1 or abs(generator.alpha - 1) >= NEAR_ONE
    return Power(generator.alpha) if accurate else Estimated(generator)


@form_of.register
def _(generator: JensenShannon) -> Form:
    return Mixture(0.5)


@form_of.register
def _(generator: GeneralizedJSD) -> Form:
    accurate = NEAR_AN_END <= generator.beta <= 1 - NEAR_AN_END
    return Mixture(generator.beta) if accurate else Estimated(generator)


@form_of.register
def _(generator: SkewJSD) -> Form:
    share = generator.alpha
    if share in (0.0, 1.0):
        return Power(1.0 - share)
    accurate = NEAR_AN_END <= share <= 1 - NEAR_AN_END
    return Mixture(share, 1 / (share * (1 - share))) if accurate else Estimated(generator)


@form_of.register
def _(generator: SoftenedKL) -> Form:
    return Softened()


@form_of.register
def _(generator: Jeffreys) -> Form:
    return Symmetric()


@form_of.register
def _(generator: ChiSquaredMixture) -> Form:
    return SquaredMixture()


@form_of.register
def _(generator: CauchySchwarz) -> Form:
    return Overlap()
