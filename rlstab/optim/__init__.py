"""Gradient and optimizer stabilisers: what happens between backward and the update. Torch only."""

from rlstab.optim._gradients import Chain, Decision, GradientStabiliser, global_norm
from rlstab.optim._skip import SkipSpikes
from rlstab.optim._spam import SPAM, StableSPAM
from rlstab.optim._zclip import ZClip

__all__ = [
    "SPAM",
    "Chain",
    "Decision",
    "GradientStabiliser",
    "SkipSpikes",
    "StableSPAM",
    "ZClip",
    "global_norm",
]
