"""Weights and masks on the ratio of the old policy to the engine that sampled: the trainer-engine mismatch."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from rlstab.batch import LogProbs, Requirement, TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses._checks import check_bounds, check_choice, check_positive
from rlstab.losses._metrics import Max, Metric, Min, Sum, Total, mask_like, masked_max, masked_min
from rlstab.losses._parts import part_name
from rlstab.losses._ratio import leave_out, missing, ratio_of
from rlstab.losses._weight import Factor, Weight

Unscored = Literal["drop", "keep"]


@dataclass(frozen=True, kw_only=True)
class SamplerWeight(Weight):
    r"""A weight that reads the raw ratio $\rho_t = \exp(\log\pi_\text{old} - \log\pi_\text{sampler})$. Abstract.

    Args:
        unscored: what becomes of a token that the engine could not score (its log-prob is NaN, or -inf, which no token
            has that was drawn): `drop` leaves it out of the loss, `keep` gives it $\rho = 1$, as TRL does. Either way
            it is counted, and is no evidence about its sequence.

    Metrics: `unscored`, the number of such tokens.

    >>> import torch
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Agreed(SamplerWeight):
    ...     def weigh(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Metric]]:
    ...         return (self.log_rho(batch).abs() < 0.1).float(), {}
    >>> logps = {"old": torch.tensor([[-1.0, -2.0, -3.0]]), "sampler": torch.tensor([[-1.0, -1.0, torch.nan]])}
    >>> Agreed().factor(TokenBatch(mask=torch.ones(1, 3), logps=logps)).values
    tensor([[1., 0., 0.]])
    """

    unscored: Unscored = "drop"

    def __post_init__(self) -> None:
        check_choice(f"{type(self).__name__}.unscored", self.unscored, ("drop", "keep"))

    @property
    def requires(self) -> frozenset[Requirement]:
        """The old policy and the engine's log-probs."""
        return super().requires | {LogProbs("old"), LogProbs("sampler")}

    def factor(self, batch: TokenBatch) -> Factor:
        """The weight, 0 at tokens without a score if these are dropped."""
        values, metrics = self.weigh(batch)
        return Factor(self.drop_unscored(values, batch), metrics)

    def drop_unscored(self, values: Float[Tensor, "B #T"], batch: TokenBatch) -> Float[Tensor, "B #T"]:
        """`values` without the tokens that have no score, unless they are kept."""
        return leave_out(values, batch, "sampler") if self.unscored == "drop" else values

    @abstractmethod
    def weigh(self, batch: TokenBatch) -> tuple[Float[Tensor, "B #T"], dict[str, Metric]]:
        """The weight of tokens or rows, from the tokens that have a score, and its metrics."""

    def scored(self, batch: TokenBatch) -> Bool[Tensor, "B T"]:
        """Positions that the engine scored."""
        return batch.once("scored", lambda batch: ~missing(batch, "sampler"))

    def counted(self, batch: TokenBatch) -> Bool[Tensor, "B T"]:
        """Tokens of the loss that have a score."""
        if batch.scores_all("sampler"):
            return batch.loss_mask
        return batch.once("counted", lambda batch: batch.loss_mask & self.scored(batch))

    def unscored_tokens(self, batch: TokenBatch) -> Total:
        """How many tokens of the loss have no score."""
        if batch.scores_all("sampler"):
            return Total(batch.nothing)
        return Total(batch.tokens - self.counted(batch).sum())

    def log_rho(self, batch: TokenBatch) -> Float[Tensor, "B T"]:
        """The raw log-ratio; 0 outside the loss and where there is no score."""
        return leave_out(batch.logp("old") - batch.logp("sampler"), batch, "sampler")


