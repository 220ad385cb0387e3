"""Surrogates without a clip: REINFORCE, the plain importance-weighted loss, VESPO, A*-PO."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rlstab.batch import Column, LogProbs, Requirement, TokenBatch
from rlstab.errors import CompositionError
from rlstab.losses._checks import check_part, check_positive, check_range
from rlstab.losses._mean import Mean, MeanField
from rlstab.losses._metrics import Metric, Sum, mask_like, token_mean
from rlstab.losses._ratio import leave_out, missing, ratio_max, ratio_of
from rlstab.losses._sampler_weight import SamplerCorrection
from rlstab.losses._surrogate import RatioSurrogate, Surrogate, by_sign


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Surrogate):
    r"""REINFORCE: $-A \log\pi$, with gradient $-A$. No ratio, no clip, no old policy: GPG's loss.

    Its gradient is that of the policy objective on policy only; after the first update on a batch use
    `ImportanceSurrogate` or `CISPO`.

    Args:
        weights: detached factors.

    Metrics: `logp`, the mean log-prob of the tokens; `impossible`, the number of tokens left out because the policy
    gives them probability 0.

    Reference: Williams, Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning,
    https://doi.org/10.1007/BF00992696; GPG, https://arxiv.org/abs/2504.02546

    >>> import torch
    >>> batch = TokenBatch(
    ...     mask=torch.ones(1, 2), advantages=torch.tensor([2.0]), logps={"policy": torch.tensor([[-1.0, -0.5]])}
    ... )
    >>> PolicyGradient().loss(batch).values
    tensor([[2., 1.]])
    """

    @property
    def zero_without(self) -> tuple[str, ...]:
        """The policy."""
        return ("policy",)

    def surrogate(self, batch: TokenBatch) -> tuple[Float[Tensor, "B T"], dict[str, Metric]]:
        """The log-probs, weighted with the advantages."""
        logp = leave_out(batch.logp("policy"), batch, "policy")
        known = batch.loss_mask & ~missing(batch, "policy")
        return -batch.token_advantages() * logp, {"logp": Sum((logp.detach() * known).sum(), known.count_nonzero())}


@dataclass(frozen=True, kw_only=True)
class ImportanceSurrogate(RatioSurrogate):
    r"""The unclipped surrogate $-r A$, with gradient $-r A$.

    Unbiased off policy for the expectation over single steps (token ratio) or whole sequences (`SequenceRatio`), with a
    variance that nothing bounds; the base loss of KL-Cov.

    Args:
        ratio: the importance ratio.
        weights: detached factors.

    Metrics: `ratio_max`; `impossible`, the number of tokens without a ratio.

    >>> import torch
    >>> logp = torch.tensor([[-1.0]], requires_grad=True)
    >>> batch = TokenBatch(mask=torch.ones(1, 1), advantages=torch.tensor([3.0]), logps={"policy": logp})
    >>> ImportanceSurrogate().loss(batch).values.sum().backward(); logp.grad
    tensor([[-3.]])
    """

    def surrogate(self, batch: TokenBatch) -> tuple[Float[Tensor, "B #T"], dict[str, Metric]]:
        """The ratios, weighted with the advantages."""
        ratio = ratio_of(self.ratio.log_ratio(batch))
        return -ratio * batch.token_advantages(), {"ratio_max": ratio_max(ratio, batch)}


_TOKEN_LIMIT = 20.0
_LOG_WEIGHT_RANGE = (math.log(1e-8), 20.0)


def vespo_weight(
    log_weight: Float[Tensor, "B 1"],
    advantages: Float[Tensor, "B #T"],
    *,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
) -> Float[Tensor, "B #T"]:
    r"""$\phi(W) = \exp(\lambda + k \ln W - \lambda W)$, $(k, \lambda)$ by the sign of $A$; largest at $W = k/\lambda$.

    >>> import torch
    >>> A, W = torch.tensor([[1.0]]), torch.tensor([[1.0]])
    >>> vespo_weight(W.log(), A, k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0)
    tensor([[1.]])
    """
    log_weight = log_weight.clamp(*_LOG_WEIGHT_RANGE)
    k, rate = by_sign(advantages, (k_pos, k_neg), (lambda_pos, lambda_neg))
    return (rate + k * log_weight - rate * log_weight.exp()).exp()


@dataclass(frozen=True, kw_only=True)
class VESPO(RatioSurrogate):
    r"""Variational sequence-level soft policy optimization: $-\operatorname{sg}(\phi(W)) A \log\pi$.

    $W = \exp(\sum_t \log r_t)$ is the ratio of the whole sequence and $\phi(W) = e^\lambda W^k e^{-\lambda W}$ a smooth
    weight that is 1 on policy and fades for sequences that became much more or much less likely. Token log-ratios are
    held in [-20, 20] and $\ln W$ in [ln 1e-8, 20], as in the authors' and TRL's code.

    Args:
        k_pos: $k$ where $A \ge 0$.
        lambda_pos: $\lambda$ where $A \ge 0$.
        k_neg: $k$ where $A < 0$.
        lambda_neg: $\lambda$ where $A < 0$.
        correction: correction for the sampler, a factor of $W$ instead of the loss.
        ratio: the importance ratio, per token.
        weights: detached factors; no correction for the sampler.

    Metrics: `phi`, its mean over rows, `ratio_max`, the largest $W$, and `impossible`, the number of tokens left out
    because the policy or the old one gives them probability 0.

    Raises:
        ConfigError: if a `k` is negative or a `lambda` not positive, or the ratio has one value per sequence.
        CompositionError: if a correction for the sampler stands among the weights.

    Reference: VESPO, https://arxiv.org/abs/2602.10693

    >>> import torch
    >>> logp = torch.tensor([[-1.0]], requires_grad=True)
    >>> batch = TokenBatch(mask=torch.ones(1, 1), advantages=torch.tensor([3.0]), logps={"policy": logp})
    >>> VESPO().loss(batch).values.sum().backward(); logp.grad
    tensor([[-3.]])
    """

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0
    correction: SamplerCorrection | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._token_ratio_only()
        _check_correction(self.correction, self.weights)
        for name in ("k_pos", "k_neg"):
            check_range(f"VESPO.{name}", self.__dict__[name], 0)
        for name in ("lambda_pos", "lambda_neg"):
            check_positive(f"VESPO.{name}", self.__dict__[name])

    @property
    def scored_by(self) -> tuple[str, ...]:
        """The policy, whose log-prob is the loss, and the denominator of the ratio."""
        return ("policy", self.ratio.against)

    @property
    def zero_without(self) -> tuple[str, ...]:
        """The policy."""
        return ("policy",)

    def _corrections(self) -> list[str]:
        return super()._corrections() + ([] if self.correction is None else [type(self.correction).__name__])

    @property
    def inert_at_ratio_one(self) -> tuple[str, ...]:
        """The weight, which is 1."""
        return ("the weight of VESPO",) if self.correction is None else ()

    def surrogate(self, batch: TokenBatch) -> tuple[Float[Tensor, "B T"], dict[str, Metric]]:
        """The weighted log-probs."""
        log_ratio = self.ratio.bounded(batch)  # sg(phi): a weight
        log_weight = log_ratio.clamp(-_TOKEN_LIMIT, _TOKEN_LIMIT).sum(-1, keepdim=True)  # 0 outside the loss
        metrics: dict[str, Metric] = {}
        if self.correction is not None:
            rho, metrics = self.correction.weigh(batch)
            log_rho = rho.log().clamp(*_LOG_WEIGHT_RANGE)
            log_weight = log_weight + (log_rho * mask_like(log_rho, batch.token_weight)).sum(-1, keepdim=True)
        advantages = batch.token_advantages()
        shape = {"k_pos": self.k_pos, "lambda_pos": self.lambda_pos, "k_neg": self.k_neg, "lambda_neg": self.lambda_neg}
        phi = vespo_weight(log_weight, advantages, **shape)
        loss = phi * -advantages * leave_out(batch.logp("policy"), batch, "policy")
        metrics |= {"phi": token_mean(phi, batch), "ratio_max": ratio_max(ratio_of(log_weight), batch)}
        return loss if self.correction is None else self.correction.drop_unscored(loss, batch), metrics


def _check_correction(correction: SamplerCorrection | None, weights: Sequence[object]) -> None:
    if correction is not None:
        check_part("VESPO.correction", correction, SamplerCorrection, "TruncatedIS(max=2.0)")
    outside = [type(weight).__name__ for weight in weights if isinstance(weight, SamplerCorrection)]
    if outside:
        raise CompositionError(
            f"VESPO.weights: {outside[0]} is part of the sequence's weight here: pass correction={outside[0]}(...)"
        )


def optimal_value(rewards: Float[Tensor, "N n"], *, beta: float) -> Float[Tensor, "N"]:
    r"""$V^* = \beta \ln \frac{1}{n} \sum_j \exp(R_j / \beta)$ of each prompt, from `n` rewards of the reference.

    The value of the policy that maximises reward minus $\beta$ KL(policy || reference); the mean reward as
    $\beta \to \infty$, the best one as $\beta \to 0$.

    Args:
        rewards: rewards of completions that the reference policy sampled, `[N, n]`.
        beta: $\beta_1$ of A*-PO, 0.5 in the paper.

    Returns:
        One value per prompt, `[N]`.

    Raises:
        ConfigError: if `beta` is not positive.

    >>> import torch
    >>> optimal_value(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), beta=0.5)
    tensor([0.7169])
    """
    check_positive("optimal_value.beta", beta)
    return beta * (torch.logsumexp(rewards / beta, -1) - math.log(rewards.shape[-1]))


@dataclass(frozen=True, kw_only=True)
class AStarPO(Surrogate):
    r"""A*-PO: regression on the optimal advantage, $(\beta \sum_t (\log\pi - \log\pi_\text{ref}) - (R - V^*))^2$.

    One completion per prompt suffices. $V^*$ is computed once, before training, from completions of the reference
    policy (`optimal_value`), and comes with each row as the batch's `baseline`. The loss needs no advantage.

    Args:
        beta: $\beta_2$, the weight of the log-ratio to the reference.
        reference: source of the reference policy.
        weights: detached factors.

    Metrics: `log_ratio`, the mean over rows of $\sum_t (\log\pi - \log\pi_\text{ref})$; `advantage`, that of $R - V^*$;
    `impossible`, the number of tokens left out of the sum because the policy or the reference gives them probability 0.

    Raises:
        ConfigError: if `beta` is not positive.

    Reference: Accelerating RL for LLM Reasoning with Optimal Advantage Regression, https://arxiv.org/abs/2505.20686

    >>> import torch
    >>> batch = TokenBatch(
    ...     mask=torch.ones(1, 1),
    ...     rewards=torch.tensor([1.0]),
    ...     baseline=torch.tensor([0.5]),
    ...     logps={"policy": torch.tensor([[-1.0]]), "initial": torch.tensor([[-2.0]])},
    ... )
    >>> AStarPO(beta=0.1).loss(batch).values  # (0.1 * 1 - 0.5)^2
    tensor([[0.1600]])
    """

    mean: Mean = MeanField("sequence")  # type: ignore[assignment]
    beta: float = 1e-3
    reference: str = "initial"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("AStarPO.beta", self.beta)

    @property
    def requires(self) -> frozenset[Requirement]:
        """Rewards, their optimal values, the policy and its reference."""
        own = {Column("rewards"), Column("baseline"), LogProbs(self.reference)}
        return super().requires - {Column("advantages")} | own

    @property
    def scored_by(self) -> tuple[str, ...]:
        """The policy and its reference."""
        return ("policy", self.reference)

    def surrogate(self, batch: TokenBatch) -> tuple[Float[Tensor, "B 1"], dict[str, Metric]]:
        """The squared error per row; 0 for rows without a finite reward or value."""
        advantage = (batch.column("rewards") - batch.column("baseline")).unsqueeze(-1)
        scored = advantage.isfinite()
        advantage = torch.where(scored, advantage, 0.0)
        known = batch.loss_mask & ~missing(batch, "policy") & ~missing(batch, self.reference)
        log_ratio = torch.where(known, batch.logp("policy") - batch.logp(self.reference), 0.0).sum(-1, keepdim=True)
        loss = (self.beta * log_ratio - advantage).square() * scored
        count = scored.sum()
        return loss, {
            "log_ratio": Sum((log_ratio.detach() * scored).sum(), count),
            "advantage": Sum(advantage.sum(), count),
        }
