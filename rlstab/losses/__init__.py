"""Loss terms, ratios, weights, divergences, advantages and their composition. Torch only.

A `Term` maps a `TokenBatch` to an unreduced loss; an `Objective` is a named sum of terms.
"""

if __name__ != "rlstab.losses":
    raise ImportError(
        f"this room is rlstab.losses; imported as {__name__!r} it would be a second copy: use 'import rlstab.losses'"
    )

from rlstab.losses import presets
from rlstab.losses._advantage import (
    GFPO,
    OPO,
    Advantage,
    BatchStd,
    GPGAdvantage,
    GroupAdvantage,
    GroupCenter,
    GroupNorm,
    Groups,
    LeaveOneOut,
    ReinforcePP,
    ReinforcePPBaseline,
    ReMax,
    SigmaFilter,
)
from rlstab.losses._catalogue import Method, method_of
from rlstab.losses._clipped import (
    CISPO,
    GMPO,
    SAPO,
    ClippedSurrogate,
)
from rlstab.losses._conflict import ConflictMask, ConflictWeight, EntropyFilter
from rlstab.losses._constraint import ConstraintKL, Satisfied
from rlstab.losses._controllers import Controller, EntropyTarget, Linear
from rlstab.losses._covariance import KLCov, TopCovariance
from rlstab.losses._covariance_band import ClipCov, CovarianceSample, EntropyCovariance, MeanCovariance
from rlstab.losses._divergence import Divergence, warn_overflow
from rlstab.losses._divergences import (
    AlphaDivergence,
    ChiSquared,
    ChiSquaredMixture,
    ForwardKL,
    GeneralizedJSD,
    Hellinger,
    Jeffreys,
    JensenShannon,
    ReverseChiSquared,
    ReverseKL,
    SkewJSD,
    SoftenedKL,
)
from rlstab.losses._entropy import EntropyBonus, KeptShare
from rlstab.losses._entropy_law import EntropyLaw
from rlstab.losses._estimate import Estimate
from rlstab.losses._exact import CauchySchwarz, exact_divergence, exact_kl, exact_statistics
from rlstab.losses._expert import (
    EXPERT_PREFIX,
    DemonstrationSurrogate,
    OutcomeLikelihood,
    PrefixEntropy,
    PrefixEntropyThreshold,
    expert_prefix,
)
from rlstab.losses._imitation import CHORD, DFT, PSFT, SFT, EntropySFT, Imitation, ImportanceSFT, PolicyShaping, TrSFT
from rlstab.losses._kl import KL
from rlstab.losses._mean import Mean
from rlstab.losses._metrics import Hist, Max, Metric, Min, Sum, Total, token_mean
from rlstab.losses._mismatch import (
    MISMATCH_COLUMNS,
    clustered_mean,
    clustered_ratio,
    mismatch_rows,
    mismatch_values,
)
from rlstab.losses._mismatch_buckets import PROBABILITY_BUCKETS, bucket_rows, bucket_values
from rlstab.losses._objective import Objective, ObjectiveLoss, TermReport
from rlstab.losses._over_vocabulary import (
    AdaptiveAlpha,
    ClippedAlpha,
    EntropyBalancedKL,
    GuidedKL,
    VocabularyTerm,
    ZLoss,
)
from rlstab.losses._parts import Needs, Part, Prepared, RolloutPart, StepStatistic, prepared_parts, run_parts
from rlstab.losses._policy_gradient import (
    VESPO,
    AStarPO,
    ImportanceSurrogate,
    PolicyGradient,
    optimal_value,
)
from rlstab.losses._ratio import GeometricRatio, GSPOTokenRatio, PreClippedRatio, Ratio, SequenceRatio, TokenRatio
from rlstab.losses._rewards import (
    MixedGroups,
    MixedGroupsOnly,
    SoftOverlong,
    Unsolved,
    UnsolvedOnly,
    soft_overlong,
    thinking_trust,
    trusted_rewards,
)
from rlstab.losses._router_shift import RouterShiftRatio, router_shift
from rlstab.losses._rpg import RPG, rpg_penalty
from rlstab.losses._sampler_weight import (
    GeometricRejection,
    MaskedIS,
    SamplerCorrection,
    SamplerWeight,
    TruncatedIS,
    Veto,
)
from rlstab.losses._schedules import AdaptiveKL, Cosine, DynamicKL
from rlstab.losses._streamed import Statistic, streamed_statistics
from rlstab.losses._streamed_head import Head
from rlstab.losses._surrogate import RatioSurrogate, Surrogate
from rlstab.losses._switch import GradientSwitch
from rlstab.losses._term import Loss, Term, term_name
from rlstab.losses._top_k import top_k_divergence
from rlstab.losses._trust_region import TotalVariationMask
from rlstab.losses._weight import (
    EntropyThreshold,
    Factor,
    OffPolicySequenceMask,
    TopEntropy,
    TruncatedCompletions,
    Weight,
)
from rlstab.losses._weighted import ImplicitReward, ScoreWeight, Weighted, score_weight

