"""An objective: a named sum of terms."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlstab.batch import Requirement, TokenBatch
from rlstab.errors import CompositionError, ConfigError
from rlstab.losses._checks import check_part, described
from rlstab.losses._controllers import Controller
from rlstab.losses._metrics import Metric
from rlstab.losses._parts import RolloutPart
from rlstab.losses._surrogate import Surrogate
from rlstab.losses._term import Term, term_name


class TermReport(NamedTuple):
    """What one term contributed: its mean before the coefficient (detached), the coefficient, its metrics.

    >>> from rlstab.losses import PolicyGradient
    >>> batch = TokenBatch(mask=torch.ones(1, 1), advantages=torch.ones(1), logps={"policy": torch.tensor([[-2.0]])})
    >>> Objective(policy=0.5 * PolicyGradient())(batch).terms["policy"][:2]
    (tensor(2.), 0.5)
    """

    loss: Tensor
    weight: float | Tensor
    metrics: Mapping[str, Metric]


class ObjectiveLoss(NamedTuple):
    """The loss to differentiate, and a report by term.

    >>> from rlstab.losses import PolicyGradient
    >>> batch = TokenBatch(mask=torch.ones(1, 1), advantages=torch.ones(1), logps={"policy": torch.tensor([[-2.0]])})
    >>> loss, terms = Objective(policy=0.5 * PolicyGradient())(batch)
    >>> loss, list(terms)
    (tensor(1.), ['policy'])
    """

    loss: Tensor
    terms: Mapping[str, TermReport]


@dataclass(frozen=True, init=False)
class Objective:
    """A sum of named terms: a loss of a `TokenBatch`.

    Names are the metric names and the keys in a recipe. `a + b`, `a - b` and `sum` join objectives and terms; a term
    takes its name from its class. `c * objective`, `objective / c` and `-objective` multiply every coefficient.

    A term whose coefficient is 0 adds 0 to the loss and to the gradient, even where its own value is infinite.

    Args:
        terms: terms by name, or a single term.
        advantage: the advantage that belongs to the method: a trainer uses it where the user names none.
        **named: the same, as keywords.

    Raises:
        CompositionError: if two surrogates act on the same rows, a name is taken twice, or both sides of a sum bring an
            advantage.
        ConfigError: if there is no term, or something that is not a term.

    >>> import torch
    >>> from rlstab.losses import ClippedSurrogate, JensenShannon, Objective
    >>> objective = Objective(
    ...     policy=ClippedSurrogate(low=0.2, high=0.28), drift=0.05 * JensenShannon(reference="initial")
    ... )
    >>> logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    >>> batch = TokenBatch(
    ...     mask=torch.ones(1, 2), advantages=torch.ones(1), logps={"policy": logp, "initial": logp.detach()}
    ... )
    >>> loss, terms = objective(batch)
    >>> loss.backward(); logp.grad
    tensor([[-0.5000, -0.5000]])
    """

    terms: dict[str, Term]
    advantage: RolloutPart | None
    _joined: dict[str, str] = field(init=False, repr=False, compare=False)

    def __init__(
        self, terms: Mapping[str, Term] | Term | None = None, *, advantage: RolloutPart | None = None, **named: Term
    ) -> None:
        if isinstance(terms, Term):
            terms = {term_name(terms): terms}
        if terms is not None and not isinstance(terms, Mapping):
            raise ConfigError(
                "objective.terms: expected terms by name, as in Objective(policy=ClippedSurrogate()), "
                f"got {described(terms)}"
            )
        clash = sorted(set(terms or {}) & set(named))
        if clash:
            raise CompositionError(f"term names {clash} are given twice")
        object.__setattr__(self, "terms", {**(terms or {}), **named})
        object.__setattr__(self, "advantage", advantage)
        self._check()
        object.__setattr__(self, "_joined", _joined(self.terms))

    def _check(self) -> None:
        if not self.terms:
            raise ConfigError("an objective needs at least one term, as in Objective(policy=ClippedSurrogate())")
        for name, term in self.terms.items():
            if not isinstance(term, Term):
                raise ConfigError(f"objective.terms.{name}: expected a term, got {described(term)}")
            if not name.replace("_", "").isalnum():
                raise ConfigError(f"term name {name!r}: expected letters, digits and underscores (it names metrics)")
        if self.advantage is not None:
            check_part("objective.advantage", self.advantage, RolloutPart, "GroupNorm()")
        surrogates: dict[str, str] = {}
        for name, term in self.terms.items():
            if isinstance(term, Surrogate) and surrogates.setdefault(term.rows, name) != name:
                raise CompositionError(
                    f"terms {surrogates[term.rows]!r} and {name!r} are both policy surrogates on {term.rows} rows: "
                    "each already is the whole policy gradient, keep one"
                )

    def with_advantage(self, advantage: RolloutPart | None) -> "Objective":
        """A copy with another advantage, or none."""
        return Objective(self.terms, advantage=advantage)

    @property
    def requires(self) -> frozenset[Requirement]:
        """What all terms together read; the advantage, which runs before them, is not counted."""
        return frozenset(need for term in self.terms.values() for need in term.requires)

    def __call__(self, *batches: TokenBatch) -> ObjectiveLoss:
        """The loss of a micro-batch: one `TokenBatch` per row source that the terms name."""
        sources = {batch.rows: batch for batch in batches}
        shares: list[Tensor] = []
        joint: dict[str, Tensor] = {}
        reports: dict[str, TermReport] = {}
        for name, term in self.terms.items():
            if term.rows not in sources:
                raise ConfigError(
                    f"term {name!r} acts on {term.rows!r} rows, but the batches hold {sorted(sources)}: "
                    "pass a TokenBatch with these rows"
                )
            batch, weight, together = sources[term.rows], term.coefficient, self._joined.get(name)
            values, metrics = term.loss(batch)
            if together is None or values.dim() == 1:
                share = term.mean.reduce(values, batch)
                shares.append(_times(weight, share))
                value = share.detach()
            else:
                joint[together] = _plus(joint.get(together), float(weight), values)
                value = term.mean.reduce(values.detach(), batch)
            reports[name] = TermReport(value, weight, metrics)
        for name, values in joint.items():
            shares.append(self.terms[name].mean.reduce(values, sources[self.terms[name].rows]))
        return ObjectiveLoss(sum(shares[1:], start=shares[0]), reports)

    def __add__(self, other: "Objective | Term") -> "Objective":
        if isinstance(other, Term):
            other = Objective(other)
        if not isinstance(other, Objective):
            return NotImplemented
        clash = sorted(set(self.terms) & set(other.terms))
        if clash:
            raise CompositionError(
                f"both sides have terms named {clash}: name them, as in Objective(first=..., second=...)"
            )
        advantages = {part for part in (self.advantage, other.advantage) if part is not None}
        if len(advantages) > 1:
            raise CompositionError(
                f"both sides bring an advantage, {self.advantage} and {other.advantage}: keep one, as in "
                "left.with_advantage(None) + right"
            )
        return Objective({**self.terms, **other.terms}, advantage=next(iter(advantages), None))

    def __mul__(self, factor: float) -> "Objective":
        return Objective({name: factor * term for name, term in self.terms.items()}, advantage=self.advantage)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "Objective":
        return Objective({name: term / divisor for name, term in self.terms.items()}, advantage=self.advantage)

    def __neg__(self) -> "Objective":
        return self * -1

    def __sub__(self, other: "Objective | Term") -> "Objective":
        return self + -other if isinstance(other, Objective | Term) else NotImplemented

    def __radd__(self, zero: int) -> "Objective":
        """`0 + objective`, with which `sum` begins."""
        return self if isinstance(zero, int) and zero == 0 else NotImplemented

    @property
    def controllers(self) -> dict[str, Controller]:
        """The controllers among the coefficients, by term name."""
        return {name: term.coef for name, term in self.terms.items() if isinstance(term.coef, Controller)}

    def observe(self, step: int, metrics: Mapping[str, Mapping[str, float]]) -> None:
        """Let every controller see the finished optimizer step: its number and the reduced metrics of its term."""
        for name, controller in self.controllers.items():
            controller.observe(step, metrics.get(name, {}))

    def state_dict(self) -> dict[str, Any]:
        """The state of the controllers."""
        return {name: controller.state_dict() for name, controller in self.controllers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        controllers = self.controllers
        if set(state) != set(controllers):
            raise ConfigError(
                f"the checkpoint holds controllers of {sorted(state)}, this objective at {sorted(controllers)}: "
                "resume with the objective that was saved"
            )
        for name, controller in controllers.items():
            controller.load_state_dict(state[name])


def _joined(terms: Mapping[str, Term]) -> dict[str, str]:
    """Terms whose losses are added up by token and then averaged once, each with the name of the first of them.

    These have equal means over the same rows, and fixed coefficients.
    """
    found: dict[tuple[object, ...], list[str]] = {}
    for name, term in terms.items():
        if not isinstance(term.coef, Controller) and term.coef != 0:
            found.setdefault((term.rows, term.mean.unit, term.mean.over), []).append(name)
    return {name: names[0] for names in found.values() if len(names) > 1 for name in names}


def _plus(total: Tensor | None, weight: float, values: Tensor) -> Tensor:
    if total is None:
        return values if weight == 1 else weight * values
    return torch.add(total, values, alpha=weight)


def _times(weight: float | Tensor, value: Tensor) -> Tensor:
    """The weighted value; 0 where the weight is 0, even of an infinite value."""
    if not isinstance(weight, Tensor) and weight != 0:
        return value if weight == 1 else weight * value
    factor = torch.zeros_like(value).add_(weight)  # on the value's device and in its dtype, without waiting for it
    return torch.where(factor == 0, 0.0, factor * value)
