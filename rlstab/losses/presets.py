"""Published methods as compositions of parts: reading a function here tells the paper.

Each returns an `Objective` with the settings of the paper, and with its advantage where the paper has one.
`from_config` translates the arguments of TRL's `GRPOConfig`. Means are over the whole optimizer step, except where a
host's own normalisation is the point (`bnpo`, `from_config`).
"""

import math
from typing import Any, Literal

from rlstab.errors import ConfigError
from rlstab.losses._advantage import GPGAdvantage, GroupCenter, GroupNorm, LeaveOneOut, ReinforcePP, SigmaFilter
from rlstab.losses._clipped import CISPO, GMPO, SAPO, ClippedSurrogate
from rlstab.losses._controllers import Controller, EntropyTarget
from rlstab.losses._entropy import EntropyBonus
from rlstab.losses._kl import KL
from rlstab.losses._mean import Mean
from rlstab.losses._objective import Objective
from rlstab.losses._policy_gradient import VESPO, AStarPO, PolicyGradient
from rlstab.losses._ratio import GeometricRatio, PreClippedRatio, Ratio, TokenRatio
from rlstab.losses._sampler_weight import MaskedIS, SamplerCorrection, TruncatedIS
from rlstab.losses._surrogate import Surrogate
from rlstab.losses._term import Term
from rlstab.losses._weight import OffPolicySequenceMask, TopEntropy, Weight

__all__ = [
    "a_star_po",
    "bnpo",
    "cispo",
    "dapo",
    "dr_grpo",
    "from_config",
    "gmpo",
    "gpg",
    "grpo",
    "gspo",
    "icepop",
    "luspo",
    "reinforce_pp",
    "rloo",
    "sapo",
    "stable_reinforce",
    "vespo",
]


def grpo(*, low: float = 0.2, high: float = 0.2, beta: float = 0.04) -> Objective:
    """GRPO: clipped surrogate and k3 penalty, both a mean over sequences of their token means.

    Args:
        low: lower clip.
        high: upper clip.
        beta: coefficient of the penalty towards the initial policy; with 0 there is no such term.

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

    Reference: Geometric-Mean Policy Optimization, https://arxiv.org/abs/2507.20673

    >>> gmpo().terms["policy"].mean
    Mean(unit='sequence', over='step')
    """
    return Objective(policy=GMPO(low=low, high=high), advantage=GroupNorm())


