"""Imitation: losses on the tokens of demonstrations, which differ in how they weigh a token."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlstab.batch import LogProbs, Requirement, TokenBatch, VocabStat
from rlstab.errors import ConfigError
from rlstab.losses._checks import check_choice, check_positive, check_range
from rlstab.losses._clipped import clipped_surrogate
from rlstab.losses._metrics import Metric, Total, token_mean
from rlstab.losses._ratio import masked_row_mean, missing, ratio_of, scored_logp
from rlstab.losses._surrogate import Surrogate, clip_share
from rlstab.losses._term import Loss, Term


@dataclass(frozen=True, kw_only=True)
class Imitation(Term):
    r"""$-\operatorname{sg}(w) \log\pi$ on the tokens of demonstrations, with gradient $-w$. Abstract: `weight` is $w$.

    Tokens to which the policy gives probability 0 count as very unlikely, and have no gradient.

    Args:
        rows: which rows hold demonstrations.

    Metrics: `weight`, the mean of $w$; `nll`, the mean of $-\log\pi$, in nats; `impossible`, the number of tokens of
    probability 0, which `nll` leaves out.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Unlikely(Imitation):
    ...     def weight(self, logp: Tensor, batch: TokenBatch) -> Tensor:
    ...         return 1 - logp.exp()
    >>> batch = TokenBatch(mask=torch.ones(1, 1), logps={"policy": torch.tensor([[0.5]]).log()})
    >>> Unlikely().loss(batch).values
    tensor([[0.3466]])
    """

    rows: str = "demonstration"

    @property
    def requires(self) -> frozenset[Requirement]:
        """The policy."""
        return super().requires | {LogProbs("policy")}

    @abstractmethod
    def weight(self, logp: Float[Tensor, "B T"], batch: TokenBatch) -> Float[Tensor, "B #T"]:
        """The weight of each token, from its log-prob without gradient."""

    def loss(self, batch: TokenBatch) -> Loss:
        """The weighted negative log-probs."""
        logp, impossible = scored_logp(batch, "policy"), missing(batch, "policy")
        weight = self.weight(logp.detach(), batch)  # sg(w)
        metrics: dict[str, Metric] = {
            "weight": token_mean(weight, batch.token_weight),
            "nll": token_mean(-logp, batch.loss_mask & ~impossible),
            "impossible": Total(impossible.sum()),
        }
        return Loss(-weight * logp, metrics)


@dataclass(frozen=True, kw_only=True)
class SFT(Imitation):
    r"""Supervised fine-tuning: $-\log\pi$, with gradient $-1$ at every token.

    >>> batch = TokenBatch(mask=torch.ones(1, 1), logps={"policy": torch.tensor([[-2.0]])})
    >>> SFT().loss(batch).values
    tensor([[2.]])
    """

    def weight(self, logp: Float[Tensor, "B T"], batch: TokenBatch) -> Float[Tensor, "B T"]:
        """1."""
        return torch.ones_like(logp)


@dataclass(frozen=True, kw_only=True)
class DFT(Imitation):
    r"""Dynamic fine-tuning: $-\operatorname{sg}(p) \log\pi$, with gradient $-p$: unlikely tokens hardly count.

    With `0.1 * ForwardKL(reference="initial", form="exact", rows="demonstration")` beside it, this is ASFT.

    Reference: On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification,
    https://arxiv.org/abs/2508.05629

    >>> logp = torch.tensor([[0.25]]).log().requires_grad_()
    >>> DFT().loss(TokenBatch(mask=torch.ones(1, 1), logps={"policy": logp})).values.sum().backward(); logp.grad
    tensor([[-0.2500]])
    """

    def weight(self, logp: Float[Tensor, "B T"], batch: TokenBatch) -> Float[Tensor, "B T"]:
        """The probability."""
        return logp.exp()


@dataclass(frozen=True, kw_only=True)
class TrSFT(Imitation):
    r"""Trust-region SFT: $-\operatorname{sg}(\min(1, p/\alpha)) \log\pi$: SFT, less of it below probability $\alpha$.

    SFT's gradient in the probability, $1/p$, becomes $1/\max(p, \alpha)$. $\alpha \to 0$ is SFT and $\alpha = 1$ DFT;
    in between rare demonstrated tokens are dropped and the kept modes keep their proportions.

    Args:
        alpha: $\alpha$; the paper's is 0.1 (one sentence of its appendix says 1).
        form: `weighted` as above, or `surrogate`, the released code's $-p/\max(\operatorname{sg} p, \alpha)$: the same
            gradient, with a value between -1 and 0.

    Raises:
        ConfigError: unless 0 < alpha <= 1.

    Reference: Trust-Region Adaptive Policy Optimization (TRAPO), https://arxiv.org/abs/2512.17636

    >>> logp = torch.tensor([[0.05, 0.4]]).log().requires_grad_()
    >>> TrSFT().loss(TokenBatch(mask=torch.ones(1, 2), logps={"policy": logp})).values.sum().backward(); logp.grad
    tensor([[-0.5000, -1.0000]])
    """

    alpha: float = 0.1
    form: Literal["weighted", "surrogate"] = "weighted"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("TrSFT.alpha", self.alpha)
        check_range("TrSFT.alpha", self.alpha, 0, 1)
        check_choice("TrSFT.form", self.form, ("weighted", "surrogate"))

    def weight(self, logp: Float[Tensor, "B T"], batch: TokenBatch) -> Float[Tensor, "B T"]:
        """The share of SFT's gradient that is kept."""
        return (logp.exp() / self.alpha).clamp(max=1)

    def loss(self, batch: TokenBatch) -> Loss:
        """The weighted negative log-probs, or the surrogate of the same gradient."""
        values, metrics = super().loss(batch)
        if self.form == "surrogate":
            kept = self.weight(scored_logp(batch, "policy").detach(), batch)
            values = values - values.detach() - kept
        return Loss(values, metrics)


