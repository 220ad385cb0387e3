"""Terms: unreduced losses with a coefficient, a mean and a declaration of what they read."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

from torch import Tensor

from rlstab.batch import TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses._checks import check_number
from rlstab.losses._controllers import Controller
from rlstab.losses._mean import Mean, MeanField
from rlstab.losses._metrics import Metric
from rlstab.losses._parts import Part, part_name

if TYPE_CHECKING:
    from rlstab.losses._objective import Objective


class Loss(NamedTuple):
    """An unreduced loss, `[B, T]` or `[B]`, and the metrics of the term that made it.

    >>> import torch
    >>> from rlstab.losses import PolicyGradient
    >>> batch = TokenBatch(mask=torch.ones(1, 1), advantages=torch.ones(1), logps={"policy": torch.tensor([[-2.0]])})
    >>> values, metrics = PolicyGradient().loss(batch)
    >>> values, metrics["logp"].value()
    (tensor([[2.]]), tensor(-2.))
    """

    values: Tensor
    metrics: Mapping[str, Metric]


@dataclass(frozen=True, kw_only=True)
class Term(Part):
    """A summand of an objective: `coef * mean(loss)` over the rows of one source. Abstract.

    A term of one's own says what it reads and computes an unreduced loss; positions that are not trained on are zero in
    all that a batch gives out, and must have a finite loss. `c * term`, `term / c` and `-term` change the coefficient,
    `a + b` and `a - b` make an `Objective`. A subclass with a `__post_init__` calls `super().__post_init__()`.

    Args:
        coef: coefficient, a number or a controller.
        mean: how the unreduced loss becomes a number (see `Mean`); `term.mean("sequence")` gives a copy.
        rows: which rows the term acts on (`rollout`, or another row source of the trainer).

    Raises:
        ConfigError: if the coefficient is no finite number or controller, or the mean no `Mean`.

    >>> import torch
    >>> from rlstab.batch import LogProbs, Requirement
    >>> from rlstab.losses import token_mean
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Pull(Term):
    ...     reference: str = "initial"
    ...
    ...     @property
    ...     def requires(self) -> frozenset[Requirement]:
    ...         return frozenset({LogProbs("policy"), LogProbs(self.reference)})
    ...
    ...     def loss(self, batch: TokenBatch) -> Loss:
    ...         distance = batch.logp("policy") - batch.logp(self.reference)
    ...         return Loss(distance.square(), {"distance": token_mean(distance, batch.loss_mask)})
    >>> logps = {"policy": torch.tensor([[-1.0, -2.0]]), "initial": torch.tensor([[-2.0, -4.0]])}
    >>> batch = TokenBatch(mask=torch.ones(1, 2), logps=logps)
    >>> from rlstab.losses import Objective
    >>> loss, terms = Objective(pull=0.1 * Pull())(batch)
    >>> loss, terms["pull"].metrics["distance"].value()  # 0.1 (1 + 4) / 2
    (tensor(0.2500), tensor(1.5000))
    """

    coef: float | Controller = 1.0
    mean: Mean = MeanField()  # type: ignore[assignment]  # a descriptor: reads as a Mean, called it gives a copy
    rows: str = "rollout"

    def __post_init__(self) -> None:
        if not isinstance(self.coef, Controller):
            check_number(f"{type(self).__name__}.coef", self.coef)

    @abstractmethod
    def loss(self, batch: TokenBatch) -> Loss:
        """The unreduced loss and its metrics."""

    @property
    def coefficient(self) -> float | Tensor:
        """The coefficient now."""
        return self.coef.value if isinstance(self.coef, Controller) else self.coef

    def __mul__(self, factor: float) -> Self:
        name = type(self).__name__
        check_number(f"a factor of {name}", factor)
        if isinstance(self.coef, Controller):
            raise ConfigError(
                f"{name}.coef is a controller and has no fixed value to multiply by {factor}: "
                "scale the controller's own numbers instead"
            )
        return self.replace(coef=self.coef * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Self:
        check_number(f"a divisor of {type(self).__name__}", divisor)
        return self * (1 / divisor)

    def __neg__(self) -> Self:
        return self * -1

    def __add__(self, other: "Term | Objective") -> "Objective":
        return self._alone + other

    def __sub__(self, other: "Term | Objective") -> "Objective":
        return self._alone - other

    def __radd__(self, zero: int) -> "Objective":
        """`0 + term`, with which `sum` begins."""
        return zero + self._alone

    @property
    def _alone(self) -> "Objective":
        from rlstab.losses._objective import Objective

        return Objective({term_name(self): self})


def term_name(term: Term) -> str:
    """The metric name of a term that was given none: its class in snake case.

    >>> from rlstab.losses import ReverseKL
    >>> term_name(ReverseKL())
    'reverse_kl'
    """
    return part_name(term)