@dataclass(frozen=True, kw_only=True)
class SamplerCorrection(SamplerWeight):
    r"""An importance weight for tokens that another policy (the engine) drew than the ratio's denominator. Abstract.

    A surrogate takes one, and none if its ratio is already against the sampler.

    Args:
        min: lower bound of the ratio, or None.
        max: upper bound of the ratio, or None.
        level: `token`, one ratio per token; `sequence`, their product over the sequence.

    Metrics, under the name of the class (`truncated_is/raw_mean`): `raw_mean`, `raw_min`, `raw_max` of the ratio before
    the correction, `mean`, `min`, `max` after it, and `changed`, the share that the bounds changed; all over tokens
    with a score (sequence level: rows).

    >>> import torch
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Rooted(SamplerCorrection):
    ...     max: float | None = 2.0
    ...
    ...     def correct(self, rho: Tensor) -> Tensor:
    ...         return rho.sqrt().clamp(self.min, self.max)
    >>> logps = {"old": torch.tensor([[0.9, 0.4]]).log(), "sampler": torch.tensor([[0.1, 0.4]]).log()}
    >>> Rooted().factor(TokenBatch(mask=torch.ones(1, 2), logps=logps)).values
    tensor([[2., 1.]])
    """

    min: float | None = None
    max: float | None = None
    level: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(type(self).__name__, self.min, self.max)
        check_choice(f"{type(self).__name__}.level", self.level, ("token", "sequence"))

    @abstractmethod
    def correct(self, rho: Float[Tensor, "B #T"]) -> Float[Tensor, "B #T"]:
        """The weight of a raw ratio."""

    def weigh(self, batch: TokenBatch) -> tuple[Float[Tensor, "B #T"], dict[str, Metric]]:
        """The corrected ratio per token or per row."""
        rho, name = self.rho(batch), part_name(self)
        weight = self.correct(rho)
        mask = mask_like(rho, self.counted(batch))
        whole = mask is batch.loss_mask
        ones = batch.token_weight if whole else mask.to(rho.dtype)
        count = batch.tokens if whole else ones.sum()
        beyond = ones.reciprocal() - 1  # 0 where there is a ratio, else infinite
        before, after = rho * ones, weight * ones
        return weight, {
            **_spread(f"{name}/raw_", rho, before, beyond, count),
            **_spread(f"{name}/", weight, after, beyond, count),
            f"{name}/changed": Sum((before != after).count_nonzero(), count),
            "unscored": self.unscored_tokens(batch),
        }

    def rho(self, batch: TokenBatch) -> Float[Tensor, "B #T"]:
        """The raw ratio at the chosen level."""
        log_rho = self.log_rho(batch)
        return ratio_of(log_rho if self.level == "token" else log_rho.sum(-1, keepdim=True))


@dataclass(frozen=True, kw_only=True)
class TruncatedIS(SamplerCorrection):
    r"""Truncated importance sampling (TIS): $w = \operatorname{clip}(\rho, \min, \max)$.

    Args:
        min: lower bound, or None.
        max: upper bound, or None.
        level: `token`, or `sequence` for the product of the ratios.
        unscored: `drop` or `keep` tokens without a sampler score.

    Raises:
        ConfigError: without a bound, or with bounds in the wrong order.

    Reference: Your Efficient RL Framework Secretly Brings You Off-Policy RL Training,
    https://fengyao.notion.site/off-policy-rl

    >>> import torch
    >>> logps = {"old": torch.tensor([[0.5, 0.6]]).log(), "sampler": torch.tensor([[0.1, 0.5]]).log()}
    >>> TruncatedIS(max=2.0).factor(TokenBatch(mask=torch.ones(1, 2), logps=logps)).values
    tensor([[2.0000, 1.2000]])
    """

    max: float | None = 2.0

    def correct(self, rho: Float[Tensor, "B #T"]) -> Float[Tensor, "B #T"]:
        """The ratio within its bounds."""
        return rho.clamp(self.min, self.max)


@dataclass(frozen=True, kw_only=True)
class MaskedIS(SamplerCorrection):
    r"""Masked importance sampling (MIS): $w = \rho$ if $\min \le \rho \le \max$, else 0.

    IcePop is the token level with `min=0.5, max=5.0`. At sequence level one bad token drops its sequence.

    Args:
        min: lower bound, or None.
        max: upper bound, or None.
        level: `token`, or `sequence` for the product of the ratios.
        unscored: `drop` or `keep` tokens without a sampler score.

    Raises:
        ConfigError: without a bound, or with bounds in the wrong order.

    Reference: Every Step Evolves (IcePop), https://arxiv.org/abs/2510.18855

    >>> import torch
    >>> logps = {"old": torch.tensor([[0.5, 0.6]]).log(), "sampler": torch.tensor([[0.1, 0.5]]).log()}
    >>> MaskedIS(min=0.5, max=2.0).factor(TokenBatch(mask=torch.ones(1, 2), logps=logps)).values
    tensor([[0.0000, 1.2000]])
    """

    def correct(self, rho: Float[Tensor, "B #T"]) -> Float[Tensor, "B #T"]:
        """The ratio where it lies within its bounds."""
        low, high = -math.inf if self.min is None else self.min, math.inf if self.max is None else self.max
        return rho.masked_fill((rho < low) | (rho > high), 0.0)


