"""RL beside an expert: prefixes of rollouts, demonstrations weighed by advantages, own rollouts by outcome."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlstab.batch import Column, LogProbs, Requirement, TokenBatch, VocabStat
from rlstab.losses._checks import check_number, check_positive, check_range
from rlstab.losses._metrics import Metric, Sum, Total, token_mean
from rlstab.losses._parts import StepStatistic
from rlstab.losses._ratio import masked_row_mean, missing, scored_logp
from rlstab.losses._surrogate import Surrogate
from rlstab.losses._term import Loss, Term
from rlstab.losses._weight import Factor, Weight, masked_quantile

#: Key of the tokens that an expert wrote, among the parts of a batch.
EXPERT_PREFIX = "expert prefix"


def expert_prefix(batch: TokenBatch) -> Bool[Tensor, "B T"]:
    """The tokens of the loss that an expert wrote, where rollouts began with them; none where nobody has said so.

    Trainers that let rollouts begin with an expert's tokens leave the mask as the part `expert prefix`.

    >>> batch = TokenBatch(mask=torch.ones(1, 2), parts={"expert prefix": torch.tensor([[True, False]])})
    >>> expert_prefix(batch)
    tensor([[ True, False]])
    """
    if EXPERT_PREFIX not in batch.parts:
        return torch.zeros_like(batch.loss_mask)
    return batch.part(EXPERT_PREFIX).bool() & batch.loss_mask


@dataclass(frozen=True, kw_only=True)
class PrefixEntropyThreshold(StepStatistic):
    """The entropy above which the `fraction` most uncertain of an expert's tokens lie, over an optimizer step.

    Args:
        fraction: share of the expert's tokens above the threshold.

    >>> entropy, prefix = torch.tensor([[0.1, 0.5, 0.9]]), torch.tensor([[True, True, False]])
    >>> batch = TokenBatch(mask=torch.ones(1, 3), vocab={"entropy": entropy}, parts={"expert prefix": prefix})
    >>> PrefixEntropyThreshold(fraction=0.5).compute(batch)
    tensor(0.3000)
    """

    fraction: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("PrefixEntropyThreshold.fraction", self.fraction, 0, 1)

    @property
    def requires(self) -> frozenset[Requirement]:
        """Entropies."""
        return super().requires | {VocabStat("entropy")}

    def compute(self, batch: TokenBatch) -> Float[Tensor, ""]:
        """The quantile at `1 - fraction`; 0 without such tokens."""
        entropy = batch.statistic("entropy").detach()
        return masked_quantile(entropy, expert_prefix(batch), 1 - self.fraction).nan_to_num(nan=0.0)


@dataclass(frozen=True, kw_only=True)
class PrefixEntropy(Weight):
    r"""Prefix-RFT's filter: of the expert's tokens only the most uncertain are trained on; the policy's own all stay.

    Args:
        fraction: share of the expert's tokens that stay, ranked over the whole optimizer step.
        threshold: set by the part itself, the step statistic that it compares with.

    Metrics: `prefix_entropy/kept`, the share of the tokens that stay.

    Raises:
        ConfigError: if `fraction` is not in [0, 1].

    Reference: Prefix-RFT: Blending Supervised and Reinforcement Fine-Tuning with Prefix Sampling,
    https://arxiv.org/abs/2507.01679

    >>> entropy, prefix = torch.tensor([[0.1, 0.5, 0.9]]), torch.tensor([[True, True, False]])
    >>> batch = TokenBatch(mask=torch.ones(1, 3), vocab={"entropy": entropy}, parts={"expert prefix": prefix})
    >>> from rlstab.losses import run_parts
    >>> weight = PrefixEntropy(fraction=0.5)
    >>> weight.factor(run_parts(weight.requires, batch)).values
    tensor([[0., 1., 1.]])
    """

    fraction: float = 0.2
    threshold: PrefixEntropyThreshold = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_range("PrefixEntropy.fraction", self.fraction, 0, 1)
        object.__setattr__(self, "threshold", PrefixEntropyThreshold(fraction=self.fraction))

    @property
    def requires(self) -> frozenset[Requirement]:
        """Entropies, and their threshold."""
        return super().requires | {VocabStat("entropy"), self.threshold.needed}

    def factor(self, batch: TokenBatch) -> Factor:
        """0 at an expert's tokens below the threshold, else 1."""
        prefix, entropy = expert_prefix(batch), batch.statistic("entropy").detach()  # ranks only: no gradient
        keep = (~prefix | (entropy >= batch.part(self.threshold.key))).to(entropy.dtype)
        return Factor(keep, {"prefix_entropy/kept": token_mean(keep, batch.token_weight)})


