"""What all divergences from a reference policy share: forms, targets, samples and numerics."""

import dataclasses
import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from rlstab.batch import ExactDivergence, LogProbs, Requirement, TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses._checks import check_choice, check_positive
from rlstab.losses._estimate import Estimate, attached
from rlstab.losses._mean import Mean
from rlstab.losses._metrics import Metric, Sum, Total
from rlstab.losses._parts import part_name
from rlstab.losses._ratio import finite_logp
from rlstab.losses._term import Loss, Term

FARTHEST = 1e4  # a log-ratio this far from 0 is as good as infinite


@dataclass(frozen=True, kw_only=True)
class Divergence(Term):
    r"""An f-divergence from a reference policy: $D = \sum \text{ref} \cdot f(\pi/\text{ref})$. Abstract.

    Everything follows from the generator $f$, here a function of the log-ratio $a = \log\pi - \log\text{ref}$, with
    $u = e^a$: convex, $f(1) = 0$ and $f'(1) = 0$ (the choice with the smallest variance near the reference). With
    tokens drawn from $\mu$ and $\nu = \text{ref}/\mu$ detached:

    | form | loss per token | |
    |---|---|---|
    | `sampled` | $\nu f(u)$ | unbiased value and gradient, whatever $\mu$ |
    | `reward` | $\operatorname{sg}((\pi/\mu) f'(u)) \log\pi$ | the same gradient; its value means nothing |
    | `exact` | $\sum_v \text{ref}_v f(u_v)$ over the vocabulary | no sampling noise |

    Target `token`: the divergence of next-token distributions at the prefixes that $\mu$ drew. The prefixes count as
    given, so this has only a part of the gradient of the divergence between sequences. Target `sequence`: that
    divergence itself, by cumulative ratios: full gradient, more variance; one loss per row, averaged over rows.

    A subclass gives `df`, `log_scaled_f` and, if $f'$ can overflow, `log_scaled_df`; for speed also `scaled`.

    Values are exact up to rounding wherever they fit the dtype. Beyond they are `+inf`, the gradient is held at the
    largest finite number, and the token is counted. A token to which both policies give probability 0 counts 0; where
    only the policy gives 0 there is no gradient.

    Args:
        coef: coefficient, a number or a controller.
        mean: how the loss becomes a number.
        rows: which rows the term acts on.
        reference: source of the reference policy.
        samples: what drew the tokens: `policy`, `old`, `sampler` or `reference` (that of this term); if None, the
            sampler where its log-probs were recorded, else the old policy. Tokens with a NaN there are left out.
        form: see above.
        target: see above.
        clamp: largest $|a|$, or None. Beyond it the value is that at the bound and the gradient is 0.

    Metrics: `value`, the mean of the estimate (over tokens; target `sequence`: over rows); `overflow`, how many tokens
    (rows) went beyond the dtype; `unscored`, tokens left out; `clamped`, tokens that the clamp changed.

    Raises:
        ConfigError: for a value, or a combination, that has no meaning.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Quadratic(Divergence):  # f(u) = (u - 1)^2
    ...     def df(self, a: Tensor) -> Tensor:
    ...         return 2 * torch.expm1(a)
    ...
    ...     def log_scaled_f(self, a: Tensor) -> Tensor:
    ...         return 2 * torch.expm1(a).abs().log() - a.relu()
    >>> Quadratic().f(torch.tensor([3.0]).log())
    tensor([4.])
    """

    reference: str = "initial"
    samples: Literal["policy", "old", "sampler", "reference"] | None = None
    form: Literal["sampled", "reward", "exact"] = "sampled"
    target: Literal["token", "sequence"] = "token"
    clamp: float | None = None

    chain_rule: ClassVar[Literal["policy", "reference"] | None] = None
    """Whose prefixes weigh the token divergences that add up to that of sequences, if they do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.samples is not None:
            check_choice(f"{name}.samples", self.samples, ("policy", "old", "sampler", "reference"))
        check_choice(f"{name}.form", self.form, ("sampled", "reward", "exact"))
        check_choice(f"{name}.target", self.target, ("token", "sequence"))
        if self.clamp is not None:
            check_positive(f"{name}.clamp", self.clamp)
        if self.form == "exact":
            self._check_exact(name)
        if self.target == "sequence":
            self._average_over_rows(name)
        if self.form == "exact":
            object.__setattr__(self, "_exact_key", self._exact.key)  # once: a compiled loss cannot build parts

    _exact_key = ""

    def _check_exact(self, name: str) -> None:
        if self.clamp is not None:
            raise ConfigError(
                f"{name}.clamp: bounds the log-ratio of sampled tokens, got {self.clamp} with form='exact'"
            )
        if self.target == "sequence" and self.chain_rule is None:
            raise ConfigError(
                f"{name}.target: between sequences only ReverseKL and ForwardKL are sums of exact token divergences, "
                "got 'sequence' with form='exact': use form='sampled'"
            )
        if self.target == "token" and self.samples is not None:
            raise ConfigError(
                f"{name}.samples: form='exact' sums over the vocabulary, got {self.samples!r}: leave it out"
            )

    def _average_over_rows(self, name: str) -> None:
        mean = self.mean
        if mean.unit not in ("token", "sequence"):
            raise ConfigError(
                f"{name}.mean.unit: target='sequence' has one loss per row: expected 'sequence', got {mean.unit!r}"
            )
        object.__setattr__(self, "mean", Mean(unit="sequence", over=mean.over))

    # ---------------------------------------------------------------- the generator

    @abstractmethod
    def df(self, a: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """$f'(u)$, the derivative in $u$ at $u = e^a$; it has the sign of $a$."""

    @abstractmethod
    def log_scaled_f(self, a: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        r"""$\log (f(u) / \max(1, u))$, for any $a$ from $-\infty$ to $\infty$; needs no gradient."""

    def log_scaled_df(self, a: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        r"""$\log (|f'(u)| \min(1, u))$, for any $a$ from $-\infty$ to $\infty$; needs no gradient."""
        a = a.clamp(min=-FARTHEST)
        return self.df(a).abs().log() + a.clamp(max=0)

    def scaled(self, a: Float[Tensor, "*shape"]) -> Estimate | None:
        r"""$f(u) / \max(1, u)$ and $f'(u) \min(1, u)$ where they need no logarithms, for a fraction of the cost.

        For generators of which neither grows faster than $|a|$, for any $a$ from $-\infty$ to $\infty$; else None, and
        their logarithms are used. Needs no gradient.
        """
        return None

    def f(self, a: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """$f(u)$ at $u = e^a$; its derivative in $a$ is $u f'(u)$."""
        return self.surrogate(a, torch.zeros_like(a), torch.zeros_like(a))

    # ---------------------------------------------------------------- estimates

    @torch.no_grad()
    def estimate(
        self,
        logp: Float[Tensor, "*shape"],
        ref_logp: Float[Tensor, "*shape"],
        sample_logp: Float[Tensor, "*shape"] | float = 0.0,
    ) -> Estimate:
        r"""$\nu f(u)$ and $(\pi/\mu) f'(u)$, without gradient and without overflow where they fit the dtype.

        Both are $\max(\pi, \text{ref})/\mu$ times a factor: `scaled`, or else the exponents are added before `exp`.
        With `sample_logp=0`, the summands of the exact divergence and of its gradient.
        """
        scale = torch.maximum(logp, ref_logp) - sample_logp  # -inf at what both exclude, which counts 0
        a = (logp - ref_logp).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        closed, limit = self.scaled(a), torch.finfo(a.dtype).max
        if closed is None:
            value = torch.exp(scale + self.log_scaled_f(a))
            return Estimate(value, a.sign() * torch.exp(scale + self.log_scaled_df(a)).clamp(max=limit))
        farthest = math.log(limit) - 2  # keeps the root from 0 and infinity, which infinity and 0 would make NaN
        root = (scale / 2).clamp_(-farthest, farthest).exp_()  # of a scale that may be out of range by itself
        value, slope = ((factor * root).mul_(root) for factor in closed)
        return Estimate(value, slope.clamp_(-limit, limit))

    def surrogate(
        self,
        logp: Float[Tensor, "*shape"],
        ref_logp: Float[Tensor, "*shape"],
        sample_logp: Float[Tensor, "*shape"],
    ) -> Float[Tensor, "*shape"]:
        r"""$\nu f(u)$ for tokens drawn from $\mu$: unbiased value and gradient for any $\mu$ of full support.

        Args:
            logp: log-probs under the policy; the only argument with gradient.
            ref_logp: log-probs under the reference.
            sample_logp: log-probs under $\mu$.

        Returns:
            The estimate per token. Half precision is raised to float32.
        """
        logp, ref_logp, sample_logp = (at_least_float32(x) for x in (logp, ref_logp, sample_logp))
        estimate = self.estimate(logp, ref_logp, finite_logp(sample_logp))
        return _with_gradient(estimate, logp)

    def over_vocabulary(
        self, logp: Float[Tensor, "*shape V"], ref_logp: Float[Tensor, "*shape V"]
    ) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape V"]]:
        r"""The exact divergence, and $\pi_v f'(u_v)$ per entry."""
        value, slope = self.estimate(logp, ref_logp)
        return value.sum(-1), slope

    # ---------------------------------------------------------------- the term

    @property
    def generator(self) -> Self:
        """The generator alone: this divergence with the defaults of everything that is not a parameter of `f`."""
        return type(self)(**self._parameters)

    @property
    def name(self) -> str:
        """The generator and its parameters.

        >>> from rlstab.losses import SkewJSD
        >>> SkewJSD(alpha=0.2, coef=0.1).name
        'skew_jsd(alpha=0.2)'
        """
        parameters = ", ".join(f"{key}={value!r}" for key, value in self._parameters.items())
        return f"{part_name(self)}({parameters})"

    @property
    def _parameters(self) -> dict[str, Any]:
        shared = {field.name for field in dataclasses.fields(Divergence)}
        return {f.name: self.__dict__[f.name] for f in dataclasses.fields(self) if f.name not in shared}

    @property
    def _exact(self) -> ExactDivergence:
        return ExactDivergence(self.generator, self.reference)

    @property
    def requires(self) -> frozenset[Requirement]:
        """The exact divergence, or else policy, reference and what sampled."""
        if self.form == "exact" and self.target == "token":
            return super().requires | {self._exact}
        needs: set[Requirement] = {LogProbs("policy"), LogProbs(self._behaviour or "old")}
        if self.form == "exact":
            needs.add(self._exact)
        if self.form != "exact" or self.chain_rule == "reference":
            needs.add(LogProbs(self.reference))
        return super().requires | needs

    @property
    def _behaviour(self) -> str | None:
        return self.reference if self.samples == "reference" else self.samples

    def loss(self, batch: TokenBatch) -> Loss:
        """The loss per token, or per row for the target `sequence`."""
        if self.form == "exact":
            return self._exact_loss(batch)
        tokens = self._tokens(batch, batch.logp(self.reference))
        if self.target == "token":
            estimate = self.estimate(*tokens.logps)
            metrics = _token_metrics(estimate, tokens.number, batch)
        else:
            estimate = self._sequence_estimate(tokens)
            metrics = _metrics(estimate, batch.loss_mask.any(-1))
        return Loss(self._attach(estimate, tokens.logp), {**metrics, **tokens.counts})

    def _attach(self, estimate: Estimate, logp: Float[Tensor, "B T"]) -> Float[Tensor, "B *T"]:
        """The loss with this estimate's gradient; the rows of a sequence target are summed."""
        if self.form == "reward":
            loss = estimate.slope * _finite(logp)
            return loss.sum(-1) if self.target == "sequence" else loss
        if self.target == "token":
            return _with_gradient(estimate, logp)
        return estimate.value + _zero_with_gradient(estimate, logp).sum(-1)

    def _tokens(self, batch: TokenBatch, ref_logp: Float[Tensor, "B T"]) -> "_Tokens":
        logp, behaviour = batch.logp("policy"), batch.behaviour(self._behaviour)
        ref_logp = ref_logp.detach()
        sample_logp = batch.held(behaviour)  # a ratio to μ weighs, it is not descended
        count, unscored = batch.tokens, batch.nothing
        if not batch.scores_all(behaviour):
            scored = ~sample_logp.isnan()
            logp, ref_logp, sample_logp = (torch.where(scored, x, 0.0) for x in (logp, ref_logp, sample_logp))
            sample_logp = finite_logp(sample_logp)
            unscored = (~scored & batch.loss_mask).count_nonzero()
            count = count - unscored
        counts: dict[str, Metric] = {"unscored": Total(unscored)}
        if self.clamp is not None:
            a = (logp - ref_logp).detach()  # the bound is a constant
            far = a.abs() > self.clamp
            logp = torch.where(far, ref_logp + self.clamp * a.sign(), logp)
            counts["clamped"] = Total((batch.loss_mask & far).count_nonzero())
        return _Tokens(logp, ref_logp, sample_logp, count, counts)

    # ---------------------------------------------------------------- sequences

    @torch.no_grad()
    def _sequence_estimate(self, tokens: "_Tokens") -> Estimate:
        """One value per row, one slope per token."""
        logp, ref_logp, sample_logp = tokens.logps
        if self.chain_rule is None:
            whole = self.estimate(logp.sum(-1), ref_logp.sum(-1), sample_logp.sum(-1))
            return Estimate(whole.value, whole.slope.unsqueeze(-1).expand_as(logp))
        value, slope = self.estimate(logp, ref_logp, sample_logp - self._log_prefix(tokens))
        if self.chain_rule == "policy":  # the policy also chooses which prefixes come
            slope = _saturated(slope + _later(slope if self.form == "reward" else value))
        return Estimate(value.sum(-1), slope)

    def _log_prefix(self, tokens: "_Tokens") -> Float[Tensor, "B T"]:
        """The log-ratio to μ of the tokens before each, under whom the token divergences are averaged."""
        over = tokens.logp if self.chain_rule == "policy" else tokens.ref_logp
        return functional.pad(over.detach() - tokens.sample_logp, (1, -1)).cumsum(-1)

    def _exact_loss(self, batch: TokenBatch) -> Loss:
        divergence = batch.statistic(self._exact_key)
        if self.target == "token":
            return Loss(divergence, exact_metrics(divergence, batch.loss_mask))
        ref_logp = batch.logp(self.reference) if self.chain_rule == "reference" else batch.logp("policy")
        tokens = self._tokens(batch, ref_logp)
        weight = _saturated(self._log_prefix(tokens).exp())
        weighted = torch.where(weight > 0, weight * divergence, 0.0)
        value = weighted.detach()
        slope = _saturated(_later(value)) if self.chain_rule == "policy" else torch.zeros_like(value)
        estimate = Estimate(value.sum(-1), slope)
        loss = (weighted + _zero_with_gradient(estimate, tokens.logp)).sum(-1)
        return Loss(loss, {**_metrics(estimate, batch.loss_mask.any(-1)), **tokens.counts})


class _Tokens(NamedTuple):
    """Log-probs with neutral values where the sampler could not score, how many tokens are left, and the counts."""

    logp: Tensor
    ref_logp: Tensor
    sample_logp: Tensor
    number: Tensor
    counts: Mapping[str, Metric]

    @property
    def logps(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.logp.detach(), self.ref_logp, self.sample_logp


def at_least_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x`, raised to float32 if it has half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _with_gradient(estimate: Estimate, logp: Tensor) -> Tensor:
    return attached(estimate, _finite(logp))


def _zero_with_gradient(estimate: Estimate, logp: Tensor) -> Tensor:
    bounded = _finite(logp)
    return estimate.slope * (bounded - bounded.detach())  # value 0, gradient `slope`


def _finite(x: Tensor) -> Tensor:
    farthest = math.sqrt(torch.finfo(x.dtype).max)
    return functional.hardtanh(x, -farthest, farthest)


def _saturated(x: Tensor) -> Tensor:
    limit = torch.finfo(x.dtype).max
    return x.clamp(-limit, limit)


def _later(x: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The sum over the tokens after each."""
    return functional.pad(x, (-1, 1)).flip(-1).cumsum(-1).flip(-1)


def _token_metrics(estimate: Estimate, count: Tensor, batch: TokenBatch) -> dict[str, Metric]:
    """As `_metrics`, for tokens of which those that do not count have value 0."""
    largest, limit = torch.maximum(estimate.value, estimate.slope.abs()), torch.finfo(estimate.value.dtype).max
    within = batch.readable and largest.amax().item() < limit
    beyond = batch.nothing if within else (largest >= limit).count_nonzero()
    return {"value": Sum(estimate.value.sum(), count), "overflow": Total(beyond)}


def _metrics(estimate: Estimate, mask: Tensor) -> dict[str, Metric]:
    """Mean value, and how many values or slopes left the range of the dtype."""
    held = estimate.slope.abs() == torch.finfo(estimate.slope.dtype).max
    if held.dim() > mask.dim():
        held = held.any(-1)
    return {
        "value": Sum(torch.where(mask, estimate.value, 0.0).sum(), mask.sum()),
        "overflow": Total((mask & (estimate.value.isinf() | held)).sum()),
    }


def exact_metrics(divergence: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> dict[str, Metric]:
    """Mean value, and at how many tokens it is beyond the dtype."""
    return _metrics(Estimate(divergence.detach(), torch.zeros_like(divergence)), mask)


def warn_overflow(term_name: str, metrics: Mapping[str, float]) -> None:
    """Warn, naming the term, if values of a divergence went beyond the dtype.

    Called with reduced metrics, so that no loss waits for the device. Python shows the warning once per term.

    Args:
        term_name: name of the term in the objective.
        metrics: its metrics as numbers; `overflow` is read.

    >>> warn_overflow("drift", {"overflow": 0.0})
    """
    if metrics.get("overflow", 0.0) > 0:
        warnings.warn(
            f"objective term {term_name!r}: its exact value exceeds the range of the dtype at some tokens; there it is "
            f"+inf and its gradient is held at the largest number (counted in objective/{term_name}/overflow): use a "
            "divergence that grows more slowly, set its clamp, or look for tokens that one of the policies excludes",
            RuntimeWarning,
            stacklevel=2,
        )