@dataclass(frozen=True, kw_only=True)
class ImportanceSFT(Imitation):
    r"""iw-SFT: demonstrations weighted by how much likelier the policy makes them than the reference does.

    Sequence: $w = \operatorname{clip}(\exp(\tau\,\overline{\log\pi - \log\text{ref}}), \min, \max)$ with the mean over
    the row's tokens. Token: $w_t = \operatorname{clip}(\pi/\text{ref}, \min, \max)$.

    Args:
        level: `sequence` or `token`.
        tau: $\tau$, for sequences.
        min: smallest weight; None takes the released code's, 0 for sequences and 0.2 for tokens.
        max: largest weight; None takes the released code's, 16 for sequences and 1.8 for tokens.
        reference: source of the reference policy.

    Raises:
        ConfigError: for another level, or an empty range of weights.

    Reference: Supervised Fine Tuning on Curated Data is Reinforcement Learning (and can be improved),
    https://arxiv.org/abs/2507.12856

    >>> logps = {"policy": torch.tensor([[0.9]]).log(), "initial": torch.tensor([[0.6]]).log()}
    >>> batch = TokenBatch(mask=torch.ones(1, 1), logps=logps)
    >>> ImportanceSFT(level="token").loss(batch).metrics["weight"].value()
    tensor(1.5000)
    """

    level: Literal["sequence", "token"] = "sequence"
    tau: float = 2.0
    min: float | None = None
    max: float | None = None
    reference: str = "initial"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("ImportanceSFT.level", self.level, ("sequence", "token"))
        check_positive("ImportanceSFT.tau", self.tau)
        low, high = self.bounds
        if not 0 <= low < high:
            raise ConfigError(f"ImportanceSFT.min: expected a weight in [0, max={high}), got {low!r}")

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest weight."""
        low, high = (0.0, 16.0) if self.level == "sequence" else (0.2, 1.8)
        return low if self.min is None else self.min, high if self.max is None else self.max

    @property
    def requires(self) -> frozenset[Requirement]:
        """Policy and reference."""
        return super().requires | {LogProbs(self.reference)}

    def weight(self, logp: Float[Tensor, "B T"], batch: TokenBatch) -> Float[Tensor, "B #T"]:
        """The clipped ratio to the reference."""
        log_ratio = torch.where(missing(batch, self.reference), 0.0, logp - batch.logp(self.reference))
        if self.level == "sequence":
            log_ratio = self.tau * masked_row_mean(log_ratio, batch.token_weight)
        return ratio_of(log_ratio).clamp(*self.bounds)


@dataclass(frozen=True, kw_only=True)
class CHORD(Imitation):
    r"""CHORD-$\phi$: $-\operatorname{sg}(p (1 - p)) \log\pi$: what is certain and what is hopeless counts little.

    CHORD mixes it with the policy's loss as $(1 - \mu)\,\text{GRPO} + \mu\,\text{this}$; $\mu$ is a coefficient, such
    as `Cosine(start=0.9, end=0.05, steps=200)`.

    Reference: On-Policy RL Meets Off-Policy Experts (CHORD), https://arxiv.org/abs/2508.11408

    >>> batch = TokenBatch(mask=torch.ones(1, 1), logps={"policy": torch.tensor([[0.4]]).log()})
    >>> CHORD().loss(batch).metrics["weight"].value()
    tensor(0.2400)
    """

    def weight(self, logp: Float[Tensor, "B T"], batch: TokenBatch) -> Float[Tensor, "B T"]:
        """The variance of the choice of this token."""
        return logp.exp() * -torch.expm1(logp)


@dataclass(frozen=True, kw_only=True)
class EntropySFT(Imitation):
    r"""SRFT's supervised loss: $-c\,\operatorname{sg}(e^{-H}) \log\pi$, less where the policy is uncertain.

    $H$ is the mean entropy of the policy over the trained tokens of the row. The paper's second weight, $0.1\,e^{H}$ on
    its own correct rollouts, is $c = 0.1$ with `sign=1`.

    Args:
        scale: $c$.
        sign: -1 for $e^{-H}$, 1 for $e^H$.

    Raises:
        ConfigError: unless `scale` is positive and `sign` is 1 or -1.

    Reference: SRFT: A Single-Stage Method with Supervised and Reinforcement Fine-Tuning for Reasoning,
    https://arxiv.org/abs/2506.19767

    >>> entropy = torch.tensor([[0.7]])
    >>> batch = TokenBatch(mask=torch.ones(1, 1), logps={"policy": torch.tensor([[-1.0]])}, vocab={"entropy": entropy})
    >>> EntropySFT().loss(batch).values
    tensor([[0.2483]])
    """

    scale: float = 0.5
    sign: Literal[-1, 1] = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("EntropySFT.scale", self.scale)
        if self.sign not in (-1, 1):
            raise ConfigError(f"EntropySFT.sign: expected -1 or 1, got {self.sign!r}")

    @property
    def requires(self) -> frozenset[Requirement]:
        """Policy and entropies."""
        return super().requires | {VocabStat("entropy")}

    def weight(self, logp: Float[Tensor, "B T"], batch: TokenBatch) -> Float[Tensor, "B 1"]:
        """The exponential of the row's entropy."""
        entropy = masked_row_mean(batch.statistic("entropy").detach(), batch.token_weight)  # sg: a weight
        return self.scale * (self.sign * entropy).exp()


