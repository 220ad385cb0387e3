"""Trainers: TRL's, with a composable objective and the watcher's first signals. The only room that imports trl."""

from rlstab.trainers._arguments import check_composition
from rlstab.trainers._buffer_rows import BufferRows
from rlstab.trainers._checkpoint import latest_checkpoint
from rlstab.trainers._demonstrations import Demonstrations
from rlstab.trainers._distillation import StableDistillationTrainer
from rlstab.trainers._dpo import StableDPOTrainer
from rlstab.trainers._extra_rows import ExtraRow, ExtraRows
from rlstab.trainers._gradients import SteadyGradients, check_unclipped
from rlstab.trainers._grpo import StableGRPOTrainer
from rlstab.trainers._guard import Guard
from rlstab.trainers._guidance import (
    Branching,
    Guidance,
    Hints,
    MicroGroups,
    PrefixSampling,
    Progress,
    WholeDemonstrations,
)
from rlstab.trainers._host import DistillationConfig, GRPOConfig, SFTConfig
from rlstab.trainers._observer import LossCall, Observer
from rlstab.trainers._periodic import Periodically
from rlstab.trainers._progress import ProgressCallback
from rlstab.trainers._recorder import RowListener, StepReader
from rlstab.trainers._references import Teacher
from rlstab.trainers._resample import Resample
from rlstab.trainers._reset import Reset
from rlstab.trainers._rloo import StableRLOOTrainer
from rlstab.trainers._routing import Replay
from rlstab.trainers._sft import TrustRegionSFTTrainer
from rlstab.trainers._sft_rules import check_supervised
from rlstab.trainers._signals import Signals
from rlstab.trainers._stop import GracefulStop
from rlstab.trainers._supply import Supply
from rlstab.trainers._teacher import TeacherServer
from rlstab.trainers._watch import Watch, watch

__all__ = [
    "Branching",
    "BufferRows",
    "Demonstrations",
    "DistillationConfig",
    "ExtraRow",
    "ExtraRows",
    "GRPOConfig",
    "GracefulStop",
    "Guard",
    "Guidance",
    "Hints",
    "LossCall",
    "MicroGroups",
    "Observer",
    "Periodically",
    "PrefixSampling",
    "Progress",
    "ProgressCallback",
    "Replay",
    "Resample",
    "Reset",
    "RowListener",
    "SFTConfig",
    "Signals",
    "StableDPOTrainer",
    "StableDistillationTrainer",
    "StableGRPOTrainer",
    "StableRLOOTrainer",
    "SteadyGradients",
    "StepReader",
    "Supply",
    "Teacher",
    "TeacherServer",
    "TrustRegionSFTTrainer",
    "Watch",
    "WholeDemonstrations",
    "check_composition",
    "check_supervised",
    "check_unclipped",
    "latest_checkpoint",
    "watch",
]
