"""Methods that bound the importance ratio."""

from typing import Literal

from rlstab.losses._advantage import GFPO, GroupCenter, GroupNorm
from rlstab.losses._clipped import CISPO, GMPO, SAPO, ClippedSurrogate
from rlstab.losses._kl import KL
from rlstab.losses._objective import Objective
from rlstab.losses._ratio import GeometricRatio, TokenRatio
from rlstab.losses._router_shift import RouterShiftRatio
from rlstab.losses._sampler_weight import MaskedIS
from rlstab.losses._trust_region import TotalVariationMask


def grpo(*, low: float = 0.2, high: float = 0.2, beta: float = 0.04) -> Objective:
    """GRPO: clipped surrogate and k3 penalty, both a mean over sequences of their token means.

    Args:
        low: lower clip.
        high: upper clip.
        beta: coefficient of the penalty towards the initial policy; with 0 there is no such term.

    Stabilises: variance of the policy gradient without a critic.

    Proof: vector `grpo`.

    Reference: DeepSeekMath, https://arxiv.org/abs/2402.03300

    >>> list(grpo().terms), list(grpo(beta=0.0).terms)
    (['policy', 'kl'], ['policy'])
    """
    policy = ClippedSurrogate(low=low, high=high).mean("sequence")
    penalty = {"kl": KL(estimator="k3", coef=beta).mean("sequence")} if beta else {}
    return Objective(policy=policy, **penalty, advantage=GroupNorm())


def dr_grpo(*, length: int = 3000, low: float = 0.2, high: float = 0.2) -> Objective:
    """Dr. GRPO: sums over tokens divided by a constant length, rewards centred and not scaled.

    Args:
        length: the constant, the largest length of a completion.
        low: lower clip.
        high: upper clip.

    Stabilises: completion lengths and question difficulty biasing the gradient.

    Proof: vector `dr_grpo`.

    Reference: Understanding R1-Zero-Like Training: A Critical Perspective, https://arxiv.org/abs/2503.20783

    >>> dr_grpo(length=512).terms["policy"].mean
    Mean(unit=512, over='step')
    """
    return Objective(policy=ClippedSurrogate(low=low, high=high).mean(length), advantage=GroupCenter())


def dapo(*, low: float = 0.2, high: float = 0.28) -> Objective:
    """DAPO: a higher upper clip and a mean over all tokens; its sampling and length rewards are not part of the loss.

    Args:
        low: lower clip.
        high: upper clip.

    Stabilises: entropy collapse under a symmetric clip.

    Differs: resampling and penalties of length are parts of their own, `MixedGroupsOnly` and `SoftOverlong`.

    Proof: vectors `dapo_clip_higher`, `dapo_soft_overlong`.

    Reference: DAPO, https://arxiv.org/abs/2503.14476

    >>> dapo().terms["policy"].high
    0.28
    """
    return Objective(policy=ClippedSurrogate(low=low, high=high).mean("token"), advantage=GroupNorm())


def bnpo(*, low: float = 0.2, high: float = 0.2) -> Objective:
    """A mean over the tokens of each micro-batch, as TRL's `loss_type="bnpo"`: depends on how a step is split.

    Args:
        low: lower clip.
        high: upper clip.

    Stabilises: nothing beyond GRPO: a host's normalisation.

    Proof: `tests/trainers/test_equality.py`.

    Reference: TRL, https://huggingface.co/docs/trl/grpo_trainer

    >>> bnpo().terms["policy"].mean
    Mean(unit='token', over='micro_batch')
    """
    policy = ClippedSurrogate(low=low, high=high).mean("token", over="micro_batch")
    return Objective(policy=policy, advantage=GroupNorm())


def gspo(*, low: float = 3e-4, high: float = 4e-4) -> Objective:
    """GSPO: one ratio per sequence, the geometric mean of its tokens', clipped very tightly.

    Args:
        low: lower clip.
        high: upper clip.

    Stabilises: mismatched granularity of reward and ratio, mixtures of experts above all.

    Proof: vectors `gspo`, `gspo_paper_eps`.

    Reference: Group Sequence Policy Optimization, https://arxiv.org/abs/2507.18071

    >>> type(gspo().terms["policy"].ratio).__name__
    'GeometricRatio'
    """
    policy = ClippedSurrogate(ratio=GeometricRatio(), low=low, high=high).mean("sequence")
    return Objective(policy=policy, advantage=GroupNorm())


