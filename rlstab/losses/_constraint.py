"""A forward KL to the policy's own completions that satisfy a constraint."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from rlstab.batch import Column, LogProbs, Requirement, TokenBatch
from rlstab.losses._advantage import Groups, group_index, scored_rows
from rlstab.losses._checks import check_number, check_part
from rlstab.losses._metrics import Sum, Total
from rlstab.losses._parts import RolloutPart
from rlstab.losses._ratio import Ratio, TokenRatio, bounded_log, missing, scored_logp
from rlstab.losses._term import Loss, Term


@dataclass(frozen=True, kw_only=True)
class Satisfied(RolloutPart):
    r"""How far each completion's weight under the constrained policy is from its weight under the policy.

    With the share $\hat P$ of the group that satisfies the constraint $C$: $\mathbb 1_C / \hat P - 1$, and $-1$ where
    no completion of the group does.

    Args:
        threshold: a completion satisfies the constraint if its reward is above this.

    Returns of `compute`: `[N]`; 0 for rows without a finite reward, which do not count.

    Raises:
        ConfigError: if the threshold is no number.

    >>> batch = TokenBatch(
    ...     mask=torch.ones(4, 1), rewards=torch.tensor([1.0, 0.0, 0.0, 0.0]), group=torch.tensor([0, 0, 1, 1])
    ... )
    >>> Satisfied().compute(batch)
    tensor([ 1., -1., -1., -1.])
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("Satisfied.threshold", self.threshold)

    @property
    def requires(self) -> frozenset[Requirement]:
        """Rewards and groups."""
        return super().requires | {Column("rewards"), Column("group")}

    def compute(self, batch: TokenBatch) -> Float[Tensor, "N"]:
        """The difference of weights."""
        rewards, scored = batch.column("rewards"), scored_rows(batch)
        groups = Groups(group_index(batch.column("group")), scored)
        satisfies = (scored & (rewards > self.threshold)).to(rewards.dtype)
        size, found = groups.total(scored.to(rewards.dtype)), groups.total(satisfies)
        return torch.where(scored, satisfies * size / found.clamp(min=1) - 1, 0.0)


@dataclass(frozen=True, kw_only=True)
class ConstraintKL(Term):
    r"""A forward KL $\mathrm{KL}(q^* \Vert \pi)$, $q^* \propto \pi \mathbb 1_C$, to the policy under a constraint $C$.

    This is $-\log P_\pi(C)$, from groups of samples: per token $-\operatorname{sg}(w)\,(\mathbb 1_C/\hat P - 1)\log\pi$
    with the ratio $w$ to what sampled and the share $\hat P$ of the completion's group that satisfies the constraint;
    the $-1$ lowers the variance. Target: sequences, with `mean(1)`, which adds up the tokens of a completion, and on
    policy or with `SequenceRatio`.

    A share is no probability: from groups of $G$ samples the expected gradient is exactly that of
    $\sum_{k=1}^{G} (1 - P)^k / k$, the first $G$ terms of $-\log P$. A prompt that is never satisfied has no gradient
    towards it in the limit, as with any policy gradient.

    After attribute-controlled fine-tuning, which has this penalty for a constraint on whole completions and turns it
    into one on next tokens with an auxiliary model; here the completions of a group stand in for that model.

    Args:
        coef: coefficient, a number or a controller.
        mean: how the loss becomes a number.
        rows: which rows the term acts on.
        threshold: a completion satisfies the constraint if its reward is above this.
        ratio: the detached importance ratio.
        satisfied: set by the part itself, the rollout part that compares the weights.

    Metrics: `kl`, the mean of $-\log\hat P$ over groups with a completion that satisfies the constraint; `impossible`,
    the number of tokens without a ratio, which are left out.

    Raises:
        ConfigError: if the ratio is none.

    Reference: Attribute Controlled Fine-tuning for Large Language Models, https://arxiv.org/abs/2410.05559; the series:
    Maximum Likelihood Reinforcement Learning, https://arxiv.org/abs/2602.02710

    >>> from rlstab.losses import run_parts
    >>> logp = torch.full((2, 1), -1.0, requires_grad=True)
    >>> term = ConstraintKL()
    >>> batch = TokenBatch(
    ...     mask=torch.ones(2, 1), rewards=torch.tensor([1.0, 0.0]), group=torch.zeros(2).long(), logps={"policy": logp}
    ... )
    >>> loss = term.loss(run_parts(term.requires, batch))
    >>> loss.values.sum().backward(); logp.grad.flatten(), loss.metrics["kl"].value()
    (tensor([-1.,  1.]), tensor(0.6931))
    """

    threshold: float = 0.5
    ratio: Ratio = field(default_factory=TokenRatio)
    satisfied: Satisfied = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_part("ConstraintKL.ratio", self.ratio, Ratio, "TokenRatio()")
        object.__setattr__(self, "satisfied", Satisfied(threshold=self.threshold))

    @property
    def requires(self) -> frozenset[Requirement]:
        """The policy, its ratio to what sampled, and who satisfies the constraint."""
        return self.ratio.requires | {LogProbs("policy"), self.satisfied.needed}

    def loss(self, batch: TokenBatch) -> Loss:
        """The weighted log-probs."""
        difference = batch.part(self.satisfied.key)
        lost = missing(batch, self.ratio.against)
        weight = bounded_log(self.ratio.log_ratio(batch)).detach().exp()  # sg(w)
        factor = torch.where(lost, 0.0, weight * difference.unsqueeze(-1))
        constrained = (difference + 1) * batch.loss_mask.any(-1)  # 1_C / P
        surprise = torch.where(constrained > 0, constrained * (difference + 1).clamp(min=1e-9).log(), 0.0)
        metrics = {"kl": Sum(surprise.sum(), constrained.sum()), "impossible": Total(lost.count_nonzero())}
        return Loss(-factor * scored_logp(batch, "policy"), metrics)
