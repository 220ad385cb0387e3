"""The family of divergences: generators `f` as functions of the log-ratio a = log π − log ref, with u = e^a."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlstab.errors import ConfigError
from rlstab.losses._checks import check_range
from rlstab.losses._divergence import FARTHEST, Divergence
from rlstab.losses._estimate import Estimate
from rlstab.losses._log_space import SERIES_BELOW, SERIES_TERMS, log1mexp, log_excess, log_mix, power_series, power_sum

LogRatio = Float[Tensor, "*shape"]
LOG_2 = math.log(2.0)


# Where a series ends the value is `above` or `under` the reference; a closed form adds what it rises from there on,
# which costs a fraction of a choice between the two.
_ABOVE, _UNDER = math.expm1(-SERIES_BELOW) + SERIES_BELOW, 1 - (1 + SERIES_BELOW) * math.exp(-SERIES_BELOW)
_MIDDLE, _HALF = (_ABOVE + _UNDER) / 2, (_ABOVE - _UNDER) / 2


def _reverse_kl(a: LogRatio) -> Estimate:
    """`ReverseKL.scaled`."""
    b, below, sign = a.abs(), (-a).clamp(0, FARTHEST), a.sign()
    decay = (-b).exp_()
    slope = a.relu().addcmul_(below, decay, value=-1)
    rise = decay.sub_(1 + _HALF).mul_(sign).add_(slope).sub_(_MIDDLE).clamp_(min=0)
    near = b.clamp_(max=SERIES_BELOW)
    series = power_series(-near, [1.0] * SERIES_TERMS)  # e^-b - 1 + b
    close = sign.mul_(series).addcmul_(torch.minimum(below, near), near.sub(series))
    return Estimate(close.add_(rise), slope)


@dataclass(frozen=True, kw_only=True)
class ReverseKL(Divergence):
    r"""$\mathrm{KL}(\pi \Vert \text{ref})$: $f = u \log u - u + 1$, $f' = a$. Mode-seeking.

    On tokens of the policy, $\nu f(u)$ is Schulman's k3 times a weight that carries the gradient (DeepSeek-V3.2's
    penalty); the plain k3 of GRPO descends the forward KL.

    Target `token` (default): the KL of next tokens at the prefixes that were sampled. Target `sequence`, by the chain
    rule, with $w = \pi/\mu$: $\sum_t w_{1:t} k_{3,t}$; in the form `reward`,
    $\sum_t \operatorname{sg}(\sum_{s \ge t} w_{1:s} a_s) \log\pi_t$; in the form `exact`, $\mathrm{KL}_t$ over the
    vocabulary in place of $k_{3,t}$, with the least variance.

    >>> import torch
    >>> logp, reference = torch.tensor([0.5]).log().requires_grad_(), torch.tensor([0.25]).log()
    >>> value = ReverseKL().surrogate(logp, reference, logp.detach())  # 1/2 (2 log 2 - 2 + 1)
    >>> value.backward(); value.detach(), logp.grad
    (tensor([0.1931]), tensor([0.6931]))
    """

    chain_rule: ClassVar[Literal["policy"]] = "policy"

    def df(self, a: LogRatio) -> LogRatio:
        """$a$."""
        return a

    def log_scaled_f(self, a: LogRatio) -> LogRatio:
        r"""Of $u (e^{-a} - 1 + a)$."""
        return log_excess(-a)

    def scaled(self, a: LogRatio) -> Estimate:
        r"""With $b = |a|$: $b - 1 + e^{-b}$ and $b$ above the reference, $1 - (1 + b) e^{-b}$ and $-b e^{-b}$ below."""
        return _reverse_kl(a)


@dataclass(frozen=True, kw_only=True)
class ForwardKL(Divergence):
    r"""KL(ref‖π) of next tokens: on one's own rollouts *not* the mass-covering forward KL of sequences (DPH-RL's).

    $f = u - 1 - \log u$, $f' = 1 - e^{-a}$. Target `token` at the prefixes that the policy visits keeps next-token
    distributions wide, but what the policy no longer visits costs nothing. The forward KL of sequences needs sequences
    of the reference: a buffer of them as row source with `samples="reference"`, for which both targets have the full
    gradient; or, by weights of large variance, `target="sequence"`: $\sum_t \nu_{1:t-1} \nu_t f(u_t)$.

    Reference: The Choice of Divergence (DPH-RL), https://arxiv.org/abs/2509.07430

    >>> import torch
    >>> ForwardKL().f(torch.tensor([0.0, 1.0]))  # e - 2
    tensor([0.0000, 0.7183])
    """

    chain_rule: ClassVar[Literal["reference"]] = "reference"

    def df(self, a: LogRatio) -> LogRatio:
        """$1 - e^{-a}$."""
        return -torch.expm1(-a)

    def log_scaled_f(self, a: LogRatio) -> LogRatio:
        r"""Of $e^a - 1 - a$."""
        return log_excess(a)

    def log_scaled_df(self, a: LogRatio) -> LogRatio:
        r"""Of $|1 - e^{-a}|$."""
        return log1mexp(a)

    def scaled(self, a: LogRatio) -> Estimate:
        r"""The value of the reverse KL at $-a$, and $\pm(1 - e^{-|a|})$."""
        return Estimate(_reverse_kl(-a).value, -a.sign() * torch.expm1(-a.abs()))


_REVERSE, _FORWARD = ReverseKL(), ForwardKL()


def _mixture_log_scaled_f(a: LogRatio, *, share: float, policy: float, reference: float) -> LogRatio:
    r"""Of $m (c_\pi k(u/m) + c_\text{ref} k(1/m))$ with $m = \beta + (1-\beta) u$ and $k(x) = x \log x - x + 1$."""
    ours, theirs = -log_mix(-a, share, 1 - share), -log_mix(a, 1 - share, share)  # log u/m, log 1/m
    both = torch.logaddexp(
        math.log(policy) + log_excess(-ours) + ours.relu(), math.log(reference) + log_excess(-theirs) + theirs.relu()
    )
    return both - torch.where(a > 0, ours, theirs)


def _jensen_shannon_series(count: int) -> list[float]:
    r"""Coefficients of $b^2, b^4, \dots$ in $\frac b2 \tanh\frac b2 - \log\cosh\frac b2$."""
    tanh = [1.0]  # of t, t^3, ...: tanh' = 1 - tanh^2
    for n in range(2, count + 1):
        tanh.append(-sum(tanh[i] * tanh[n - 2 - i] for i in range(n - 1)) / (2 * n - 1))
    return [c * (1 - 1 / (2 * n)) / 4**n for n, c in enumerate(tanh, start=1)]


JENSEN_SHANNON_SERIES = _jensen_shannon_series(9)
JENSEN_SHANNON_TERMS_FLOAT32 = 5
JENSEN_SHANNON_AT_END = SERIES_BELOW / 2 * math.tanh(SERIES_BELOW / 2) - math.log(math.cosh(SERIES_BELOW / 2))


@dataclass(frozen=True, kw_only=True)
class JensenShannon(Divergence):
    r"""Jensen-Shannon: the mean of KL(π‖M) and KL(ref‖M) with $M = (\pi + \text{ref})/2$.

    $f = \frac12 [u \log u - (u + 1) \log\frac{u + 1}{2}]$, $f' = \frac12 (\log 2 - \operatorname{softplus}(-a))$: at
    most $\frac12 \log 2$ above the reference, linear below. Target as `target` says.

    >>> import torch
    >>> JensenShannon().df(torch.tensor([-100.0, 0.0, 100.0]))
    tensor([-49.6534,   0.0000,   0.3466])
    """

    def df(self, a: LogRatio) -> LogRatio:
        r"""$-\frac12 \log \frac{1 + e^{-a}}{2}$."""
        return -log_mix(-a, 0.5, 0.5) / 2

    def log_scaled_f(self, a: LogRatio) -> LogRatio:
        """That of the mixture in equal shares."""
        return _mixture_log_scaled_f(a, share=0.5, policy=0.5, reference=0.5)

    def scaled(self, a: LogRatio) -> Estimate:
        r"""$\frac12 (1 + e^{-b}) k$ with $b = |a|$ and $k = \frac b2 \tanh\frac b2 - \log\cosh\frac b2$, and $f'$."""
        b = a.abs().clamp(max=FARTHEST)
        change = torch.expm1(-b)
        log_mean = (change / 2).log1p_()  # log (1 + e^-b)/2
        k = (-1 - change).mul_(b).div_(2 + change).sub_(log_mean)  # log cosh b/2 = b/2 + log_mean
        terms = None if a.dtype == torch.float64 else JENSEN_SHANNON_TERMS_FLOAT32
        close = power_sum(b.clamp(max=SERIES_BELOW).square_(), JENSEN_SHANNON_SERIES[:terms])
        k = k.sub_(JENSEN_SHANNON_AT_END).clamp_(min=0).add_(close)
        slope = (-a).clamp_(0, FARTHEST).add_(log_mean).mul_(a.clamp(max=0).exp_()).div_(-2)
        return Estimate(change.div_(2).add_(1).mul_(k), slope)