@dataclass(frozen=True, kw_only=True)
class PSFT(Term):
    r"""Proximal SFT: PPO's surrogate with advantage 1 on demonstrations, $-\min(r, 1 + \text{high})$.

    A token that the policy has already made likelier than the snapshot by the clip has no gradient; the others have
    $-r$. The snapshot is *old*, moved every few mini-batches.

    Args:
        high: how far above 1 the ratio counts. (The lower clip cannot act at a positive advantage.)
        rows: which rows hold demonstrations.

    Metrics: `clipped`, the share of tokens without gradient; `impossible`, the number of tokens that the snapshot gives
    probability 0, which are left out.

    Raises:
        ConfigError: if `high` is negative.

    Reference: Proximal Supervised Fine-Tuning, https://arxiv.org/abs/2508.17784

    >>> logps = {"policy": torch.tensor([[0.9]]).log(), "old": torch.tensor([[0.6]]).log()}
    >>> PSFT().loss(TokenBatch(mask=torch.ones(1, 1), logps=logps)).values
    tensor([[-1.2800]])
    """

    high: float = 0.28
    rows: str = "demonstration"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("PSFT.high", self.high, 0)

    @property
    def inert_on_policy(self) -> tuple[str, ...]:
        """The clip."""
        return ("the clip of PSFT",)

    @property
    def requires(self) -> frozenset[Requirement]:
        """Policy and snapshot."""
        return super().requires | {LogProbs("policy"), LogProbs("old")}

    def loss(self, batch: TokenBatch) -> Loss:
        """The clipped ratios."""
        left_out = missing(batch, "old")
        ratio = ratio_of(torch.where(left_out, 0.0, batch.logp("policy") - batch.logp("old")))
        values = clipped_surrogate(ratio, torch.ones_like(ratio), low=1.0, high=self.high)
        clipped = clip_share((ratio.detach() > 1 + self.high) & ~left_out, batch)
        return Loss(torch.where(left_out, 0.0, values), {"clipped": clipped, "impossible": Total(left_out.sum())})


@dataclass(frozen=True, kw_only=True)
class PolicyShaping(Surrogate):
    r"""LUFFY's loss on demonstrations among the rollouts of a group: $-A\,p / (p + \gamma)$, without ratio or clip.

    The gradient, $-A \gamma p / (p + \gamma)^2$, is largest at $p = \gamma$: unlikely tokens are learnt from, likely
    ones are left alone.

    Args:
        gamma: $\gamma$.
        rows: which rows hold demonstrations.
        weights: detached factors.

    Metrics: `shaped`, the mean of $p/(p + \gamma)$; `impossible`, the number of tokens left out because the policy
    gives them probability 0.

    Raises:
        ConfigError: if `gamma` is not positive.

    Reference: Learning to Reason under Off-Policy Guidance (LUFFY), https://arxiv.org/abs/2504.14945

    >>> logp = torch.tensor([[0.1]]).log().requires_grad_()
    >>> batch = TokenBatch(mask=torch.ones(1, 1), advantages=torch.ones(1), logps={"policy": logp})
    >>> PolicyShaping().loss(batch).values.sum().backward(); logp.grad
    tensor([[-0.2500]])
    """

    rows: str = "demonstration"
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("PolicyShaping.gamma", self.gamma)

    def surrogate(self, batch: TokenBatch) -> tuple[Float[Tensor, "B T"], dict[str, Metric]]:
        """The shaped probabilities, weighted with the advantages."""
        probability = scored_logp(batch, "policy").exp()
        shaped = probability / (probability + self.gamma)
        return -batch.token_advantages() * shaped, {"shaped": token_mean(shaped, batch.token_weight)}
