"""Methods of REINFORCE's kind, and those that steer the entropy."""

import math
from typing import Literal

from rlstab.losses._advantage import GPGAdvantage, GroupCenter, GroupNorm, LeaveOneOut, ReinforcePP, SigmaFilter
from rlstab.losses._clipped import ClippedSurrogate
from rlstab.losses._conflict import ConflictWeight, EntropyFilter
from rlstab.losses._covariance import KLCov
from rlstab.losses._covariance_band import ClipCov
from rlstab.losses._objective import Objective
from rlstab.losses._policy_gradient import VESPO, AStarPO, ImportanceSurrogate, PolicyGradient
from rlstab.losses._ratio import PreClippedRatio
from rlstab.losses._sampler_weight import SamplerCorrection


def vespo(
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
    correction: SamplerCorrection | None = None,
) -> Objective:
    """VESPO: REINFORCE with a smooth weight of the ratio of the whole sequence.

    Args:
        k_pos: power of the weight for advantages >= 0.
        lambda_pos: rate of the weight for advantages >= 0.
        k_neg: power for negative advantages.
        lambda_neg: rate for negative advantages.
        correction: correction for the sampler, as a factor of the ratio.

    Stabilises: variance of sequence ratios off policy.

    Proof: vector `vespo`.

    Reference: VESPO, https://arxiv.org/abs/2602.10693

    >>> vespo().terms["policy"].k_neg
    3.0
    """
    policy = VESPO(k_pos=k_pos, lambda_pos=lambda_pos, k_neg=k_neg, lambda_neg=lambda_neg, correction=correction)
    return Objective(policy=policy.mean("token"), advantage=GroupNorm())


def gpg(*, norm: Literal["none", "std"] = "none") -> Objective:
    """GPG: plain REINFORCE on centred rewards, corrected for groups whose rewards are all equal.

    Args:
        norm: what the centred rewards are divided by: `none` for 1, or the group's `std`.

    Stabilises: gradients diluted by groups without signal.

    Differs: verl divides by the number of non-zero rewards instead.

    Proof: vector `gpg`.

    Reference: GPG: A Simple and Strong Reinforcement Learning Baseline, https://arxiv.org/abs/2504.02546

    >>> gpg().advantage.correction
    True
    """
    return Objective(policy=PolicyGradient().mean("token"), advantage=GPGAdvantage(norm=norm))


def rloo() -> Objective:
    """RLOO: REINFORCE on whole sequences, against the mean reward of the other completions of the prompt.

    The paper's KL penalty is part of the reward and belongs to the reward function.

    Stabilises: variance of the policy gradient, unbiased.

    Proof: vector `adv_rloo`.

    Reference: Back to Basics: Revisiting REINFORCE Style Optimization, https://arxiv.org/abs/2402.14740

    >>> rloo().terms["policy"].mean  # the log-prob of a sequence is a sum over its tokens
    Mean(unit=1, over='step')
    """
    return Objective(policy=PolicyGradient().mean(1), advantage=LeaveOneOut())


def reinforce_pp(*, low: float = 0.2, high: float = 0.2, kl_coef: float = 1e-3) -> Objective:
    """REINFORCE++: clipped surrogate on returns with a k1 penalty per token, whitened over the batch. No groups.

    Args:
        low: lower clip.
        high: upper clip.
        kl_coef: coefficient of the penalty in the return.

    Stabilises: overfitting of group baselines to single prompts.

    Proof: vector `adv_reinforce_pp_baseline`.

    Reference: REINFORCE++, https://arxiv.org/abs/2501.03262

    >>> reinforce_pp().advantage.kl_coef
    0.001
    """
    policy = ClippedSurrogate(low=low, high=high).mean("token")
    return Objective(policy=policy, advantage=ReinforcePP(kl_coef=kl_coef))


