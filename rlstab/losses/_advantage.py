"""Advantages: what a completion earned beyond a baseline, computed over a whole generation batch."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlstab.batch import Column, LogProbs, Requirement, TokenBatch
from rlstab.losses._checks import check_choice, check_part, check_positive, check_range
from rlstab.losses._parts import RolloutPart
from rlstab.losses._ratio import missing


@dataclass(frozen=True)
class Groups:
    """Statistics over the scored rows of each group, given back to every row of the group.

    Args:
        index: number of the group of each row, `[N]`.
        scored: rows that count, `[N]`.

    >>> import torch
    >>> groups = Groups(index=torch.tensor([0, 1, 0, 1]), scored=torch.tensor([True, True, True, False]))
    >>> groups.centre(torch.tensor([1.0, 5.0, 0.0, 9.0]))
    tensor([ 0.5000,  0.0000, -0.5000,  4.0000])
    """

    index: Int[Tensor, "N"]
    scored: Bool[Tensor, "N"]

    def total(self, values: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """Sum over the scored rows of the group."""
        values = torch.where(self.scored, values, 0.0)
        return values.new_zeros(values.shape).index_add(0, self.index, values)[self.index]

    def size(self) -> Float[Tensor, "N"]:
        """How many rows of the group are scored."""
        return self.total(torch.ones_like(self.index, dtype=torch.get_default_dtype()))

    def number(self, rows: Bool[Tensor, "N"]) -> Int[Tensor, ""]:
        """How many groups have at least one of `rows`."""
        return torch.zeros_like(self.index).index_add(0, self.index, rows.long()).count_nonzero()

    def centre(self, values: Float[Tensor, "N"], weights: Float[Tensor, "N"] | None = None) -> Float[Tensor, "N"]:
        """Difference to the group's mean, or weighted mean: exactly 0 in a group whose values are all equal."""
        weights = torch.ones_like(values) if weights is None else weights
        lowest = torch.full_like(values, torch.inf).scatter_reduce(
            0, self.index, torch.where(self.scored, values, torch.inf), "amin"
        )[self.index]
        values = values - torch.where(lowest.isfinite(), lowest, 0.0)  # rounding of a common offset would not cancel
        weighted, weight = self.total(weights * values), self.total(weights)
        return values - weighted / torch.where(weight > 0, weight, 1.0)

    def normalise(self, values: Float[Tensor, "N"], *, eps: float, ddof: int) -> Float[Tensor, "N"]:
        """Difference to the group's mean over its standard deviation plus `eps`."""
        centred = self.centre(values)
        variance = self.total(centred.square()) / (self.size() - ddof).clamp(min=1)
        return centred / (variance.sqrt() + eps)


@dataclass(frozen=True, kw_only=True)
class Advantage(RolloutPart):
    """How much better than a baseline a completion was: `[N]`, or `[N, T]` per token. Abstract.

    Rows without a finite reward (NaN: it could not be scored; infinities have no mean) enter no statistic and have
    advantage 0. Rows may come in any order, and groups may differ in size.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Above(Advantage):
    ...     target: float = 0.5
    ...
    ...     def compute(self, batch: TokenBatch) -> Tensor:
    ...         return (batch.column("rewards") - self.target).nan_to_num()
    >>> Above().compute(TokenBatch(mask=torch.ones(2, 1), rewards=torch.tensor([1.0, torch.nan])))
    tensor([0.5000, 0.0000])
    """

    @property
    def requires(self) -> frozenset[Requirement]:
        """Rewards, and what parts inside read."""
        return super().requires | {Column("rewards")}


@dataclass(frozen=True, kw_only=True)
class GroupAdvantage(Advantage):
    """An advantage against the other completions of the same prompt. Abstract: `advantages` is the formula.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Share(GroupAdvantage):
    ...     def advantages(self, rewards: Tensor, groups: Groups, batch: TokenBatch) -> Tensor:
    ...         return rewards / groups.total(rewards)
    >>> batch = TokenBatch(mask=torch.ones(2, 1), rewards=torch.tensor([3.0, 1.0]), group=torch.tensor([5, 5]))
    >>> Share().compute(batch)
    tensor([0.7500, 0.2500])
    """

    @property
    def requires(self) -> frozenset[Requirement]:
        """Rewards and groups."""
        return super().requires | {Column("group")}

    def compute(self, batch: TokenBatch) -> Float[Tensor, "N"] | Float[Tensor, "N T"]:
        """The advantages; 0 where there is no reward."""
        rewards, index = batch.column("rewards"), group_index(batch.column("group"))
        scored = scored_rows(batch)
        advantages = self.advantages(torch.where(scored, rewards, 0.0), Groups(index, scored), batch)
        return torch.where(scored if advantages.dim() == 1 else scored.unsqueeze(-1), advantages, 0.0)

    @abstractmethod
    def advantages(
        self, rewards: Float[Tensor, "N"], groups: Groups, batch: TokenBatch
    ) -> Float[Tensor, "N"] | Float[Tensor, "N T"]:
        """The advantages of the scored rows; whatever stands at the others is replaced by 0."""