_JENSEN_SHANNON = JensenShannon()


@dataclass(frozen=True, kw_only=True)
class GeneralizedJSD(Divergence):
    r"""The generalized JSD of GKD: $\beta \mathrm{KL}(\text{ref} \Vert M) + (1-\beta) \mathrm{KL}(\pi \Vert M)$.

    $M = \beta\,\text{ref} + (1-\beta) \pi$,
    $f' = -(1-\beta) \log(\beta e^{-a} + 1 - \beta)$. Its scale vanishes as $\beta$ goes to 0 or 1 (TRL's `beta=0` and
    `beta=1` jump to the two KLs there); `SkewJSD` keeps it. Target as `target` says.

    Args:
        beta: share of the reference in the mixture.

    Raises:
        ConfigError: unless 0 < beta < 1.

    Reference: On-Policy Distillation of Language Models (GKD), https://arxiv.org/abs/2306.13649

    >>> import torch
    >>> torch.equal(GeneralizedJSD(beta=0.5).f(torch.ones(1)), JensenShannon().f(torch.ones(1)))
    True
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < 1:
            raise ConfigError(
                f"GeneralizedJSD.beta: expected a number between 0 and 1, got {self.beta!r}: at the ends it is zero; "
                "SkewJSD(alpha=...), ForwardKL or ReverseKL keep their scale"
            )

    def df(self, a: LogRatio) -> LogRatio:
        r"""$-(1-\beta) \log(\beta e^{-a} + 1 - \beta)$."""
        return (self.beta - 1) * log_mix(-a, self.beta, 1 - self.beta)

    def log_scaled_f(self, a: LogRatio) -> LogRatio:
        """That of the mixture."""
        return _mixture_log_scaled_f(a, share=self.beta, policy=1 - self.beta, reference=self.beta)

    def scaled(self, a: LogRatio) -> Estimate | None:
        """That of `JensenShannon`, at equal shares."""
        return _JENSEN_SHANNON.scaled(a) if self.beta == 0.5 else None


@dataclass(frozen=True, kw_only=True)
class SkewJSD(Divergence):
    r"""The $\alpha$-skew JSD of score-of-mixture training: the generalized JSD over $\alpha (1 - \alpha)$.

    $\frac1\alpha \mathrm{KL}(\pi \Vert M) + \frac{1}{1-\alpha} \mathrm{KL}(\text{ref} \Vert M)$,
    $M = \alpha\,\text{ref} + (1-\alpha) \pi$, $f' = -\frac1\alpha \log(\alpha e^{-a} + 1 - \alpha)$. Goes from the
    forward KL at $\alpha = 0$ over 4 JS at ½ to the reverse KL at $\alpha = 1$. Target as `target` says.

    Args:
        alpha: share of the reference in the mixture, from 0 to 1.

    Raises:
        ConfigError: unless 0 <= alpha <= 1.

    Reference: Score-of-Mixture Training, https://arxiv.org/abs/2502.09609

    >>> import torch
    >>> torch.allclose(SkewJSD(alpha=0.5).f(torch.ones(1)), 4 * JensenShannon().f(torch.ones(1)))
    True
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("SkewJSD.alpha", self.alpha, 0, 1)

    @property
    def _limit(self) -> Divergence | None:
        return {0.0: _FORWARD, 1.0: _REVERSE}.get(self.alpha)

    def df(self, a: LogRatio) -> LogRatio:
        r"""$-\frac1\alpha \log(\alpha e^{-a} + 1 - \alpha)$."""
        if self._limit:
            return self._limit.df(a)
        return -log_mix(-a, self.alpha, 1 - self.alpha) / self.alpha

    def log_scaled_f(self, a: LogRatio) -> LogRatio:
        """That of the mixture."""
        if self._limit:
            return self._limit.log_scaled_f(a)
        return _mixture_log_scaled_f(a, share=self.alpha, policy=1 / self.alpha, reference=1 / (1 - self.alpha))

    def log_scaled_df(self, a: LogRatio) -> LogRatio:
        """That of the limit, or the general one."""
        return self._limit.log_scaled_df(a) if self._limit else super().log_scaled_df(a)

    def scaled(self, a: LogRatio) -> Estimate | None:
        """That of the limit."""
        return self._limit.scaled(a) if self._limit else None


