"""Monitors: detectors that look at signals, rules that say what is out of order, alarms, and the actions they ask for.

Numbers in, alarms out: nothing here holds a tensor or changes a run.
"""

from rlstab.monitors._actions import Action, Note, Notify, RollBack, Scale, SkipStep, Stop
from rlstab.monitors._alarm import Alarm, Change, Due, Evidence, Observed
from rlstab.monitors._baseline import Baseline
from rlstab.monitors._charts import Chart, Cusum, Ewma, PageHinkley, State
from rlstab.monitors._detectors import Detector, Level, NonFinite, Reading, Tracker
from rlstab.monitors._diagnosis import diagnose, explanations
from rlstab.monitors._diagnosis_data import (
    Claim,
    Config,
    Curve,
    Diagnosis,
    Edit,
    Explanation,
    Happening,
    RunState,
    Sighting,
    Sign,
    Trace,
)
from rlstab.monitors._fall import Fall
from rlstab.monitors._laws import Crossing, HeldOutGap, RewardKLLaw, Surprise
from rlstab.monitors._monitor import Monitor
from rlstab.monitors._relative import Drift, Side, Spike, ValueScale
from rlstab.monitors._rules import CAUSES, Cause, Rule, Severity, default_rules

__all__ = [
    "CAUSES",
    "Action",
    "Alarm",
    "Baseline",
    "Cause",
    "Change",
    "Chart",
    "Claim",
    "Config",
    "Crossing",
    "Curve",
    "Cusum",
    "Detector",
    "Diagnosis",
    "Drift",
    "Due",
    "Edit",
    "Evidence",
    "Ewma",
    "Explanation",
    "Fall",
    "Happening",
    "HeldOutGap",
    "Level",
    "Monitor",
    "NonFinite",
    "Note",
    "Notify",
    "Observed",
    "PageHinkley",
    "Reading",
    "RewardKLLaw",
    "RollBack",
    "Rule",
    "RunState",
    "Scale",
    "Severity",
    "Side",
    "Sighting",
    "Sign",
    "SkipStep",
    "Spike",
    "State",
    "Stop",
    "Surprise",
    "Trace",
    "Tracker",
    "ValueScale",
    "default_rules",
    "diagnose",
    "explanations",
]