@dataclass(frozen=True, kw_only=True)
class GroupCenter(GroupAdvantage):
    r"""Reward minus the mean of its group: $A_i = R_i - \mu_g$, the advantage of Dr. GRPO. 0 in a group of one.

    Reference: Understanding R1-Zero-Like Training: A Critical Perspective, https://arxiv.org/abs/2503.20783

    >>> import torch
    >>> batch = TokenBatch(
    ...     mask=torch.ones(3, 1), rewards=torch.tensor([1.0, 0.0, torch.nan]), group=torch.tensor([7, 7, 7])
    ... )
    >>> GroupCenter().compute(batch)
    tensor([ 0.5000, -0.5000,  0.0000])
    """

    def advantages(self, rewards: Float[Tensor, "N"], groups: Groups, batch: TokenBatch) -> Float[Tensor, "N"]:
        """The difference to the group's mean."""
        return groups.centre(rewards)


@dataclass(frozen=True, kw_only=True)
class GroupNorm(GroupAdvantage):
    r"""Reward minus mean over standard deviation of its group: $A_i = (R_i - \mu_g)/(s_g + \epsilon)$, as in GRPO.

    Args:
        eps: $\epsilon$, added to the standard deviation; the default is TRL's (verl: 1e-6).
        ddof: 1 for the sample standard deviation, 0 for the population's.

    Reference: DeepSeekMath, https://arxiv.org/abs/2402.03300

    >>> import torch
    >>> batch = TokenBatch(mask=torch.ones(2, 1), rewards=torch.tensor([3.0, 1.0]), group=torch.tensor([0, 0]))
    >>> GroupNorm(eps=0.0).compute(batch)
    tensor([ 0.7071, -0.7071])
    """

    eps: float = 1e-4
    ddof: int = 1

    def advantages(self, rewards: Float[Tensor, "N"], groups: Groups, batch: TokenBatch) -> Float[Tensor, "N"]:
        """The standardised rewards."""
        return groups.normalise(rewards, eps=self.eps, ddof=self.ddof)


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut(GroupAdvantage):
    r"""Reward minus the mean of the others in its group, as in RLOO: $A_i = \frac{G}{G-1}(R_i - \mu_g)$.

    A group of one has no others: its advantage is 0 (verl's two forms of RLOO disagree there).

    Reference: Back to Basics: Revisiting REINFORCE Style Optimization, https://arxiv.org/abs/2402.14740

    >>> import torch
    >>> batch = TokenBatch(mask=torch.ones(3, 1), rewards=torch.tensor([1.0, 0.0, 0.0]), group=torch.tensor([0, 0, 0]))
    >>> LeaveOneOut().compute(batch)
    tensor([ 1.0000, -0.5000, -0.5000])
    """

    def advantages(self, rewards: Float[Tensor, "N"], groups: Groups, batch: TokenBatch) -> Float[Tensor, "N"]:
        """The difference to the mean of the others."""
        size = groups.size()
        return groups.centre(rewards) * size / (size - 1).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class BatchStd(GroupAdvantage):
    r"""Reward minus the mean of its group over the standard deviation of the batch: $(R_i - \mu_g)/(s + \epsilon)$.

    $s$ is the sample standard deviation of all rewards of the generation batch (TRL: `scale_rewards="batch"`).

    Args:
        eps: $\epsilon$, added to the standard deviation.

    Reference: Tricks or Traps? A Deep Dive into RL for LLM Reasoning (Lite PPO), https://arxiv.org/abs/2508.08221

    >>> import torch
    >>> batch = TokenBatch(
    ...     mask=torch.ones(4, 1), rewards=torch.tensor([2.0, 0.0, 2.0, 0.0]), group=torch.tensor([0, 0, 1, 1])
    ... )
    >>> BatchStd().compute(batch)
    tensor([ 0.8660, -0.8660,  0.8660, -0.8660])
    """

    eps: float = 1e-4

    def advantages(self, rewards: Float[Tensor, "N"], groups: Groups, batch: TokenBatch) -> Float[Tensor, "N"]:
        """The centred rewards over the batch's standard deviation."""
        _, variance = _centre(rewards, groups.scored, ddof=1)
        return groups.centre(rewards) / (variance.sqrt() + self.eps)


