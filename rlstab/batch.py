"""The tokens of a batch and everything known about them, as losses see it.

Axis letters, used in every signature of the project: `B` rows (sequences), `T` token positions of the completion, `V`
vocabulary, `L` layers, `K` experts chosen per token, `N` rows of a whole step or generation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from rlstab.errors import MissingFieldError, ShapeError

__all__ = [
    "COLUMNS",
    "Column",
    "Count",
    "ExactDivergence",
    "Generator",
    "LogProbs",
    "Requirement",
    "Scope",
    "TokenBatch",
    "VocabStat",
]

#: What a mean counts: the whole optimizer step, the generation batch, or the micro-batch at hand.
Scope = Literal["step", "generation", "micro_batch"]
#: The optional fields of a `TokenBatch` with one row per completion.
COLUMNS = ("advantages", "rewards", "baseline", "group", "token_ids", "truncated", "router_log_ratios")

T = TypeVar("T")

FAR = 1e18  # more nats than tokens have: as no log-prob is above 0, each is above their sum
UNKNOWN = (-math.inf, math.inf)
NEAR = 40.0  # nats; e^NEAR, and its square, fit float32 with room for a factor


@dataclass(frozen=True)
class Requirement:
    """Something that a part reads and that the trainer therefore has to supply. Abstract: see its subclasses."""


@dataclass(frozen=True)
class LogProbs(Requirement):
    """Log-probs of the sampled tokens under `source`, as `batch.logp(source)`.

    Sources: `policy` (the only one with gradient), `old` (the policy when the rollouts were made), `sampler` (the
    engine that made them), `initial` (the policy as passed to the trainer), `moving` (a slowly following copy).

    >>> LogProbs("old") == LogProbs("old")
    True
    """

    source: str


@dataclass(frozen=True)
class VocabStat(Requirement):
    """A statistic of the policy's full distribution at each position, as `batch.vocab[name]`, with gradient.

    `entropy`, in nats; `log_z`, the log of the softmax's denominator.
    """

    name: Literal["entropy", "log_z"]


class Generator(Protocol):
    """A divergence of two distributions over the vocabulary, hashable and told apart by `name`."""

    @property
    def name(self) -> str:
        """The divergence and its parameters."""

    def over_vocabulary(
        self, logp: Float[Tensor, "*shape V"], ref_logp: Float[Tensor, "*shape V"]
    ) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape V"]]:
        """The divergence and its derivative in each entry of `logp`, taken as free variables; without gradient."""


@dataclass(frozen=True)
class ExactDivergence(Requirement):
    """A divergence of the policy's full distribution from that of `source`, as `batch.vocab[key]`, with gradient."""

    generator: Generator
    source: str

    @property
    def key(self) -> str:
        """Its name in `batch.vocab`: the same for equal generators and sources."""
        return f"{self.generator.name} from {self.source}"


@dataclass(frozen=True)
class Column(Requirement):
    """A field of `TokenBatch` that is filled only on request: `batch.column(name)`."""

    name: Literal["advantages", "rewards", "baseline", "group", "token_ids", "truncated", "router_log_ratios"]


@dataclass(frozen=True)
class Count:
    """How many loss tokens and rows a scope holds, per data-parallel rank: what a mean divides by.

    A trainer that averages gradients over `R` ranks passes the total over all ranks divided by `R`, so that the average
    over ranks of `sum / tokens` is the mean over all tokens.
    """

    tokens: Tensor | float
    sequences: Tensor | float


