"""Tasks: prompts and verifiable rewards with TRL's reward-function signature; the embedded ones need no download."""

from rlstab.tasks._countdown import Countdown
from rlstab.tasks._hub import HubTask
from rlstab.tasks._scorers import ExactAnswer, MathAnswer, Scorer
from rlstab.tasks._sort_digits import SortDigits
from rlstab.tasks._task import EmbeddedTask, Problem, Split, Task, split_of

__all__ = [
    "Countdown",
    "EmbeddedTask",
    "ExactAnswer",
    "HubTask",
    "MathAnswer",
    "Problem",
    "Scorer",
    "SortDigits",
    "Split",
    "Task",
    "split_of",
]