def luspo(*, low: float = 2e-3, high: float = 2.5e-3) -> Objective:
    """LUSPO: GSPO with each sequence weighted by its length, which takes out GSPO's bias towards short ones.

    Args:
        low: lower clip.
        high: upper clip.

    Stabilises: GSPO's drift of completion length.

    Proof: vector `luspo`.

    Reference: Length-Unbiased Sequence Policy Optimization, https://arxiv.org/abs/2602.05261

    >>> luspo().terms["policy"].mean  # a sum over tokens, a mean over sequences
    Mean(unit=1, over='step')
    """
    policy = ClippedSurrogate(ratio=GeometricRatio(), low=low, high=high).mean(1)
    return Objective(policy=policy, advantage=GroupNorm())


def gmpo(*, low: float = 0.4, high: float = 0.4) -> Objective:
    """GMPO: the geometric mean of token ratios, each clipped on one side in log space.

    Args:
        low: lower clip of the log-ratio.
        high: upper clip of the log-ratio.

    Stabilises: outliers among token ratios.

    Proof: vector `gmpo`.

    Reference: Geometric-Mean Policy Optimization, https://arxiv.org/abs/2507.20673

    >>> gmpo().terms["policy"].mean
    Mean(unit='sequence', over='step')
    """
    return Objective(policy=GMPO(low=low, high=high), advantage=GroupNorm())


def rspo(*, low: float = 0.4, high: float = 0.4, min: float = 0.8) -> Objective:
    """RSPO: GMPO on ratios that shrink where the routers of a mixture of experts have moved since the old policy.

    Follows version 2 of the paper, which rescales before it clips; version 1 clips first.

    Args:
        low: lower clip of the rescaled log-ratio.
        high: upper clip of the rescaled log-ratio.
        min: floor of the router-shift ratio.

    Stabilises: mixtures of experts, whose ratios jump when an update sends a token to other experts.

    Proof: vector `rspo` of the router-shift ratio.

    Reference: Router-Shift Policy Optimization, https://arxiv.org/abs/2510.23027

    >>> rspo().terms["policy"].ratio.min
    0.8
    """
    return Objective(policy=GMPO(low=low, high=high, ratio=RouterShiftRatio(min=min)), advantage=GroupNorm())


def cispo(*, max: float = 5.0) -> Objective:
    """CISPO: REINFORCE with a ratio held below a ceiling, so that every token keeps a gradient.

    Args:
        max: the ceiling of the ratio itself, 5.0 in ScaleRL (see `CISPO` for the units elsewhere).

    Stabilises: loss of the rare tokens that a clip drops.

    Differs: verl and slime count the bounds from 1, TRL does not.

    Proof: vectors `cispo_abs_ceiling`, `cispo_delta`.

    Reference: MiniMax-M1, https://arxiv.org/abs/2506.13585; ScaleRL, https://arxiv.org/abs/2510.13786

    >>> cispo().terms["policy"].max
    5.0
    """
    return Objective(policy=CISPO(max=max).mean("token"), advantage=GroupNorm())


