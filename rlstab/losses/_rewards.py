"""Rewards on the way to advantages: length penalties, groups that teach nothing, trust in a reward model."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlstab.batch import Column, Requirement, TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses._advantage import Advantage, GroupNorm, Groups, group_index, scored_rows
from rlstab.losses._checks import check_choice, check_number, check_part, check_positive, check_range
from rlstab.losses._metrics import token_mean
from rlstab.losses._parts import RolloutPart
from rlstab.losses._weight import Factor, Weight


def soft_overlong(length: Float[Tensor, "N"], *, longest: int, cache: int) -> Float[Tensor, "N"]:
    r"""DAPO's penalty of long completions: 0 up to $L - L_c$ tokens, $(L - L_c - n)/L_c$ up to $L$, -1 beyond.

    Args:
        length: $n$, tokens of each completion, `[N]`.
        longest: $L$, 20480 in the paper.
        cache: $L_c$, over how many tokens the penalty grows, 4096 in the paper.

    Returns:
        What to add to the rewards, `[N]`.

    Raises:
        ConfigError: unless 0 < cache <= longest.

    Reference: DAPO, https://arxiv.org/abs/2503.14476

    >>> soft_overlong(torch.tensor([6.0, 9.0, 12.0]), longest=10, cache=4)
    tensor([ 0.0000, -0.7500, -1.0000])
    """
    if not 0 < cache <= longest:
        raise ConfigError(
            f"soft_overlong.cache: expected a number of tokens from 1 to longest={longest}, got {cache!r}"
        )
    return ((longest - cache - length) / cache).clamp(-1, 0)


@dataclass(frozen=True, kw_only=True)
class SoftOverlong(Advantage):
    r"""Another advantage, of rewards from which DAPO's penalty of long completions has been taken (`soft_overlong`).

    Args:
        advantage: the advantage of the penalised rewards.
        longest: $L$, the length from which the whole penalty of 1 is due: the limit of a completion.
        cache: $L_c$, over how many tokens before that it grows.

    Raises:
        ConfigError: unless 0 < cache <= longest.

    Reference: DAPO, https://arxiv.org/abs/2503.14476

    >>> from rlstab.losses import GroupCenter
    >>> batch = TokenBatch(
    ...     mask=torch.tensor([[True, True], [True, False]]), rewards=torch.ones(2), group=torch.tensor([0, 0])
    ... )
    >>> SoftOverlong(advantage=GroupCenter(), longest=2, cache=1).compute(batch)  # rewards 0 and 1
    tensor([-0.5000,  0.5000])
    """

    longest: int
    cache: int
    advantage: Advantage = field(default_factory=GroupNorm)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_part("SoftOverlong.advantage", self.advantage, Advantage, "GroupNorm()")
        soft_overlong(torch.zeros(1), longest=self.longest, cache=self.cache)

    def compute(self, batch: TokenBatch) -> Float[Tensor, "N"] | Float[Tensor, "N T"]:
        """The advantages of the penalised rewards."""
        rewards = batch.column("rewards")
        length = batch.mask.sum(-1).to(rewards.dtype)
        penalty = soft_overlong(length, longest=self.longest, cache=self.cache)
        return self.advantage.compute(batch.replace(rewards=rewards + penalty))


@dataclass(frozen=True, kw_only=True)
class MixedGroups(RolloutPart):
    r"""Which completions belong to a group whose rewards differ, and by how much they outweigh the rest.

    Groups with equal rewards have no advantage and no gradient, but stay in the count that a mean divides by. Those
    that remain get the factor that makes it a mean over them alone, as if only such groups had been sampled.

    Args:
        unit: what the mean counts, `token` or `sequence`.

    Returns of `compute`: `[N]`, the factor in a mixed group and 0 elsewhere.

    Raises:
        ConfigError: for another unit.

    >>> batch = TokenBatch(
    ...     mask=torch.ones(4, 1), rewards=torch.tensor([1.0, 0.0, 1.0, 1.0]), group=torch.tensor([0, 0, 1, 1])
    ... )
    >>> MixedGroups().compute(batch)
    tensor([2., 2., 0., 0.])
    """

    unit: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("MixedGroups.unit", self.unit, ("token", "sequence"))

    @property
    def requires(self) -> frozenset[Requirement]:
        """Rewards and groups."""
        return super().requires | {Column("rewards"), Column("group")}

    def compute(self, batch: TokenBatch) -> Float[Tensor, "N"]:
        """The factors."""
        groups = Groups(group_index(batch.column("group")), scored_rows(batch))
        centred = groups.centre(torch.where(groups.scored, batch.column("rewards"), 0.0))
        mixed = groups.total((centred != 0).to(centred.dtype)) > 0
        counted = batch.row_tokens if self.unit == "token" else torch.ones_like(batch.row_tokens)
        scored = torch.where(groups.scored, counted, 0.0)
        kept = torch.where(mixed, scored, 0.0).sum()
        return torch.where(mixed & groups.scored, scored.sum() / kept.clamp(min=1), 0.0)


@dataclass(frozen=True, kw_only=True)
class MixedGroupsOnly(Weight):
    r"""Train on groups whose rewards differ, and average over them alone: DAPO's dynamic sampling without resampling.

    Resampling also fills the batch up; that is for the trainer that samples.

    Args:
        unit: what the mean of the surrogate counts, `token` or `sequence`.
        groups: set by the part itself, the rollout part that finds the groups.

    Metrics: `mixed_groups_only/kept`, the share of the tokens that stay.

    Reference: DAPO (dynamic sampling), https://arxiv.org/abs/2503.14476

    >>> from rlstab.losses import run_parts
    >>> batch = TokenBatch(
    ...     mask=torch.ones(4, 1), rewards=torch.tensor([1.0, 0.0, 1.0, 1.0]), group=torch.tensor([0, 0, 1, 1])
    ... )
    >>> weight = MixedGroupsOnly()
    >>> weight.factor(run_parts(weight.requires, batch)).values.flatten()
    tensor([2., 2., 0., 0.])
    """

    unit: Literal["token", "sequence"] = "token"
    groups: MixedGroups = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", MixedGroups(unit=self.unit))

    @property
    def requires(self) -> frozenset[Requirement]:
        """The factors."""
        return frozenset({self.groups.needed})

    def factor(self, batch: TokenBatch) -> Factor:
        """The factor of each row."""
        values = batch.part(self.groups.key).unsqueeze(-1)
        kept = (values > 0).to(batch.token_weight.dtype).expand(batch.shape)
        return Factor(values, {"mixed_groups_only/kept": token_mean(kept, batch.token_weight)})


@dataclass(frozen=True, kw_only=True)
class Unsolved(RolloutPart):
    r"""Which completions still need a teacher, by their rewards: KDRL's reward-guided masking.

    Args:
        level: `response`, those that are wrong themselves, or `group`, those in whose group none is right.
        threshold: a completion is right if its reward is above this.

    Returns of `compute`: `[N]`, 1 or 0; 0 for rows without a finite reward.

    Raises:
        ConfigError: for another level, or if the threshold is no number.

    Reference: KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and Reinforcement Learning,
    https://arxiv.org/abs/2506.02208

    >>> batch = TokenBatch(
    ...     mask=torch.ones(4, 1), rewards=torch.tensor([1.0, 0.0, 0.0, 0.0]), group=torch.tensor([0, 0, 1, 1])
    ... )
    >>> Unsolved().compute(batch), Unsolved(level="group").compute(batch)
    (tensor([0., 1., 1., 1.]), tensor([0., 0., 1., 1.]))
    """

    level: Literal["response", "group"] = "response"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("Unsolved.level", self.level, ("response", "group"))
        check_number("Unsolved.threshold", self.threshold)

    @property
    def requires(self) -> frozenset[Requirement]:
        """Rewards and, for groups, these."""
        return super().requires | {Column("rewards")} | ({Column("group")} if self.level == "group" else set())

    def compute(self, batch: TokenBatch) -> Float[Tensor, "N"]:
        """1 where a teacher is needed."""
        rewards, scored = batch.column("rewards"), scored_rows(batch)
        right = (scored & (rewards > self.threshold)).to(rewards.dtype)
        if self.level == "group":
            right = Groups(group_index(batch.column("group")), scored).total(right)
        return ((right == 0) & scored).to(rewards.dtype)


@dataclass(frozen=True, kw_only=True)
class UnsolvedOnly(Weight):
    r"""Keep the completions that still need a teacher: those of `Unsolved`.

    Args:
        level: `response` or `group`.
        threshold: a completion is right if its reward is above this.
        unsolved: set by the part itself, the rollout part that finds them.

    Metrics: `unsolved_only/kept`, the share of the tokens that stay.

    Reference: KDRL, https://arxiv.org/abs/2506.02208

    >>> from rlstab.losses import run_parts
    >>> batch = TokenBatch(mask=torch.ones(2, 1), rewards=torch.tensor([1.0, 0.0]))
    >>> weight = UnsolvedOnly()
    >>> weight.factor(run_parts(weight.requires, batch)).values.flatten()
    tensor([0., 1.])
    """

    level: Literal["response", "group"] = "response"
    threshold: float = 0.5
    unsolved: Unsolved = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "unsolved", Unsolved(level=self.level, threshold=self.threshold))

    @property
    def requires(self) -> frozenset[Requirement]:
        """Which completions are unsolved."""
        return frozenset({self.unsolved.needed})

    def factor(self, batch: TokenBatch) -> Factor:
        """1 or 0 per row."""
        keep = batch.part(self.unsolved.key).unsqueeze(-1)
        kept = keep.to(batch.token_weight.dtype).expand(batch.shape)
        return Factor(keep, {"unsolved_only/kept": token_mean(kept, batch.token_weight)})


def thinking_trust(
    outcome: Float[Tensor, "N"], thinking: Float[Tensor, "N"], group: Int[Tensor, "N"], *, threshold: float = 0.5
) -> Float[Tensor, "N"]:
    r"""Trust-GRPO's trust in a reward of the thinking: 1, or less in groups where it prefers wrong completions.

    $\gamma = 1$ if $\mu_c \ge \mu_w$, else $e^{\mu_c - \mu_w}$, with the mean thinking reward $\mu_c$ of a group's
    completions of outcome at least `threshold`, and $\mu_w$ of its others. 1 in a group that has only one kind.

    Args:
        outcome: reward of the outcome, `[N]`; rows where it is not finite count as neither.
        thinking: reward of the thinking, `[N]`, in [0, 1].
        group: id of the prompt, `[N]`.
        threshold: outcome from which a completion is right.

    Returns:
        $\gamma$ of each row's group, `[N]`.

    Reference: SophiaVL-R1 (Trust-GRPO), https://arxiv.org/abs/2505.17018

    >>> outcome, thinking = torch.tensor([1.0, 0.0]), torch.tensor([0.4, 0.9])
    >>> thinking_trust(outcome, thinking, torch.tensor([0, 0]))  # exp(-0.5)
    tensor([0.6065, 0.6065])
    """
    index, known = group_index(group), outcome.isfinite() & thinking.isfinite()
    means = []
    for kind in (known & (outcome >= threshold), known & (outcome < threshold)):
        chosen = Groups(index, kind)
        count = chosen.total(torch.ones_like(outcome))
        means.append(torch.where(count > 0, chosen.total(thinking) / count.clamp(min=1), torch.nan))
    return (means[0] - means[1]).clamp(max=0).exp().nan_to_num(nan=1.0)


def trusted_rewards(
    outcome: Float[Tensor, "N"],
    thinking: Float[Tensor, "N"],
    group: Int[Tensor, "N"],
    *,
    step: int,
    alpha: float = 0.3,
    decay: float = 500.0,
    threshold: float = 0.5,
    skip_uniform_groups: bool = False,
) -> Float[Tensor, "N"]:
    r"""Trust-GRPO's rewards: $R_i = R^o_i + \gamma\,\alpha\,e^{-s/T} R^t_i$, for `GroupNorm` to make advantages of.

    The weight of the thinking reward falls with its trust (`thinking_trust`) and with the steps. Follows the text; the
    released code gives the thinking reward only to outcomes of at least 0.2, which leaves $\mu_w$ near 0 and $\gamma$
    near 1, and has `decay=500` where the paper has the steps of the run.

    Args:
        outcome: $R^o$, `[N]`.
        thinking: $R^t$, `[N]`, in [0, 1].
        group: id of the prompt, `[N]`.
        step: $s$, optimizer steps so far.
        alpha: $\alpha$.
        decay: $T$.
        threshold: outcome from which a completion is right.
        skip_uniform_groups: no thinking reward in groups whose outcomes are all at least 0.9 or all at most 0.1, as in
            the released code.

    Returns:
        The rewards, `[N]`; those of outcomes that are not finite stay so.

    Raises:
        ConfigError: if `decay` is not positive, or `step` negative.

    Reference: SophiaVL-R1 (Trust-GRPO), https://arxiv.org/abs/2505.17018

    >>> outcome, thinking = torch.tensor([1.0, 0.0]), torch.tensor([0.9, 0.4])
    >>> trusted_rewards(outcome, thinking, torch.tensor([0, 0]), step=0)
    tensor([1.2700, 0.1200])
    """
    check_positive("trusted_rewards.decay", decay)
    check_range("trusted_rewards.step", step, 0)
    trust = thinking_trust(outcome, thinking, group, threshold=threshold)
    weight = alpha * trust * torch.exp(torch.tensor(-step / decay, dtype=outcome.dtype))
    if skip_uniform_groups:
        groups = Groups(group_index(group), outcome.isfinite())
        high, low = (groups.total(kind.to(outcome.dtype)) for kind in (outcome >= 0.9, outcome <= 0.1))
        size = groups.size()
        weight = torch.where((high == size) | (low == size), 0.0, weight)
    return outcome + weight * thinking.nan_to_num()
