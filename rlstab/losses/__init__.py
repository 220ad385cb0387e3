"""Loss terms, ratios, weights, divergences, advantages and their composition. Torch only.

A `Term` maps a `TokenBatch` to an unreduced loss; an `Objective` is a named sum of terms.
"""

if __name__ != "rlstab.losses":
    raise ImportError(
        f"this room is rlstab.losses; imported as {__name__!r} it would be a second copy: use 'import rlstab.losses'"
    )

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
from rlstab.losses._conflict import ConflictMask, ConflictWeight, EntropyFilter
from rlstab.losses._controllers import Controller, EntropyTarget, Linear
from rlstab.losses._covariance import KLCov, TopCovariance, covariance
from rlstab.losses._mean import Mean
from rlstab.losses._metrics import Hist, Max, Metric, Min, Sum, Total
from rlstab.losses._objective import Objective, ObjectiveLoss, TermReport
from rlstab.losses._parts import Needs, Part, Prepared, RolloutPart, StepStatistic, prepared_parts, run_parts
from rlstab.losses._ratio import Ratio, TokenRatio
from rlstab.losses._surrogate import Surrogate, clipped_surrogate
from rlstab.losses._term import Loss, Term, term_name
from rlstab.losses._weight import Factor, SamplerCorrection, Weight

__all__ = [
    "GFPO",
    "OPO",
    "Advantage",
    "BatchStd",
    "ConflictMask",
    "ConflictWeight",
    "Controller",
    "EntropyFilter",
    "EntropyTarget",
    "Factor",
    "GPGAdvantage",
    "GroupAdvantage",
    "GroupCenter",
    "GroupNorm",
    "Groups",
    "Hist",
    "KLCov",
    "LeaveOneOut",
    "Linear",
    "Loss",
    "Max",
    "Mean",
    "Metric",
    "Min",
    "Needs",
    "Objective",
    "ObjectiveLoss",
    "Part",
    "Prepared",
    "Ratio",
    "ReMax",
    "ReinforcePP",
    "ReinforcePPBaseline",
    "RolloutPart",
    "SamplerCorrection",
    "SigmaFilter",
    "StepStatistic",
    "Sum",
    "Surrogate",
    "Term",
    "TermReport",
    "TokenRatio",
    "TopCovariance",
    "Total",
    "Weight",
    "clipped_surrogate",
    "covariance",
    "prepared_parts",
    "run_parts",
    "term_name",
]