@dataclass(frozen=True, kw_only=True)
class OPO(GroupAdvantage):
    r"""Reward minus the length-weighted mean of its group: $A_i = R_i - \sum_j |o_j| R_j / \sum_j |o_j|$.

    The baseline of least variance where a sequence's squared gradient norm grows with its length. $|o|$ counts the
    tokens that are trained on.

    Reference: On-Policy RL with Optimal Reward Baseline, https://arxiv.org/abs/2505.23585

    >>> import torch
    >>> mask = torch.tensor([[True, True, True], [True, False, False]])
    >>> batch = TokenBatch(mask=mask, rewards=torch.tensor([1.0, 0.0]), group=torch.tensor([0, 0]))
    >>> OPO().compute(batch)
    tensor([ 0.2500, -0.7500])
    """

    def advantages(self, rewards: Float[Tensor, "N"], groups: Groups, batch: TokenBatch) -> Float[Tensor, "N"]:
        """The difference to the length-weighted mean."""
        return groups.centre(rewards, weights=batch.loss_mask.sum(-1).to(rewards.dtype))


@dataclass(frozen=True, kw_only=True)
class GFPO(GroupAdvantage):
    r"""`GroupNorm` over the `k` best completions of each group by `metric`; the others have advantage 0.

    Rejected rows stay in the count that a token mean divides by, as in the paper; TRL's former trainer dropped them.
    Ties go to the row that comes first.

    Args:
        k: how many rows of a group are kept.
        metric: `length`, the shortest completions, or `reward_per_length`, those with the most reward per token.
        eps: added to the standard deviation.
        ddof: 1 for the sample standard deviation, 0 for the population's.

    Raises:
        ConfigError: if `k` is below 1, or `metric` another word.

    Reference: Sample More to Think Less: Group Filtered Policy Optimization, https://arxiv.org/abs/2508.09726

    >>> import torch
    >>> mask = torch.tensor([[True, False], [True, True], [True, False]])
    >>> batch = TokenBatch(mask=mask, rewards=torch.tensor([1.0, 1.0, 0.0]), group=torch.tensor([0, 0, 0]))
    >>> GFPO(k=2).compute(batch)
    tensor([ 0.7070,  0.0000, -0.7070])
    """

    k: int
    metric: Literal["length", "reward_per_length"] = "length"
    eps: float = 1e-4
    ddof: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("GFPO.k", self.k, 1)
        check_choice("GFPO.metric", self.metric, ("length", "reward_per_length"))

    def advantages(self, rewards: Float[Tensor, "N"], groups: Groups, batch: TokenBatch) -> Float[Tensor, "N"]:
        """The standardised rewards of the rows that are kept."""
        length = batch.mask.sum(-1).clamp(min=1).to(rewards.dtype)
        cost = length if self.metric == "length" else -rewards / length
        kept = groups.scored & (_rank(torch.where(groups.scored, cost, torch.inf), groups.index) < self.k)
        normalised = Groups(groups.index, kept).normalise(rewards, eps=self.eps, ddof=self.ddof)
        return torch.where(kept, normalised, 0.0)