def cispo(*, max: float = 5.0) -> Objective:
    """CISPO: REINFORCE with a ratio held below a ceiling, so that every token keeps a gradient.

    Args:
        max: the ceiling of the ratio itself, 5.0 in ScaleRL (see `CISPO` for the units elsewhere).

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

    Reference: Soft Adaptive Policy Optimization, https://arxiv.org/abs/2511.20347

    >>> sapo().terms["policy"].tau_neg
    1.05
    """
    return Objective(policy=SAPO(tau_pos=tau_pos, tau_neg=tau_neg).mean("sequence"), advantage=GroupNorm())


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

    Reference: GPG: A Simple and Strong Reinforcement Learning Baseline, https://arxiv.org/abs/2504.02546

    >>> gpg().advantage.correction
    True
    """
    return Objective(policy=PolicyGradient().mean("token"), advantage=GPGAdvantage(norm=norm))


def rloo() -> Objective:
    """RLOO: REINFORCE on whole sequences, against the mean reward of the other completions of the prompt.

    The paper's KL penalty is part of the reward and belongs to the reward function.

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

    Reference: R1-Reward, https://arxiv.org/abs/2505.02835

    >>> stable_reinforce().terms["policy"].ratio.max
    1000.0
    """
    policy = ClippedSurrogate(ratio=PreClippedRatio(min=1 / max, max=max), low=clip, high=clip).mean("sequence")
    return Objective(policy=policy, advantage=SigmaFilter(advantage=ReinforcePP(kl_coef=kl_coef), bound=bound))


def icepop(*, min: float = 0.5, max: float = 5.0, low: float = 0.2, high: float = 0.2) -> Objective:
    """IcePop: GRPO's surrogate with tokens left out where trainer and engine disagree.

    Args:
        min: smallest ratio of trainer to engine that is kept.
        max: largest ratio that is kept.
        low: lower clip.
        high: upper clip.

    Reference: Every Step Evolves, https://arxiv.org/abs/2510.18855

    >>> icepop().terms["policy"].weights[0].max
    5.0
    """
    policy = ClippedSurrogate(low=low, high=high, weights=(MaskedIS(min=min, max=max),)).mean("sequence")
    return Objective(policy=policy, advantage=GroupNorm())


def a_star_po(*, beta: float = 1e-3) -> Objective:
    """A*-PO: regression on the optimal advantage, with values computed before training (see `AStarPO`).

    Args:
        beta: weight of the log-ratio to the initial policy.

    Reference: Accelerating RL for LLM Reasoning with Optimal Advantage Regression, https://arxiv.org/abs/2505.20686

    >>> a_star_po().terms["policy"].mean
    Mean(unit='sequence', over='step')
    """
    return Objective(policy=AStarPO(beta=beta))


def from_config(args: Any) -> Objective:
    """The objective whose loss is that of TRL's `GRPOTrainer` with these arguments, normalised as the host does.

    Advantages are the host's own. Tokens that the engine could not score keep weight 1, as in the host. With several
    processes the host ranks entropies (`top_entropy_quantile`) over the micro-batches of all; here each process ranks
    its own.

    Args:
        args: a `trl.GRPOConfig` (1.16), or anything with its loss arguments.

    Returns:
        Terms `policy`, `kl` if `beta` is not 0, and `entropy` if there is an entropy bonus.

    Raises:
        ConfigError: for an unknown `loss_type`, `importance_sampling_level` or correction mode, or a value out of
            range.

    >>> from types import SimpleNamespace
    >>> args = SimpleNamespace(
    ...     loss_type="dapo", importance_sampling_level="token", epsilon=0.2, epsilon_high=0.28, delta=None, beta=0.0,
    ...     off_policy_mask_threshold=None, top_entropy_quantile=1.0, entropy_coef=0.0, use_adaptive_entropy=False,
    ...     use_vllm=False,
    ... )
    >>> from_config(args).terms["policy"].mean
    Mean(unit='token', over='generation')
    """
    ratio, mean = _host_ratio(args), _host_mean(args)
    terms: dict[str, Term] = {"policy": _host_surrogate(args, ratio).replace(mean=mean)}
    if args.beta != 0.0:
        weight: Literal["none", "differentiable"] = "differentiable" if args.use_bias_correction_kl else "none"
        reference = "moving" if args.sync_ref_model else "initial"
        terms["kl"] = KL(estimator="k3", weight=weight, reference=reference, ratio=ratio, coef=args.beta, mean=mean)
    if args.entropy_coef != 0.0 or args.use_adaptive_entropy:
        # The host's bonus is always a mean over the micro-batch's tokens, whatever the policy's is.
        terms["entropy"] = EntropyBonus(coef=_host_entropy_coef(args), weights=_host_top_entropy(args)).mean(
            "token", over="micro_batch"
        )
    return Objective(terms)


def _host_ratio(args: Any) -> Ratio:
    levels: dict[str, Ratio] = {"token": TokenRatio(), "sequence": GeometricRatio()}
    if args.importance_sampling_level not in levels:
        raise ConfigError(
            f"args.importance_sampling_level: expected 'token' or 'sequence', got {args.importance_sampling_level!r}"
        )
    return levels[args.importance_sampling_level]


def _host_mean(args: Any) -> Mean:
    kind = args.loss_type
    if kind in ("grpo", "sapo"):
        return Mean(unit="sequence", over="micro_batch")
    if kind == "bnpo":
        return Mean(unit="token", over="micro_batch")
    if kind == "dr_grpo":
        if args.max_completion_length is None:
            raise ConfigError("args.max_completion_length: loss_type='dr_grpo' divides by it, got None: set a length")
        return Mean(unit=args.max_completion_length, over="micro_batch")
    if kind == "luspo":
        return Mean(unit=1, over="micro_batch")
    if kind in ("dapo", "cispo", "vespo"):
        return Mean(unit="token", over="generation")
    raise ConfigError(
        "args.loss_type: expected one of 'grpo', 'dr_grpo', 'dapo', 'bnpo', 'cispo', 'sapo', 'luspo', 'vespo', "
        f"got {kind!r}"
    )


def _host_surrogate(args: Any, ratio: Ratio) -> Surrogate:
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    correction, masks = _host_correction(args), _host_masks(args)
    weights = masks if correction is None else (*masks, correction)
    if args.loss_type == "cispo":
        return CISPO(max=high, ratio=ratio, weights=weights)
    if args.loss_type == "sapo":
        return SAPO(tau_pos=args.sapo_temperature_pos, tau_neg=args.sapo_temperature_neg, ratio=ratio, weights=weights)
    if args.loss_type == "vespo":
        return VESPO(
            k_pos=args.vespo_k_pos,
            lambda_pos=max(args.vespo_lambda_pos, 1e-4),  # the host's lower bound
            k_neg=args.vespo_k_neg,
            lambda_neg=max(args.vespo_lambda_neg, 1e-4),
            correction=correction,
            weights=masks,
        )
    return ClippedSurrogate(low=args.epsilon, high=high, cap=args.delta, ratio=ratio, weights=weights)


def _host_masks(args: Any) -> tuple[Weight, ...]:
    delta = args.off_policy_mask_threshold
    return (() if delta is None else (OffPolicySequenceMask(delta=delta),)) + _host_top_entropy(args)


def _host_top_entropy(args: Any) -> tuple[Weight, ...]:
    if args.top_entropy_quantile >= 1.0:
        return ()
    return (TopEntropy(fraction=args.top_entropy_quantile, over="micro_batch"),)


def _host_correction(args: Any) -> SamplerCorrection | None:
    if not (args.use_vllm and args.vllm_importance_sampling_correction):
        return None
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    modes: dict[str, tuple[type[SamplerCorrection], Literal["token", "sequence"]]] = {
        "token_truncate": (TruncatedIS, "token"),
        "token_mask": (MaskedIS, "token"),
        "sequence_truncate": (TruncatedIS, "sequence"),
        "sequence_mask": (MaskedIS, "sequence"),
    }
    if args.vllm_importance_sampling_mode not in modes:
        raise ConfigError(
            f"args.vllm_importance_sampling_mode: expected one of {', '.join(map(repr, modes))}, "
            f"got {args.vllm_importance_sampling_mode!r}"
        )
    correction, level = modes[args.vllm_importance_sampling_mode]
    unbounded = low is None and high is None
    return correction(min=low, max=math.inf if unbounded else high, level=level, unscored="keep")


def _host_entropy_coef(args: Any) -> float | Controller:
    if not args.use_adaptive_entropy:
        return float(args.entropy_coef)
    return EntropyTarget(
        target=args.entropy_target,
        start=args.entropy_coef,
        delta=args.entropy_coef_delta,
        min=args.entropy_coef_min,
        max=args.entropy_coef_max,
    )