def stable_reinforce(*, clip: float = 0.2, max: float = 1e3, bound: float = 3.0, kl_coef: float = 1e-3) -> Objective:
    """StableReinforce: the ratio is clipped before PPO's clip, and outliers among the advantages are dropped.

    Args:
        clip: PPO's clip on both sides.
        max: the ratio is held in [1/max, max].
        bound: standard deviations within which an advantage is kept.
        kl_coef: coefficient of the k1 penalty in the return.

    Stabilises: overflowing ratios and outlying advantages.

    Differs: the released filter compares z with the raw mean ± 3.

    Proof: vectors `stable_reinforce_preclip`, `advantage_filter_3sigma`.

    Reference: R1-Reward, https://arxiv.org/abs/2505.02835

    >>> stable_reinforce().terms["policy"].ratio.max
    1000.0
    """
    policy = ClippedSurrogate(ratio=PreClippedRatio(min=1 / max, max=max), low=clip, high=clip).mean("sequence")
    return Objective(policy=policy, advantage=SigmaFilter(advantage=ReinforcePP(kl_coef=kl_coef), bound=bound))


def a_star_po(*, beta: float = 1e-3) -> Objective:
    """A*-PO: regression on the optimal advantage, with values computed before training (see `AStarPO`).

    Args:
        beta: weight of the log-ratio to the initial policy.

    Stabilises: noise of baselines made from few rollouts.

    Proof: vector `a_star_po`.

    Reference: Accelerating RL for LLM Reasoning with Optimal Advantage Regression, https://arxiv.org/abs/2505.20686

    >>> a_star_po().terms["policy"].mean
    Mean(unit='sequence', over='step')
    """
    return Objective(policy=AStarPO(beta=beta))


def gtpo(*, start_entropy: float | None = None, threshold: float = math.log(2), scale: float = 0.1) -> Objective:
    """GTPO: what a group's good and bad completions share is not unlearnt, and uncertain completions are left out.

    Args:
        start_entropy: mean entropy of the policy before training, in nats; the entropy filter is left out where it is
            not below `threshold`, since it would train on nothing. None keeps the filter.
        threshold: entropy above which a completion is left out.
        scale: entropy penalty.

    Stabilises: format tokens pulled both ways within a group; entropy that runs away.

    Differs: the released code doubles the weight where shared prefix and suffix overlap, divides by the length of the
    longer run, has a threshold of 0.7 and no switch by the start entropy.

    Proof: vectors `gtpo`, `gtpo_overlap`.

    Reference: GTPO: Stabilizing Group Relative Policy Optimization via Gradient and Entropy Control,
    https://arxiv.org/abs/2508.03772

    >>> type(gtpo().advantage).__name__, type(gtpo(start_entropy=1.1).advantage).__name__
    ('EntropyFilter', 'GroupCenter')
    """
    filtered = start_entropy is None or start_entropy < threshold
    advantage = EntropyFilter(threshold=threshold, scale=scale) if filtered else GroupCenter()
    return Objective(policy=ImportanceSurrogate(weights=(ConflictWeight(),)).mean("sequence"), advantage=advantage)


def clip_cov(*, fraction: float = 2e-4, min: float = 1.0, max: float = 5.0) -> Objective:
    """Clip-Cov: a few random tokens of high covariance between advantage and log-prob get no gradient.

    Args:
        fraction: share of the tokens.
        min: lower end of the band of covariances.
        max: upper end of the band.

    Stabilises: entropy, which a small share of the tokens drives down.

    Differs: chosen over the whole optimizer step; the released code chooses within each micro-batch (`over`).

    Proof: vectors `clip_cov`, `clip_cov_random`.

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models,
    https://arxiv.org/abs/2505.22617

    >>> clip_cov().terms["policy"].high  # PPO's own clip is wide
    1.0
    """
    weights = (ClipCov(fraction=fraction, min=min, max=max),)
    return Objective(policy=ClippedSurrogate(low=1.0, high=1.0, weights=weights).mean("token"), advantage=GroupNorm())


def kl_cov(*, fraction: float = 2e-3, coef: float = 1.0) -> Objective:
    """KL-Cov: no clip at all, and a penalty that holds the tokens of highest covariance where they were.

    Args:
        fraction: share of the tokens, 2e-3 for the paper's 7B and 2e-4 for its 32B model.
        coef: coefficient of the penalty.

    Stabilises: entropy, which a small share of the tokens drives down.

    Differs: chosen over the whole optimizer step; the released code chooses within each micro-batch (`over`).

    Proof: vector `kl_cov`.

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models,
    https://arxiv.org/abs/2505.22617

    >>> list(kl_cov().terms)
    ['policy', 'kl_cov']
    """
    return Objective(
        policy=ImportanceSurrogate().mean("token"),
        kl_cov=KLCov(fraction=fraction, coef=coef).mean("token"),
        advantage=GroupNorm(),
    )