def sapo(*, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Objective:
    """SAPO: a sigmoid gate on the ratio, a little tighter for negative advantages.

    Args:
        tau_pos: temperature for positive advantages.
        tau_neg: temperature for the others.

    Stabilises: the hard edge of the clip.

    Proof: vector `sapo`.

    Reference: Soft Adaptive Policy Optimization, https://arxiv.org/abs/2511.20347

    >>> sapo().terms["policy"].tau_neg
    1.05
    """
    return Objective(policy=SAPO(tau_pos=tau_pos, tau_neg=tau_neg).mean("sequence"), advantage=GroupNorm())


def icepop(*, min: float = 0.5, max: float = 5.0, low: float = 0.2, high: float = 0.2) -> Objective:
    """IcePop: GRPO's surrogate with tokens left out where trainer and engine disagree.

    Args:
        min: smallest ratio of trainer to engine that is kept.
        max: largest ratio that is kept.
        low: lower clip.
        high: upper clip.

    Stabilises: disagreement of trainer and engine, mixtures of experts above all.

    Proof: vector `icepop_token`.

    Reference: Every Step Evolves, https://arxiv.org/abs/2510.18855

    >>> icepop().terms["policy"].weights[0].max
    5.0
    """
    policy = ClippedSurrogate(low=low, high=high, weights=(MaskedIS(min=min, max=max),)).mean("sequence")
    return Objective(policy=policy, advantage=GroupNorm())


def dppo_tv(*, low: float = 0.2, high: float = 0.2, max: float = 20.0) -> Objective:
    """DPPO (binary TV): a trust region on the probability of the sampled token instead of its ratio.

    Args:
        low: how far the probability may fall where the advantage is negative.
        high: how far it may rise where it is positive.
        max: ceiling of the detached ratio.

    Stabilises: rare tokens that a ratio clip stops, and frequent ones that it lets go far.

    Differs: the binary form only; the top-k form and the KL need the old policy's distribution.

    Proof: `tests/losses/test_trust_region.py`.

    Reference: Rethinking the Trust Region in LLM Reinforcement Learning, https://arxiv.org/abs/2602.04879

    >>> dppo_tv().terms["policy"].weights
    (TotalVariationMask(low=0.2, high=0.2, against='old'),)
    """
    policy = CISPO(max=max, weights=(TotalVariationMask(low=low, high=high),)).mean("token")
    return Objective(policy=policy, advantage=GroupNorm())


def intellect2(*, low: float = 0.2, high: float = 0.2, cap: float = 4.0) -> Objective:
    """INTELLECT-2: the clip on both sides, which holds large ratios at negative advantages as well.

    Args:
        low: lower clip.
        high: upper clip.
        cap: largest ratio at negative advantages.

    Stabilises: huge updates on tokens that have become likelier and turn out bad.

    Proof: vector `dual_clip_ppo` (the same bound, written otherwise).

    Reference: INTELLECT-2, https://arxiv.org/abs/2505.07291

    >>> intellect2().terms["policy"].cap
    4.0
    """
    return Objective(policy=ClippedSurrogate(low=low, high=high, cap=cap).mean("token"), advantage=GroupNorm())


def gfpo(*, k: int = 8, metric: Literal["length", "reward_per_length"] = "length", high: float = 0.2) -> Objective:
    """GFPO: learn from the shortest, or most rewarded per token, `k` completions of each group.

    Args:
        k: how many completions of a group are kept, 8 of 16 to 24 in the paper.
        metric: what they are ranked by.
        high: upper clip.

    Stabilises: growth of completion length.

    Differs: the adaptive `k` by difficulty is not part of it.

    Proof: vectors `adv_gfpo_shortest`, `adv_gfpo_token_efficiency`.

    Reference: Sample More to Think Less: Group Filtered Policy Optimization, https://arxiv.org/abs/2508.09726

    >>> gfpo(k=4).advantage.k
    4
    """
    return Objective(policy=ClippedSurrogate(high=high).mean("token"), advantage=GFPO(k=k, metric=metric))


def bypass(*, low: float = 0.2, high: float = 0.2) -> Objective:
    """PPO clipped against the engine's own log-probs: the old policy is never computed.

    Args:
        low: lower clip.
        high: upper clip.

    Stabilises: disagreement of trainer and engine and staleness, in one ratio; it must not be corrected once more.

    Proof: `tests/losses/test_presets.py`.

    Reference: Rollout correction in verl (bypass mode), https://verl.readthedocs.io/en/latest/algo/rollout_corr.html

    >>> bypass().terms["policy"].ratio.against
    'sampler'
    """
    policy = ClippedSurrogate(ratio=TokenRatio(against="sampler"), low=low, high=high).mean("token")
    return Objective(policy=policy, advantage=GroupNorm())
