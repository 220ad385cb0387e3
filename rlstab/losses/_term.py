"""Terms: unreduced losses with a coefficient, a mean and a declaration of what they read."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

from torch import Tensor

from rlstab.batch import TokenBatch
from rlstab.errors import CompositionError, ConfigError
from rlstab.losses._controllers import Controller
from rlstab.losses._mean import Mean, MeanField
from rlstab.losses._metrics import Metric
from rlstab.losses._parts import Part, part_name

if TYPE_CHECKING:
    from rlstab.losses._objective import Objective


class Loss(NamedTuple):
    """An unreduced loss, `[B, T]` or `[B]`, and the metrics of the term that made it."""

    values: Tensor
    metrics: Mapping[str, Metric]


@dataclass(frozen=True, kw_only=True)
class Term(Part):
    """A summand of an objective: `coef * mean(loss)` over the rows of one source.

    Args:
        coef: coefficient, a number or a controller.
        mean: how the unreduced loss becomes a number (see `Mean`); `term.mean("sequence")` gives a copy.
        rows: which rows the term acts on (`rollout`, or another row source of the trainer).
    """

    coef: float | Controller = 1.0
    mean: Mean = MeanField()  # type: ignore[assignment]  # a descriptor: reads as a Mean, called it gives a copy
    rows: str = "rollout"

    @abstractmethod
    def loss(self, batch: TokenBatch) -> Loss:
        """The unreduced loss and its metrics."""

    @property
    def coefficient(self) -> float | Tensor:
        """The coefficient now."""
        return self.coef.value if isinstance(self.coef, Controller) else self.coef

    def __mul__(self, factor: float) -> Self:
        if isinstance(self.coef, Controller):
            raise ConfigError(
                f"{type(self).__name__}.coef is a controller and has no fixed value to multiply by {factor}: "
                "scale the controller's own numbers instead"
            )
        return self.replace(coef=self.coef * factor)

    __rmul__ = __mul__

    def __add__(self, other: "Term | Objective") -> "Objective":
        from rlstab.losses._objective import Objective

        mine = Objective({term_name(self): self})
        if isinstance(other, Term):
            if term_name(other) == term_name(self):
                raise CompositionError(
                    f"two terms of class {type(self).__name__} have no names of their own: "
                    "use Objective(first=..., second=...)"
                )
            other = Objective({term_name(other): other})
        return mine + other


def term_name(term: Term) -> str:
    """The metric name of a term that was given none: its class in snake case.

    >>> from rlstab.losses import ReverseKL
    >>> term_name(ReverseKL())
    'reverse_kl'
    """
    return part_name(term)