__all__ = [
    "CHORD",
    "CISPO",
    "DFT",
    "EXPERT_PREFIX",
    "GFPO",
    "GMPO",
    "KL",
    "MISMATCH_COLUMNS",
    "OPO",
    "PROBABILITY_BUCKETS",
    "PSFT",
    "RPG",
    "SAPO",
    "SFT",
    "VESPO",
    "AStarPO",
    "AdaptiveAlpha",
    "AdaptiveKL",
    "Advantage",
    "AlphaDivergence",
    "BatchStd",
    "CauchySchwarz",
    "ChiSquared",
    "ChiSquaredMixture",
    "ClipCov",
    "ClippedAlpha",
    "ClippedSurrogate",
    "ConflictMask",
    "ConflictWeight",
    "ConstraintKL",
    "Controller",
    "Cosine",
    "CovarianceSample",
    "DemonstrationSurrogate",
    "Divergence",
    "DynamicKL",
    "EntropyBalancedKL",
    "EntropyBonus",
    "EntropyCovariance",
    "EntropyFilter",
    "EntropyLaw",
    "EntropySFT",
    "EntropyTarget",
    "EntropyThreshold",
    "Estimate",
    "Factor",
    "ForwardKL",
    "GPGAdvantage",
    "GSPOTokenRatio",
    "GeneralizedJSD",
    "GeometricRatio",
    "GeometricRejection",
    "GradientSwitch",
    "GroupAdvantage",
    "GroupCenter",
    "GroupNorm",
    "Groups",
    "GuidedKL",
    "Head",
    "Hellinger",
    "Hist",
    "Imitation",
    "ImplicitReward",
    "ImportanceSFT",
    "ImportanceSurrogate",
    "Jeffreys",
    "JensenShannon",
    "KLCov",
    "KeptShare",
    "LeaveOneOut",
    "Linear",
    "Loss",
    "MaskedIS",
    "Max",
    "Mean",
    "MeanCovariance",
    "Method",
    "Metric",
    "Min",
    "MixedGroups",
    "MixedGroupsOnly",
    "Needs",
    "Objective",
    "ObjectiveLoss",
    "OffPolicySequenceMask",
    "OutcomeLikelihood",
    "Part",
    "PolicyGradient",
    "PolicyShaping",
    "PreClippedRatio",
    "PrefixEntropy",
    "PrefixEntropyThreshold",
    "Prepared",
    "Ratio",
    "RatioSurrogate",
    "ReMax",
    "ReinforcePP",
    "ReinforcePPBaseline",
    "ReverseChiSquared",
    "ReverseKL",
    "RolloutPart",
    "RouterShiftRatio",
    "SamplerCorrection",
    "SamplerWeight",
    "Satisfied",
    "ScoreWeight",
    "SequenceRatio",
    "SigmaFilter",
    "SkewJSD",
    "SoftOverlong",
    "SoftenedKL",
    "Statistic",
    "StepStatistic",
    "Sum",
    "Surrogate",
    "Term",
    "TermReport",
    "TokenRatio",
    "TopCovariance",
    "TopEntropy",
    "Total",
    "TotalVariationMask",
    "TrSFT",
    "TruncatedCompletions",
    "TruncatedIS",
    "Unsolved",
    "UnsolvedOnly",
    "Veto",
    "VocabularyTerm",
    "Weight",
    "Weighted",
    "ZLoss",
    "bucket_rows",
    "bucket_values",
    "clustered_mean",
    "clustered_ratio",
    "exact_divergence",
    "exact_kl",
    "exact_statistics",
    "expert_prefix",
    "method_of",
    "mismatch_rows",
    "mismatch_values",
    "optimal_value",
    "prepared_parts",
    "presets",
    "router_shift",
    "rpg_penalty",
    "run_parts",
    "score_weight",
    "soft_overlong",
    "streamed_statistics",
    "term_name",
    "thinking_trust",
    "token_mean",
    "top_k_divergence",
    "trusted_rewards",
    "warn_overflow",
]