@dataclass(frozen=True, kw_only=True)
class GPGAdvantage(GroupAdvantage):
    r"""The advantage of GPG: $A_i = \alpha (R_i - \mu_g) / F_\text{norm}$ with $\alpha = B/(B - M)$.

    Of the $B$ groups in the batch, $M$ have equal rewards only and give no gradient; $\alpha$ undoes the shrinking of
    the mean that they cause (exactly, where all completions are equally long). verl divides the number of rows by the
    number of non-zero rewards instead, which is another quantity.

    Args:
        norm: $F_\text{norm}$: `none` for 1, or `std` for the group's standard deviation plus 1e-4.
        correction: whether to apply $\alpha$.

    Raises:
        ConfigError: if `norm` is another word.

    Reference: GPG: A Simple and Strong Reinforcement Learning Baseline, https://arxiv.org/abs/2504.02546

    >>> import torch
    >>> batch = TokenBatch(
    ...     mask=torch.ones(4, 1), rewards=torch.tensor([1.0, 0.0, 1.0, 1.0]), group=torch.tensor([0, 0, 1, 1])
    ... )
    >>> GPGAdvantage().compute(batch)
    tensor([ 1., -1.,  0.,  0.])
    """

    norm: Literal["none", "std"] = "none"
    correction: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("GPGAdvantage.norm", self.norm, ("none", "std"))

    def advantages(self, rewards: Float[Tensor, "N"], groups: Groups, batch: TokenBatch) -> Float[Tensor, "N"]:
        """The centred rewards, scaled."""
        centred = groups.centre(rewards)
        scaled = centred if self.norm == "none" else groups.normalise(rewards, eps=1e-4, ddof=1)
        if not self.correction:
            return scaled
        present, valid = groups.number(groups.scored), groups.number(groups.scored & (centred != 0))
        return scaled * (present / valid.clamp(min=1))