@dataclass(frozen=True, kw_only=True)
class GeometricRejection(SamplerWeight):
    r"""Keep sequences whose geometric mean ratio is within $\text{low} \le \exp(\overline{\log\rho}) \le \text{high}$.

    A mask: the ratio itself is not multiplied. The mean does not grow with the length, so useful bands are narrow
    (0.999 to 1.001).

    Args:
        low: lower bound.
        high: upper bound.
        unscored: `drop` or `keep` tokens without a sampler score.

    Metrics: `geometric_rejection/kept`, and `raw_min`, `raw_max` of the geometric mean.

    Raises:
        ConfigError: unless 0 < low < high.

    Reference: When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch,
    https://richardli.xyz/rl-collapse

    >>> import torch
    >>> logps = {"old": torch.tensor([[-1.0], [-1.0]]), "sampler": torch.tensor([[-1.0], [-1.1]])}
    >>> GeometricRejection(low=0.95, high=1.05).factor(TokenBatch(mask=torch.ones(2, 1), logps=logps)).values
    tensor([[1.],
            [0.]])
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("GeometricRejection.low", self.low)
        if not self.low < self.high:
            raise ConfigError(f"GeometricRejection.high: expected a ratio above low={self.low}, got {self.high!r}")

    def weigh(self, batch: TokenBatch) -> tuple[Float[Tensor, "B 1"], dict[str, Metric]]:
        """1 or 0 per row."""
        counted = self.counted(batch)
        mean = self.log_rho(batch).sum(-1, keepdim=True) / counted.sum(-1, keepdim=True).clamp(min=1)
        keep = ((mean >= math.log(self.low)) & (mean <= math.log(self.high))).to(mean.dtype)
        rows, geometric = counted.any(-1, keepdim=True), ratio_of(mean)
        return keep, {
            "geometric_rejection/kept": Sum((keep * rows).sum(), rows.sum()),
            "geometric_rejection/raw_min": masked_min(geometric, rows),
            "geometric_rejection/raw_max": masked_max(geometric, rows),
            "unscored": self.unscored_tokens(batch),
        }


@dataclass(frozen=True, kw_only=True)
class Veto(SamplerWeight):
    r"""Drop every sequence that holds a token with $\rho_t <$ `threshold`: one the policy would hardly have written.

    Args:
        threshold: smallest raw token ratio that is tolerated.
        unscored: `drop` or `keep` tokens without a sampler score.

    Metrics: `veto/kept`, and `veto/raw_min`, the smallest raw ratio.

    Raises:
        ConfigError: if `threshold` is not positive.

    Reference: When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch,
    https://richardli.xyz/rl-collapse

    >>> import torch
    >>> logps = {"old": torch.tensor([[-1.0, -12.0]]), "sampler": torch.tensor([[-1.0, -1.0]])}
    >>> Veto().factor(TokenBatch(mask=torch.ones(1, 2), logps=logps)).values
    tensor([[0., 0.]])
    """

    threshold: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("Veto.threshold", self.threshold)

    def weigh(self, batch: TokenBatch) -> tuple[Float[Tensor, "B 1"], dict[str, Metric]]:
        """1 or 0 per row."""
        log_rho = self.log_rho(batch)
        counted = self.counted(batch)
        keep = (counted & (log_rho < math.log(self.threshold))).any(-1, keepdim=True).logical_not().to(log_rho.dtype)
        rows = counted.any(-1, keepdim=True)
        return keep, {
            "veto/kept": Sum((keep * rows).sum(), rows.sum()),
            "veto/raw_min": masked_min(ratio_of(log_rho), counted),
            "unscored": self.unscored_tokens(batch),
        }


def _spread(prefix: str, ratios: Tensor, counted: Tensor, beyond: Tensor, count: Tensor) -> dict[str, Metric]:
    return {
        f"{prefix}mean": Sum(counted.sum(), count),
        f"{prefix}min": Min((ratios + beyond).amin()),
        f"{prefix}max": Max(counted.amax()),
    }
