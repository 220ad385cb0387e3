"""The host's loss arguments as an objective."""

import math
from typing import Any, Literal

from rlstab.errors import ConfigError
from rlstab.losses._clipped import CISPO, SAPO, ClippedSurrogate
from rlstab.losses._controllers import Controller, EntropyTarget
from rlstab.losses._entropy import EntropyBonus
from rlstab.losses._kl import KL
from rlstab.losses._mean import Mean
from rlstab.losses._objective import Objective
from rlstab.losses._policy_gradient import VESPO
from rlstab.losses._ratio import GeometricRatio, Ratio, TokenRatio
from rlstab.losses._sampler_weight import MaskedIS, SamplerCorrection, TruncatedIS
from rlstab.losses._surrogate import Surrogate
from rlstab.losses._term import Term
from rlstab.losses._weight import OffPolicySequenceMask, TopEntropy, Weight


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
