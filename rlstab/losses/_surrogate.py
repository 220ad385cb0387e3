"""What policy surrogates share: weights, ratio, clip metrics."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Num, Shaped
from torch import Tensor

from rlstab.batch import Column, LogProbs, Requirement, TokenBatch
from rlstab.errors import CompositionError, ConfigError
from rlstab.losses._checks import check_part
from rlstab.losses._metrics import Max, Metric, Min, Sum, Total
from rlstab.losses._ratio import Ratio, TokenRatio, missing
from rlstab.losses._sampler_weight import SamplerCorrection
from rlstab.losses._term import Loss, Term
from rlstab.losses._weight import Weight, weights_of


@dataclass(frozen=True, kw_only=True)
class Surrogate(Term):
    """A policy-gradient loss, multiplied by its weights. An objective holds one per row source. Abstract.

    A token to which a policy gives probability 0, where `scored_by` names that policy, is left out of a loss per token,
    and counted.

    Args:
        weights: detached factors, multiplied in their order; a single one will do.

    Metrics: `impossible`, the number of tokens left out because of a log-prob of -inf; `unscored`, the number left out
    because the sampler has none (NaN or -inf), where `scored_by` names it.

    Raises:
        ConfigError: if a weight is none.
        CompositionError: if two of the weights correct for the sampler.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Imitation(Surrogate):
    ...     def surrogate(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Metric]]:
    ...         return -batch.token_advantages().clamp(min=0) * batch.logp("policy"), {}
    >>> batch = TokenBatch(
    ...     mask=torch.ones(2, 1), advantages=torch.tensor([2.0, -1.0]), logps={"policy": -torch.ones(2, 1)}
    ... )
    >>> Imitation().loss(batch).values
    tensor([[2.],
            [0.]])
    """

    weights: Sequence[Weight] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "weights", weights_of(f"{type(self).__name__}.weights", self.weights))
        if len(self._corrections()) > 1:
            raise CompositionError(
                f"{type(self).__name__}: {' and '.join(self._corrections())} would multiply the same mismatch ratio "
                "twice: keep one (masks such as Veto and GeometricRejection go with it)"
            )

    def _corrections(self) -> list[str]:
        return [type(w).__name__ for w in self.weights if isinstance(w, SamplerCorrection)]

    @property
    def requires(self) -> frozenset[Requirement]:
        """Advantages, the policy, and what the parts inside read."""
        return super().requires | {Column("advantages"), LogProbs("policy")}

    @property
    def scored_by(self) -> tuple[str, ...]:
        """Sources without whose log-prob a token is left out: the policy, unless a subclass says otherwise."""
        return ("policy",)

    @property
    def zero_without(self) -> tuple[str, ...]:
        """Those of `scored_by` without whose log-prob `surrogate` already is 0, with gradient 0."""
        return ()

    def loss(self, batch: TokenBatch) -> Loss:
        """The surrogate times its weights, without tokens that have no log-prob."""
        values, metrics = self.surrogate(batch)
        metrics = dict(metrics)
        for weight in self.weights:
            factor, more = weight.factor(batch)
            values = values * factor
            metrics |= more
        found: dict[str, Tensor | None] = {}
        for source in self.scored_by:
            name = "unscored" if source == "sampler" else "impossible"
            before = found.setdefault(name, None)
            if not batch.scores_all(source):
                tokens = missing(batch, source)
                found[name] = tokens if before is None or before is tokens else before | tokens
                if values.shape == batch.shape and source not in self.zero_without:
                    values = torch.where(tokens, 0.0, values)
        for name, flags in found.items():
            metrics[name] = Total(batch.nothing if flags is None else flags.count_nonzero())
        return Loss(values, metrics)

    @abstractmethod
    def surrogate(self, batch: TokenBatch) -> tuple[Float[Tensor, "B #T"], dict[str, Metric]]:
        """The unweighted loss and its metrics."""


@dataclass(frozen=True, kw_only=True)
class RatioSurrogate(Surrogate):
    """A surrogate of the importance ratio between the policy and an earlier one. Abstract.

    Tokens that have no ratio (see `Ratio`) are left out of a loss per token, and are no evidence about the ratio of
    their sequence.

    Args:
        ratio: the importance ratio.
        weights: detached factors, multiplied in their order; a single one will do.

    Metrics: `unscored` for a ratio to the sampler, else `impossible`: the number of such tokens.

    Raises:
        ConfigError: if the ratio is none.
        CompositionError: if the ratio is against the sampler and a weight corrects for the sampler once more.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Logarithmic(RatioSurrogate):
    ...     def surrogate(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Metric]]:
    ...         return -batch.token_advantages() * self.ratio.log_ratio(batch), {}
    >>> logps = {"policy": torch.tensor([[-1.0]]), "old": torch.tensor([[-2.0]])}
    >>> Logarithmic().loss(TokenBatch(mask=torch.ones(1, 1), advantages=torch.ones(1), logps=logps)).values
    tensor([[-1.]])
    """

    ratio: Ratio = field(default_factory=TokenRatio)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_part(f"{type(self).__name__}.ratio", self.ratio, Ratio, "TokenRatio()")
        if self._corrections() and self.ratio.against == "sampler":
            raise CompositionError(
                f"{type(self).__name__}: the ratio is taken against the sampler, so {self._corrections()[0]} would "
                "count the same mismatch twice: drop the weight, or take the ratio against 'old'"
            )

    def _token_ratio_only(self) -> None:
        if self.ratio.sequence_level:
            raise ConfigError(
                f"{type(self).__name__}.ratio: expected a ratio per token (it is joined over the sequence here), got "
                f"{type(self.ratio).__name__}: use TokenRatio"
            )

    @property
    def scored_by(self) -> tuple[str, ...]:
        """The denominator of the ratio; where the policy gives probability 0, the ratio is 0."""
        return (self.ratio.against,)

    @property
    def inert_at_ratio_one(self) -> tuple[str, ...]:
        """What does nothing while the ratio is 1, for a notice to the user."""
        return ()

    @property
    def inert_on_policy(self) -> tuple[str, ...]:
        """Bounds on a ratio to the old policy do nothing while that is the policy itself."""
        return super().inert_on_policy + (self.inert_at_ratio_one if self.ratio.against == "old" else ())


def by_sign(advantages: Float[Tensor, "B #T"], *choices: tuple[float, float]) -> list[Float[Tensor, "B #T"]]:
    """Of each choice the second number where A is negative, be it -0, else the first.

    >>> by_sign(torch.tensor([[2.0, -1.0]]), (1.0, 3.0))
    [tensor([[1., 3.]])]
    """
    falling = advantages.signbit()
    return [torch.full_like(advantages, first).masked_fill_(falling, second) for first, second in choices]


def clip_metrics(
    stopped: Bool[Tensor, "B #T"], advantages: Float[Tensor, "B #T"], batch: TokenBatch
) -> dict[str, Metric]:
    """Where a clip stops the gradient, at a ratio that is too low for A < 0 or too high for A > 0.

    `clip_low`, `clip_high` and `clip_region` (both) are shares of the tokens, or of the rows where there is one ratio
    and one advantage per row; `clip_low_min` and `clip_high_max` are the smallest and largest share over the rows that
    hold a token.
    """
    rising = advantages > 0
    region, rows = count_per_row(stopped, batch)
    above = region * rising.squeeze(-1) if rising.shape[-1] == 1 else count_per_row(stopped & rising, batch)[0]
    below = region - above
    below_total, above_total = below.sum(), above.sum()
    total = batch.tokens if stopped.shape == batch.shape else rows.sum()
    return {
        "clip_low": Sum(below_total, total),
        "clip_high": Sum(above_total, total),
        "clip_region": Sum(below_total + above_total, total),
        "clip_low_min": Min((below / rows).nan_to_num(nan=torch.inf).amin()),  # 0 / 0: a row without tokens
        "clip_high_max": Max((above / rows).nan_to_num(nan=-torch.inf).amax()),
    }


def clip_share(clipped: Shaped[Tensor, "B #T"], batch: TokenBatch) -> Sum:
    """The share of the tokens, or of the rows, that are clipped: true, or a number that is not 0."""
    if clipped.shape == batch.shape:
        return Sum((clipped * batch.token_weight).count_nonzero(), batch.tokens)
    return Sum(clipped.count_nonzero(), batch.token_weight.new_full((), clipped.shape[0]))


def count_per_row(flags: Bool[Tensor, "B #T"], batch: TokenBatch) -> tuple[Num[Tensor, "B"], Float[Tensor, "B"]]:
    """How many flags of each row are set, and how many values it has: its tokens, or 1 for one value per row."""
    if flags.shape == batch.shape:
        counted = (flags & batch.loss_mask).view(torch.uint8)  # bytes add up faster than bools
        return counted.sum(-1, dtype=batch.token_weight.dtype), batch.row_tokens
    return flags.sum(-1), batch.token_weight.new_ones(flags.shape[0])