@dataclass(frozen=True, kw_only=True)
class ReinforcePPBaseline(GroupAdvantage):
    r"""Reward minus the mean of its group, whitened over all trained tokens of the batch, as in REINFORCE++-baseline.

    $A = (c - \bar c)/\sqrt{\operatorname{var}(c) + \epsilon}$ with $c_{it} = R_i - \mu_g$ at every token of row $i$
    and the sample variance.

    Args:
        eps: $\epsilon$, added to the variance.

    Reference: REINFORCE++, https://arxiv.org/abs/2501.03262

    >>> import torch
    >>> batch = TokenBatch(mask=torch.ones(2, 2), rewards=torch.tensor([1.0, 0.0]), group=torch.tensor([0, 0]))
    >>> ReinforcePPBaseline().compute(batch)
    tensor([[ 0.8660,  0.8660],
            [-0.8660, -0.8660]])
    """

    eps: float = 1e-8

    def advantages(self, rewards: Float[Tensor, "N"], groups: Groups, batch: TokenBatch) -> Float[Tensor, "N T"]:
        """The whitened differences to the group's mean."""
        tokens = batch.loss_mask & groups.scored.unsqueeze(-1)
        return _whiten(groups.centre(rewards).unsqueeze(-1).expand(batch.shape), tokens, eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class ReinforcePP(Advantage):
    r"""Return to go with a KL penalty per token, whitened over all trained tokens of the batch, as in REINFORCE++.

    $G_{it} = R_i - \beta \sum_{s \ge t} (\log\pi_\text{old} - \log\pi_\text{initial})_{is}$ (undiscounted; the penalty
    is the k1 estimate, 0 at a token that one of the two excludes), then
    $A = (G - \bar G)/\sqrt{\operatorname{var}(G) + \epsilon}$ with the sample variance.

    Args:
        kl_coef: $\beta$; with 0 no reference policy is needed.
        eps: $\epsilon$, added to the variance.

    Reference: REINFORCE++, https://arxiv.org/abs/2501.03262

    >>> import torch
    >>> batch = TokenBatch(
    ...     mask=torch.ones(1, 2),
    ...     rewards=torch.tensor([1.0]),
    ...     logps={"old": torch.tensor([[-1.0, -1.0]]), "initial": torch.tensor([[-2.0, -3.0]])},
    ... )
    >>> ReinforcePP(kl_coef=0.1).compute(batch)  # returns 0.7 and 0.8
    tensor([[-0.7071,  0.7071]])
    """

    kl_coef: float = 1e-3
    eps: float = 1e-8

    @property
    def requires(self) -> frozenset[Requirement]:
        """Rewards and, for the penalty, both log-probs."""
        penalty = {LogProbs("old"), LogProbs("initial")} if self.kl_coef else set()
        return super().requires | penalty

    def compute(self, batch: TokenBatch) -> Float[Tensor, "N T"]:
        """The whitened returns."""
        rewards = batch.column("rewards")
        tokens = batch.loss_mask & scored_rows(batch).unsqueeze(-1)
        returns = rewards.unsqueeze(-1).expand(batch.shape)
        if self.kl_coef:
            known = tokens & ~missing(batch, "old") & ~missing(batch, "initial")
            k1 = torch.where(known, batch.logp("old") - batch.logp("initial"), 0.0)
            returns = returns - self.kl_coef * k1.flip(-1).cumsum(-1).flip(-1)
        return _whiten(returns, tokens, eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class ReMax(Advantage):
    r"""Reward minus that of the greedy completion of the same prompt: $A_i = R_i - R_i^\text{greedy}$.

    The greedy rewards are the batch's `baseline`, one value per row.

    Reference: ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method, https://arxiv.org/abs/2310.10505

    >>> import torch
    >>> batch = TokenBatch(mask=torch.ones(2, 1), rewards=torch.tensor([1.0, 0.0]), baseline=torch.tensor([0.0, 1.0]))
    >>> ReMax().compute(batch)
    tensor([ 1., -1.])
    """

    @property
    def requires(self) -> frozenset[Requirement]:
        """Rewards, and those of the greedy completions."""
        return super().requires | {Column("baseline")}

    def compute(self, batch: TokenBatch) -> Float[Tensor, "N"]:
        """The difference to the greedy reward; 0 where either is not finite."""
        advantages = batch.column("rewards") - batch.column("baseline")
        return torch.where(advantages.isfinite(), advantages, 0.0)


@dataclass(frozen=True, kw_only=True)
class SigmaFilter(Advantage):
    r"""Standardise another advantage over all trained tokens of the batch and drop its outliers, as in StableReinforce.

    $z = (A - \bar A)/s$ with the population's standard deviation; $z$ where $|z| \le$ `bound`, else 0. With $N$
    equal weights $|z| \le \sqrt{N - 1}$, so the default cannot act on fewer than 11 rows: the filter sees the whole
    batch, not a group. Follows the text of the paper; its code compares $z$ with the raw mean ± 3.

    Args:
        advantage: the advantage to filter.
        bound: how many standard deviations are kept.

    Raises:
        ConfigError: if `bound` is not above 0.

    Reference: R1-Reward, https://arxiv.org/abs/2505.02835

    >>> import torch
    >>> batch = TokenBatch(mask=torch.ones(3, 1), rewards=torch.tensor([0.0, 0.0, 3.0]), group=torch.tensor([0, 0, 0]))
    >>> SigmaFilter(advantage=GroupCenter(), bound=1.0).compute(batch)
    tensor([[-0.7071],
            [-0.7071],
            [ 0.0000]])
    """

    advantage: Advantage
    bound: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_part("SigmaFilter.advantage", self.advantage, Advantage, "GroupCenter()")
        check_positive("SigmaFilter.bound", self.bound)

    def compute(self, batch: TokenBatch) -> Float[Tensor, "N T"]:
        """The standardised advantages without the outliers."""
        advantages = self.advantage.compute(batch)
        per_token = advantages if advantages.dim() == 2 else advantages.unsqueeze(-1).expand(batch.shape)
        tokens = batch.loss_mask & scored_rows(batch).unsqueeze(-1)
        centred, variance = _centre(per_token, tokens, ddof=0)
        z = centred * variance.clamp(min=1e-8).rsqrt()
        return torch.where(z.abs() <= self.bound, z, 0.0)


def scored_rows(batch: TokenBatch) -> Bool[Tensor, "N"]:
    """Rows with a finite reward."""
    return batch.column("rewards").isfinite()


def group_index(group: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
    """Groups numbered from 0, whatever their ids."""
    index: Tensor = torch.unique(group, return_inverse=True)[1]
    return index


def _centre(
    values: Float[Tensor, "*N"], mask: Bool[Tensor, "*N"], *, ddof: int
) -> tuple[Float[Tensor, "*N"], Float[Tensor, ""]]:
    """Difference to the mean where `mask` holds, 0 elsewhere, and the variance; exactly 0 if all values are equal."""
    count = mask.sum()
    values = torch.where(mask, values - torch.where(mask, values, torch.inf).amin(), 0.0)
    centred = torch.where(mask, values - values.sum() / count.clamp(min=1), 0.0)
    return centred, centred.square().sum() / (count - ddof).clamp(min=1)


def _whiten(values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], *, eps: float) -> Float[Tensor, "N T"]:
    centred, variance = _centre(values, mask, ddof=1)
    return centred * (variance + eps).rsqrt()


def _rank(cost: Float[Tensor, "N"], group: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
    """Place of each row within its group, the lowest cost first; of equal costs the first row."""
    order = cost.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    place = torch.arange(len(cost), device=cost.device)
    first = torch.searchsorted(group[order].contiguous(), group[order].contiguous())
    return torch.empty_like(place).scatter(0, order, place - first)
