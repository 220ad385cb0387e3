"""How an unreduced loss becomes one number: the only place that owns mask and normalisation."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float
from torch import Tensor

from rlstab.batch import TokenBatch
from rlstab.errors import ConfigError, ShapeError

SMALLEST = 1e-6  # below every count but 0
Unit = Literal["token", "sequence"] | int


@dataclass(frozen=True, kw_only=True)
class Mean:
    r"""The mean of a per-token loss `l` with mask `m` over a scope.

    | unit | value |
    |---|---|
    | `"token"` | $\sum m l / N_\text{tokens}$ |
    | `"sequence"` | $\sum_i (\sum_t m l / \sum_t m) / N_\text{rows}$ |
    | a length `L` | $\sum m l / (N_\text{rows} L)$ |

    A loss with one value per row (`[B]`) knows only `"sequence"`: $\sum_i l_i / N_\text{rows}$.

    `over` says whose tokens and rows are counted: `"step"` (all micro-batches and ranks of the optimizer step: the
    gradient does not depend on how the step is split), `"generation"` or `"micro_batch"` (what host trainers do).

    >>> import torch
    >>> batch = TokenBatch(mask=torch.tensor([[True, True], [True, False]]))
    >>> loss = torch.tensor([[1.0, 2.0], [6.0, 9.0]])
    >>> Mean(unit="token").reduce(loss, batch), Mean(unit="sequence").reduce(loss, batch)
    (tensor(3.), tensor(3.7500))
    """

    unit: Unit = "token"
    over: Literal["step", "generation", "micro_batch"] = "step"

    def __post_init__(self) -> None:
        if self.unit not in ("token", "sequence") and not (type(self.unit) is int and self.unit > 0):
            raise ConfigError(f"mean.unit: expected 'token', 'sequence' or a length > 0, got {self.unit!r}")
        if self.over not in ("step", "generation", "micro_batch"):
            raise ConfigError(f"mean.over: expected 'step', 'generation' or 'micro_batch', got {self.over!r}")

    if TYPE_CHECKING:  # the mean of a term is a `BoundMean`, but its field is annotated with what one assigns to it

        def __call__(
            self, unit: Unit = "token", *, over: Literal["step", "generation", "micro_batch"] = "step"
        ) -> Any: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mean) and (self.unit, self.over) == (other.unit, other.over)

    def reduce(self, loss: Float[Tensor, "B T"] | Float[Tensor, "B"], batch: TokenBatch) -> Float[Tensor, ""]:
        """This micro-batch's share of the mean: shares of a scope add up to it."""
        if loss.dim() == 1:
            if self.unit != "sequence":
                raise ShapeError(f"a loss with one value per row has no mean over {self.unit!r}: use .mean('sequence')")
            return loss.sum() / _or_one(batch.count(self.over).sequences)
        masked = loss * batch.token_weight
        if self.unit == "token":
            return masked.sum() / _tokens(batch, self.over)
        sequences = _or_one(batch.count(self.over).sequences)
        if self.unit == "sequence":
            of_rows = masked.sum(-1) / batch.row_divisors
            return of_rows.mean() if _is(sequences, of_rows.shape[0]) else of_rows.sum() / sequences
        return masked.sum() / (sequences * self.unit)


class BoundMean(Mean):
    """What `term.mean` gives: a `Mean` to read and, when called, a copy of the term with another one."""

    _term: Any

    def __init__(self, mean: Mean, term: Any) -> None:
        super().__init__(unit=mean.unit, over=mean.over)
        object.__setattr__(self, "_term", term)

    def __repr__(self) -> str:
        return f"Mean(unit={self.unit!r}, over={self.over!r})"

    def __call__(self, unit: Unit = "token", *, over: Literal["step", "generation", "micro_batch"] = "step") -> Any:
        """A copy of the term that is averaged over `unit` within `over`."""
        return self._term.replace(mean=Mean(unit=unit, over=over))


class MeanField:
    """The dataclass field `mean` of a term, with its default for the class."""

    def __init__(self, unit: Unit = "token") -> None:
        self.default = Mean(unit=unit)

    def __get__(self, term: Any, owner: Any = None) -> Any:
        """The default of the class, or the mean of a term."""
        return self.default if term is None else term.__dict__["_mean"]

    def __set__(self, term: Any, value: Mean) -> None:
        """Bind the mean to the term."""
        if not isinstance(value, Mean):
            raise ConfigError(
                f"{type(term).__name__}.mean: expected a Mean such as Mean(unit='token'), got {value!r}: "
                "or call .mean('token') on the term"
            )
        term.__dict__["_mean"] = BoundMean(value, term)


def _tokens(batch: TokenBatch, over: str) -> Tensor | float:
    tokens = batch.count(over).tokens
    if not isinstance(tokens, Tensor):
        return _or_one(tokens)
    return batch.once(("divisor", over), lambda _: tokens.clamp(min=SMALLEST))


def _is(count: Tensor | float, number: int) -> bool:
    """Whether a count is known to be this number, without waiting for a device."""
    return not isinstance(count, Tensor) and count == number


def _or_one(count: Tensor | float) -> Tensor | float:
    """The count, or something that 0 can be divided by. A count per rank may lie between 0 and 1."""
    return count.clamp(min=SMALLEST) if isinstance(count, Tensor) else count or 1.0