class lazy(Generic[T]):  # noqa: N801  # a decorator
    """A property that is computed when it is first read, as `functools.cached_property` without its lock."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute, self._name, self.__doc__ = compute, compute.__name__, compute.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        """The value, which from now on stands in place of this."""
        value = instance.__dict__[self._name] = self._compute(instance)
        return value


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """One micro-batch, step or generation of completions: masks, advantages, log-probs and what parts asked for.

    Positions outside `loss_mask` are set to zero when the batch is built, so that neither padding nor what a tool wrote
    can reach a sum; half-precision log-probs are raised to float32; gradient stays with the log-probs of `policy` and
    with `vocab`. NaN inside stays: a sampler's NaN marks a token it could not score.

    Args:
        mask: real completion tokens (no padding); bool, or numbers that are made bool.
        loss_mask: tokens that are trained on, a subset of `mask` (no tool output); `mask` if not given.
        logps: log-probs in nats of the tokens, by source (see `LogProbs`).
        advantages: per row or per token.
        rewards: total reward of each row; NaN where it could not be scored. An infinite one counts as none.
        baseline: a reward to compare each row's with, such as that of the greedy completion of its prompt.
        group: id of the prompt a row answers.
        token_ids: the tokens.
        truncated: rows that were cut at the length limit.
        router_log_ratios: for a mixture of experts, how the policy's routers have moved since `old`: new minus old
            log-prob, in nats, of the experts that `old` sent the token's prediction to. Detached; 0 where unknown.
        vocab: full-vocabulary statistics by name (entropy in nats), or by the key of an exact divergence.
        parts: tensors that rollout parts and step statistics left, by their `key`.
        counts: what means divide by, per scope. A missing scope means that the batch is the whole scope.
        rows: where the rows come from (`rollout`, `buffer`, `demonstration`): terms choose theirs by name.
        zeroed: says that everything is zero outside `loss_mask` as it comes, which spares the cleaning.
        complete: sources known to have a log-prob for every token of the loss, none of them NaN or -inf, which spares
            looking for tokens without.
        readable: says that a number may be read while a loss is computed, because nothing has to wait for it (a
            processor's memory): whether a source is complete is then found out where a part asks.
        weights: `loss_mask` as numbers, where it is known as such; the attribute `token_weight` always is.

    Raises:
        ShapeError: if a tensor does not have the shape of `mask` (or of its rows).

    >>> import torch
    >>> batch = TokenBatch(
    ...     mask=torch.tensor([[True, True], [True, False]]),
    ...     logps={"policy": torch.tensor([[-1.0, -2.0], [-3.0, -torch.inf]])},
    ... )
    >>> batch.logp("policy")
    tensor([[-1., -2.],
            [-3.,  0.]])
    >>> batch.logp("old") is not None  # on policy: the detached policy
    True
    """

    mask: Shaped[Tensor, "B T"]
    loss_mask: Shaped[Tensor, "B T"] = None  # type: ignore[assignment]  # filled from `mask`
    logps: Mapping[str, Float[Tensor, "B T"]] = field(default_factory=dict)
    advantages: Float[Tensor, "B"] | Float[Tensor, "B T"] | None = None
    rewards: Float[Tensor, "B"] | None = None
    baseline: Float[Tensor, "B"] | None = None
    group: Int[Tensor, "B"] | None = None
    token_ids: Int[Tensor, "B T"] | None = None
    truncated: Bool[Tensor, "B"] | None = None
    router_log_ratios: Float[Tensor, "B T L K"] | None = None
    vocab: Mapping[str, Float[Tensor, "B T"]] = field(default_factory=dict)
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Mapping[str, Count] = field(default_factory=dict)
    rows: str = "rollout"
    zeroed: bool = False
    complete: frozenset[str] = frozenset()
    readable: bool = False
    weights: Float[Tensor, "B T"] | None = field(default=None, repr=False)
    token_weight: Float[Tensor, "B T"] = field(init=False, repr=False)
    """`loss_mask` as numbers, 1.0 or 0.0: what losses and metrics are multiplied with."""
    _memory: dict[Hashable, Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)
    _whole: dict[str, bool] = field(init=False, repr=False, compare=False)
    _extremes: dict[tuple[str, str], tuple[float, float]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        own = self.__dict__  # it is frozen
        own["mask"] = self.mask.bool()
        own["loss_mask"] = self.mask if self.loss_mask is None else self.loss_mask.bool()
        self._check_shapes()
        own["logps"] = {
            k: self._clean(v.detach() if k != "policy" and v.requires_grad else v) for k, v in self.logps.items()
        }
        own["vocab"] = {k: self._clean(v) for k, v in self.vocab.items()}
        if self.advantages is not None and self.advantages.dim() == 2:
            own["advantages"] = self._clean(self.advantages)
        if self.router_log_ratios is not None:  # no gradient: what a router does must not be steered by a ratio
            own["router_log_ratios"] = self._clean(self.router_log_ratios.detach())
        own["token_weight"] = as_numbers(self.loss_mask) if self.weights is None else self.weights
        own["zeroed"] = True
        own["_whole"] = dict.fromkeys(self.complete, True)

    def _clean(self, values: Tensor) -> Tensor:
        if values.dtype in (torch.float16, torch.bfloat16):
            values = values.float()
        if self.zeroed:
            return values
        return torch.where(self.loss_mask[..., None, None] if values.dim() == 4 else self.loss_mask, values, 0.0)

    def _check_shapes(self) -> None:
        if self.mask.dim() != 2:
            raise ShapeError(f"mask: expected [B, T], got {list(self.mask.shape)}")
        full, rows = self.mask.shape, self.mask.shape[:1]
        single = {"loss_mask": self.loss_mask, "token_ids": self.token_ids, "weights": self.weights}
        for of, tokens in (("{}", single), ("logps[{!r}]", self.logps), ("vocab[{!r}]", self.vocab)):
            for name, value in tokens.items():
                if value is not None and value.shape != full:
                    what = of.format(name)
                    raise ShapeError(f"{what}: expected the mask's shape {list(full)}, got {list(value.shape)}")
        for name in ("rewards", "baseline", "group", "truncated"):
            value = self.__dict__[name]
            if value is not None and value.shape != rows:
                raise ShapeError(f"{name}: expected one value per row {list(rows)}, got {list(value.shape)}")
        if self.advantages is not None and self.advantages.shape not in (rows, full):
            raise ShapeError(f"advantages: expected {list(rows)} or {list(full)}, got {list(self.advantages.shape)}")
        routed = self.router_log_ratios
        if routed is not None and (routed.dim() != 4 or routed.shape[:2] != full):
            raise ShapeError(
                f"router_log_ratios: expected [{full[0]}, {full[1]}, layers, experts], got {list(routed.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        """`(B, T)`."""
        return self.mask.shape

    def logp(self, source: str) -> Float[Tensor, "B T"]:
        """Log-probs under `source`; `old` is the detached policy where nothing else was recorded (on policy)."""
        if source in self.logps:
            return self.logps[source]
        if source == "old" and "policy" in self.logps:
            return self._held_policy
        raise MissingFieldError(
            f"log-probs of {source!r} are not in the batch (it holds {sorted(self.logps)}): "
            f"add LogProbs({source!r}) to the part's `requires`, or pass logps={{{source!r}: ...}}"
        )

    def held(self, source: str) -> Float[Tensor, "B T"]:
        """Log-probs under `source`, without gradient."""
        return self.logp(source) if source != "policy" else self._held_policy  # the others have none

    @lazy
    def _held_policy(self) -> Tensor:
        return self.logp("policy").detach()

    @lazy
    def zero(self) -> Float[Tensor, "B T"]:
        """The policy's log-probs minus themselves: 0, with gradient 1 in them, for losses known by their slope."""
        return self.logp("policy") - self._held_policy

    def scores_all(self, source: str) -> bool:
        """Whether each token of the loss is known to have a log-prob under `source`, neither NaN nor -inf."""
        source = self.recorded(source)
        if source not in self._whole:
            self._whole[source] = self.readable and self.held(source).sum().item() > -FAR
        return self._whole[source]

    def apart(self, source: str, other: str) -> Float[Tensor, "B T"]:
        """The log-ratio of two sources per token, without gradient."""
        return self.once(("apart", source, other), lambda batch: batch.held(source) - batch.held(other))

    def close(self, source: str, other: str) -> bool:
        """Whether all tokens are known to have a log-prob under both sources, in a ratio that fits any dtype.

        Their ratio, its inverse and a product of two are then finite without a bound.
        """
        low, high = self.extremes(source, other)
        return low > -NEAR and high < NEAR

    def extremes(self, source: str, other: str) -> tuple[float, float]:
        """The lowest and the highest log-ratio of all positions, 0 outside the loss; infinite where not to be read."""
        key = (source, other)
        if key not in self._extremes:
            self._extremes[key] = found = _read_extremes(self.apart(source, other)) if self.readable else UNKNOWN
            if -math.inf < found[0] and found[1] < math.inf:
                self._whole[self.recorded(source)] = self._whole[self.recorded(other)] = True
        return self._extremes[key]

    def recorded(self, source: str) -> str:
        """`source`, or the policy in place of an `old` that was not recorded (on policy)."""
        return "policy" if source == "old" and source not in self.logps else source

    def behaviour(self, source: str | None) -> str:
        """The source that sampled the tokens: `source` itself, or else sampler, old, policy: the first recorded."""
        if source is not None:
            return source
        return next((name for name in ("sampler", "old") if name in self.logps), "old")

    def column(self, name: str) -> Tensor:
        """The optional field `name`, or an error that says what is missing."""
        if name not in COLUMNS:
            raise MissingFieldError(f"{name!r} is no column of a TokenBatch: expected one of {sorted(COLUMNS)}")
        value: Tensor | None = self.__dict__[name]
        if value is None:
            raise MissingFieldError(
                f"{name} is not in the batch: add Column({name!r}) to the part's `requires`, or pass {name}=..."
            )
        return value

    def statistic(self, name: str) -> Float[Tensor, "B T"]:
        """The full-vocabulary statistic `name`, or an error that says what is missing."""
        if name not in self.vocab:
            raise MissingFieldError(
                f"vocabulary statistic {name!r} is not in the batch (it holds {sorted(self.vocab)}): "
                "declare it in the part's `requires`, or pass vocab={...}"
            )
        return self.vocab[name]

    def total(self, name: str) -> Float[Tensor, ""]:
        """The sum of a full-vocabulary statistic over the tokens of the loss, without gradient."""
        return self.once(("total", name), lambda batch: batch.statistic(name).detach().sum())

    def part(self, key: str) -> Tensor:
        """What the rollout part or step statistic with this key left for these rows."""
        if key not in self.parts:
            raise MissingFieldError(
                f"{key} has left nothing in the batch: a rollout part or step statistic must run before the terms "
                "(trainers run all that an objective requires; by hand: rlstab.losses.run_parts)"
            )
        return self.parts[key]

    def once(self, key: Hashable, compute: Callable[[TokenBatch], Tensor]) -> Tensor:
        """What `compute` makes of this batch; a second call with the same key finds it ready."""
        if key not in self._memory:
            self._memory[key] = compute(self)
        return self._memory[key]

    @lazy
    def nothing(self) -> Float[Tensor, ""]:
        """A count of 0."""
        return self.token_weight.new_zeros(())

    @lazy
    def row_tokens(self) -> Float[Tensor, "B"]:
        """How many tokens of the loss each row has."""
        return self.token_weight.sum(-1)

    @lazy
    def row_divisors(self) -> Float[Tensor, "B"]:
        """What the sum over a row's tokens is divided by for its mean: their number, 1 where there is none."""
        return self.row_tokens.clamp(min=1)

    @lazy
    def tokens(self) -> Float[Tensor, ""]:
        """How many tokens of the loss there are."""
        return self.token_weight.sum()

    def token_advantages(self) -> Float[Tensor, "B T"]:
        """Advantages with a token axis: `[B, T]`, or `[B, 1]` where there is one per row."""
        advantages = self.column("advantages")
        return advantages if advantages.dim() == 2 else advantages.unsqueeze(-1)

    def count(self, over: str) -> Count:
        """Loss tokens and rows of the scope `over`; those of this batch where the trainer gave none."""
        if over in self.counts:
            return self.counts[over]
        return Count(tokens=self.tokens, sequences=float(self.mask.shape[0]))

    def replace(self, **changes: object) -> TokenBatch:
        """A copy with some fields changed, cleaned anew if that may be needed; new log-probs may be incomplete."""
        unclean = any(
            name in changes for name in ("mask", "loss_mask", "logps", "vocab", "advantages", "router_log_ratios")
        )
        known: dict[str, object] = {"zeroed": not unclean, "complete": frozenset() if unclean else self.complete}
        known["weights"] = None if "mask" in changes or "loss_mask" in changes else self.token_weight
        return dataclasses.replace(self, **{**known, **changes})  # type: ignore[arg-type]

    def select(self, rows: slice | Tensor) -> TokenBatch:
        """The chosen rows; counts stay those of the whole."""

        def take(value: Tensor | None) -> Tensor | None:
            return value[rows] if value is not None and value.dim() else value

        counts = {scope: self.count(scope) for scope in ("step", "generation")} | dict(self.counts)
        return self.replace(
            **{name: take(self.__dict__[name]) for name in ("mask", "loss_mask", *COLUMNS)},
            **{
                name: {key: take(value) for key, value in self.__dict__[name].items()}
                for name in ("logps", "vocab", "parts")
            },
            weights=take(self.token_weight),
            counts=counts,
            zeroed=True,
            complete=self.complete,
        )

    def split(self, sizes: Sequence[int]) -> list[TokenBatch]:
        """Consecutive micro-batches of the given sizes, all with the counts of the whole batch."""
        if sum(sizes) != self.mask.shape[0]:
            raise ShapeError(f"sizes: expected a sum of {self.mask.shape[0]} rows, got {list(sizes)}")
        ends = torch.tensor(list(sizes)).cumsum(0).tolist()
        return [self.select(slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def as_numbers(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """A mask as numbers, by way of bytes, which is much faster on a CPU."""
    return mask.view(torch.uint8).float()


def _read_extremes(values: Tensor) -> tuple[float, float]:
    """The lowest and the highest of the values; NaN where one is, infinite where there is none."""
    if not values.numel():
        return UNKNOWN
    low, high = values.aminmax()
    return low.item(), high.item()