@dataclass(frozen=True, kw_only=True)
class DemonstrationSurrogate(Surrogate):
    r"""SRFT's policy loss on demonstrations among the rollouts of a group: $-A\,\pi$, without clip.

    It is the importance-weighted surrogate with the expert's probability taken as 1; the gradient is $-A\,\pi$.

    Args:
        rows: which rows hold demonstrations.
        weights: detached factors.

    Metrics: `probability`, the mean of $\pi$; `impossible`, the number of tokens left out because the policy gives them
    probability 0.

    Reference: SRFT: A Single-Stage Method with Supervised and Reinforcement Fine-Tuning for Reasoning,
    https://arxiv.org/abs/2506.19767

    >>> logp = torch.tensor([[0.25]]).log().requires_grad_()
    >>> batch = TokenBatch(mask=torch.ones(1, 1), advantages=torch.tensor([2.0]), logps={"policy": logp})
    >>> DemonstrationSurrogate().loss(batch).values.sum().backward(); logp.grad
    tensor([[-0.5000]])
    """

    rows: str = "demonstration"

    def surrogate(self, batch: TokenBatch) -> tuple[Float[Tensor, "B T"], dict[str, Metric]]:
        """The probabilities, weighted with the advantages."""
        probability = scored_logp(batch, "policy").exp()
        return -batch.token_advantages() * probability, {"probability": token_mean(probability, batch.token_weight)}


@dataclass(frozen=True, kw_only=True)
class OutcomeLikelihood(Term):
    r"""SRFT's loss on one's own rollouts: $-c\,\operatorname{sg}(e^{H}) \log\pi$ where they are right, else $\log\pi$.

    $H$ is the mean entropy of the policy over the trained tokens of the row: what was found while it was uncertain is
    learnt faster. Rows without a reward, and tokens to which the policy gives probability 0, add nothing.

    Args:
        scale: $c$.
        right: the reward from which on a rollout is right.

    Metrics: `right`, the share of rows that are; `weight`, their mean $c\,e^{H}$; `impossible`, the number of tokens of
    probability 0.

    Raises:
        ConfigError: if `scale` is not positive, or `right` no number.

    Reference: SRFT: A Single-Stage Method with Supervised and Reinforcement Fine-Tuning for Reasoning,
    https://arxiv.org/abs/2506.19767

    >>> logp = torch.full((2, 1), -1.0).requires_grad_()
    >>> batch = TokenBatch(
    ...     mask=torch.ones(2, 1),
    ...     rewards=torch.tensor([1.0, 0.0]),
    ...     logps={"policy": logp},
    ...     vocab={"entropy": torch.zeros(2, 1)},
    ... )
    >>> OutcomeLikelihood().loss(batch).values.sum().backward(); logp.grad.flatten()
    tensor([-0.1000,  1.0000])
    """

    scale: float = 0.1
    right: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("OutcomeLikelihood.scale", self.scale)
        check_number("OutcomeLikelihood.right", self.right)

    @property
    def requires(self) -> frozenset[Requirement]:
        """Policy, entropies and rewards."""
        return super().requires | {LogProbs("policy"), VocabStat("entropy"), Column("rewards")}

    def loss(self, batch: TokenBatch) -> Loss:
        """The log-probs, up or down by outcome."""
        rewards, impossible = batch.column("rewards").unsqueeze(-1), missing(batch, "policy")
        known, right = rewards.isfinite(), rewards >= self.right
        entropy = masked_row_mean(batch.statistic("entropy").detach(), batch.token_weight)  # sg: a weight
        weight = self.scale * entropy.exp()
        sign = torch.where(right, -weight, torch.ones_like(weight)) * known
        values = torch.where(impossible, 0.0, sign * scored_logp(batch, "policy"))
        chosen = (right & known).to(weight.dtype)
        metrics: dict[str, Metric] = {
            "right": Sum(chosen.sum(), known.sum()),
            "weight": Sum((weight * chosen).sum(), chosen.sum()),
            "impossible": Total(impossible.sum()),
        }
        return Loss(values, metrics)