@dataclass(frozen=True, kw_only=True)
class AlphaDivergence(Divergence):
    r"""The $\alpha$-divergence: $f = (u^{1-\alpha} - (1-\alpha) u - \alpha) / (\alpha (\alpha - 1))$.

    $f' = (1 - e^{-\alpha a}) / \alpha$. $\alpha = 0$ is the reverse KL, 1 the forward KL, ½ twice the squared Hellinger
    distance, -1 and 2 half of the two $\chi^2$. Target as `target` says.

    Args:
        alpha: $\alpha$; 0.2 is DPH-RL's.

    Raises:
        ConfigError: if `alpha` is closer than 0.01 to 0 or 1 without being it, where the value loses its digits.

    Reference: The Choice of Divergence (DPH-RL), https://arxiv.org/abs/2509.07430; AlphaNet,
    https://arxiv.org/abs/2102.07954

    >>> import torch
    >>> AlphaDivergence(alpha=2.0).df(torch.tensor([1.0]))  # (1 - exp(-2)) / 2
    tensor([0.4323])
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.alpha) or 0 < min(abs(self.alpha), abs(self.alpha - 1)) < 0.01:
            raise ConfigError(
                f"AlphaDivergence.alpha: expected 0, 1 or a number at least 0.01 away from both, got {self.alpha!r}"
            )

    @property
    def _limit(self) -> Divergence | None:
        return {0.0: _REVERSE, 1.0: _FORWARD}.get(self.alpha)

    def df(self, a: LogRatio) -> LogRatio:
        r"""$(1 - e^{-\alpha a}) / \alpha$."""
        return self._limit.df(a) if self._limit else -torch.expm1(-self.alpha * a) / self.alpha

    def log_scaled_f(self, a: LogRatio) -> LogRatio:
        r"""Near 0 a series; else of $(e^a - 1)(1 - e^{-q}) / \alpha$.

        Here $e^q = (1-\alpha) (e^a - 1) / (e^{(1-\alpha) a} - 1)$.
        """
        if self._limit:
            return self._limit.log_scaled_f(a)
        c = 1 - self.alpha
        reach = SERIES_BELOW / max(1.0, abs(c))
        factors = [sum(c**j for j in range(n)) for n in range(1, SERIES_TERMS + 1)]
        near = torch.log(power_series(a.clamp(-reach, reach), factors)) - a.relu()
        a = a.clamp(-100 * FARTHEST, 100 * FARTHEST)
        q = a.relu() - (c * a).relu() + log1mexp(a) - log1mexp(c * a) + math.log(abs(c))
        far = log1mexp(a) + (-q).relu() + log1mexp(q) - math.log(abs(self.alpha))
        return torch.where(a.abs() <= reach, near, far)

    def log_scaled_df(self, a: LogRatio) -> LogRatio:
        r"""Of $|1 - e^{-\alpha a}| / |\alpha|$."""
        if self._limit:
            return self._limit.log_scaled_df(a)
        exponent = torch.where(a < 0, a * min(1.0, 1 - self.alpha), (-self.alpha * a).relu())
        return exponent + log1mexp(self.alpha * a) - math.log(abs(self.alpha))

    def scaled(self, a: LogRatio) -> Estimate | None:
        """That of the limit."""
        return self._limit.scaled(a) if self._limit else None


@dataclass(frozen=True, kw_only=True)
class ChiSquared(Divergence):
    r"""$\chi^2(\pi \Vert \text{ref})$: $f = (u - 1)^2$, $f' = 2 (u - 1)$.

    Explodes where the policy leaves the reference upwards. Target as `target` says.

    >>> import torch
    >>> ChiSquared().f(torch.tensor([3.0]).log())
    tensor([4.0000])
    """

    def df(self, a: LogRatio) -> LogRatio:
        """$2 (e^a - 1)$."""
        return 2 * torch.expm1(a)

    def log_scaled_f(self, a: LogRatio) -> LogRatio:
        """Of $(e^a - 1)^2$."""
        return a.relu() + 2 * log1mexp(a)

    def log_scaled_df(self, a: LogRatio) -> LogRatio:
        """Of $2 |e^a - 1|$."""
        return LOG_2 + a + log1mexp(a)


@dataclass(frozen=True, kw_only=True)
class ReverseChiSquared(Divergence):
    r"""$\chi^2(\text{ref} \Vert \pi)$: $f = (1 - u)^2 / u$, $f' = 1 - e^{-2a}$.

    Explodes where the policy gives up a token. Target as `target` says.

    >>> import torch
    >>> ReverseChiSquared().f(torch.tensor([0.5]).log())
    tensor([0.5000])
    """

    def df(self, a: LogRatio) -> LogRatio:
        """$1 - e^{-2a}$."""
        return -torch.expm1(-2 * a)

    def log_scaled_f(self, a: LogRatio) -> LogRatio:
        """Of $(e^a - 1) (1 - e^{-a})$."""
        return (-a).relu() + 2 * log1mexp(a)

    def log_scaled_df(self, a: LogRatio) -> LogRatio:
        """Of $|1 - e^{-2a}|$."""
        return (-a).relu() + log1mexp(2 * a)


@dataclass(frozen=True, kw_only=True)
class Hellinger(Divergence):
    r"""The squared Hellinger distance $\sum (\sqrt\pi - \sqrt{\text{ref}})^2$.

    $f = (1 - \sqrt u)^2$, $f' = 1 - e^{-a/2}$. Symmetric and at most 2. Target as `target` says.

    >>> import torch
    >>> Hellinger().f(torch.tensor([9.0]).log())
    tensor([4.0000])
    """

    def df(self, a: LogRatio) -> LogRatio:
        """$1 - e^{-a/2}$."""
        return -torch.expm1(-a / 2)

    def log_scaled_f(self, a: LogRatio) -> LogRatio:
        """Of $(1 - e^{a/2})^2$."""
        return 2 * log1mexp(a / 2)

    def log_scaled_df(self, a: LogRatio) -> LogRatio:
        """Of $|1 - e^{-a/2}|$."""
        return (a / 2).clamp(max=0) + log1mexp(a / 2)

    def scaled(self, a: LogRatio) -> Estimate:
        r"""With $c = 1 - e^{-|a|/2}$: $c^2$, and $c$ above the reference, $-c e^{-|a|/2}$ below."""
        c = -torch.expm1(-a.abs() / 2)
        return Estimate(c.square(), a.sign() * c * torch.exp(a.clamp(max=0) / 2))


@dataclass(frozen=True, kw_only=True)
class Jeffreys(Divergence):
    r"""$\mathrm{KL}(\pi \Vert \text{ref}) + \mathrm{KL}(\text{ref} \Vert \pi)$: $f = (u - 1) a$, $f' = a + 1 - e^{-a}$.

    Target as `target` says.

    >>> import torch
    >>> a = torch.ones(1)
    >>> torch.allclose(Jeffreys().f(a), ReverseKL().f(a) + ForwardKL().f(a))
    True
    """

    def df(self, a: LogRatio) -> LogRatio:
        """$a + 1 - e^{-a}$."""
        return a - torch.expm1(-a)

    def log_scaled_f(self, a: LogRatio) -> LogRatio:
        """Of $(e^a - 1) a$."""
        return log1mexp(a) + a.abs().log()

    def log_scaled_df(self, a: LogRatio) -> LogRatio:
        """The sum of those of the two KLs."""
        return torch.logaddexp(_REVERSE.log_scaled_df(a), _FORWARD.log_scaled_df(a))

    def scaled(self, a: LogRatio) -> Estimate:
        r"""$|a| (1 - e^{-|a|})$, and the sum of the slopes of the two KLs."""
        b = a.abs()
        change = -torch.expm1(-b)
        return Estimate(b * change, a.relu() - (-a).clamp(0, FARTHEST) * torch.exp(-b) + a.sign() * change)


@dataclass(frozen=True, kw_only=True)
class ChiSquaredMixture(Divergence):
    r"""$\chi^2(\text{ref} \Vert \frac12 (\pi + \text{ref}))$, SequenceMatch's: $f = \frac{(1 - u)^2}{2 (1 + u)}$.

    $f' = \tanh(a/2) (\frac12 + \sigma(-a))$, between -3/2 and 1/2: bounded on both sides. The divergence between
    next-token distributions or, with `target="sequence"`, between sequences; not SequenceMatch's, between occupancy
    measures.

    Reference: SequenceMatch, https://arxiv.org/abs/2306.05426

    >>> import torch
    >>> ChiSquaredMixture().df(torch.tensor([-100.0, 0.0, 100.0]))
    tensor([-1.5000,  0.0000,  0.5000])
    """

    def df(self, a: LogRatio) -> LogRatio:
        r"""$\tanh(a/2) (\frac12 + \sigma(-a))$."""
        return torch.tanh(a / 2) * (0.5 + torch.sigmoid(-a))

    def log_scaled_f(self, a: LogRatio) -> LogRatio:
        r"""Of $\frac12 (e^a - 1) \tanh(a/2)$."""
        return log1mexp(a) + torch.tanh(a / 2).abs().log() - LOG_2

    def scaled(self, a: LogRatio) -> Estimate:
        r"""With $c = 1 - e^{-|a|}$: $c^2 / (4 - 2c)$, and $f' \min(1, u)$."""
        c = -torch.expm1(-a.abs())
        return Estimate(c.square() / (4 - 2 * c), self.df(a) * torch.exp(a.clamp(max=0)))


@dataclass(frozen=True, kw_only=True)
class SoftenedKL(Divergence):
    r"""The softened reverse KL $2 \mathrm{KL}(M \Vert \text{ref})$, $M = \frac12 (\pi + \text{ref})$.

    $f = (1 + u) \log\frac{1 + u}{2} - (u - 1)$, $f' = \operatorname{softplus}(a) - \log 2$: as the reverse KL above the
    reference, no less than $-\log 2$ below. Target as `target` says.

    >>> import torch
    >>> SoftenedKL().df(torch.tensor([-100.0, 0.0, 100.0]))
    tensor([-0.6931,  0.0000, 99.3069])
    """

    def df(self, a: LogRatio) -> LogRatio:
        r"""$\log\frac{1 + e^a}{2}$."""
        return log_mix(a, 0.5, 0.5)

    def log_scaled_f(self, a: LogRatio) -> LogRatio:
        r"""Of $2 (m \log m - m + 1)$ with $m = (1 + u)/2$."""
        larger = torch.where(a > 0, log_mix(-a, 0.5, 0.5), 0.0)  # log max(1, m) - log max(1, u)
        return LOG_2 + log_excess(-log_mix(a, 0.5, 0.5)) + larger
