"""Monitors: detectors that look at signals, rules that say what is out of order, alarms, and the actions they ask for.

Numbers in, alarms out: nothing here holds a tensor or changes a run.
"""

from rlstab.monitors._actions import Action, Note, Notify, RollBack, Scale, SkipStep, Stop
from rlstab.monitors._alarm import Alarm, Change, Due, Evidence, Observed
from rlstab.monitors._baseline import Baseline
from rlstab.monitors._charts import Chart, Cusum, Ewma, PageHinkley, State
from rlstab.monitors._detectors import Detector, Level, NonFinite, Reading, Tracker
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
    "Cusum",
    "Detector",
    "Drift",
    "Due",
    "Evidence",
    "Ewma",
    "Level",
    "Monitor",
    "NonFinite",
    "Note",
    "Notify",
    "Observed",
    "PageHinkley",
    "Reading",
    "RollBack",
    "Rule",
    "Scale",
    "Severity",
    "Side",
    "SkipStep",
    "Spike",
    "State",
    "Stop",
    "Tracker",
    "ValueScale",
    "default_rules",
]
