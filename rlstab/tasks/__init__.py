"""Tasks: prompts and verifiable rewards with TRL's reward-function signature; the embedded ones need no download."""

from rlstab.tasks._arithmetic import Arithmetic
from rlstab.tasks._balance import ConvergenceBalance
from rlstab.tasks._bleu import BLEU
from rlstab.tasks._code import UnitTests
from rlstab.tasks._combined import Gated, Product, Refined, Stage, Stepped
from rlstab.tasks._countdown import Countdown
from rlstab.tasks._dialogue import Dialogue
from rlstab.tasks._difficulty_rewards import DifficultyTag, EasyLength
from rlstab.tasks._format_rewards import Accuracy, MatchesPattern, TagFormat
from rlstab.tasks._function import FunctionReward
from rlstab.tasks._hackable import HackableSort, HackableTask, Proxy
from rlstab.tasks._hub import HubTask
from rlstab.tasks._knights import KnightsAndKnaves
from rlstab.tasks._length_rewards import CosineLength, LengthUnit, OverlongPenalty, RelativeLength
from rlstab.tasks._reasoning_gym import ReasoningGymTask
from rlstab.tasks._restarts import RestartBonus, restart_row
from rlstab.tasks._reward import Correct, Reward, RewardBatch, RewardFunction, SampleReward, reward_functions
from rlstab.tasks._running_sum import RunningSum
from rlstab.tasks._sampling import choose_temperature, draw_prompts, drop_thoughts, prompt_influence, reward_pass_at
from rlstab.tasks._scorers import ExactAnswer, MathAnswer, Scorer
from rlstab.tasks._sort_digits import SortDigits
from rlstab.tasks._task import EmbeddedTask, Messages, Problem, Split, Task, split_of
from rlstab.tasks._trust import TrustedThinking
from rlstab.tasks._turns import TryAgain, UnaryFeedback
from rlstab.tasks._two_skills import TwoSkills

__all__ = [
    "BLEU",
    "Accuracy",
    "Arithmetic",
    "ConvergenceBalance",
    "Correct",
    "CosineLength",
    "Countdown",
    "Dialogue",
    "DifficultyTag",
    "EasyLength",
    "EmbeddedTask",
    "ExactAnswer",
    "FunctionReward",
    "Gated",
    "HackableSort",
    "HackableTask",
    "HubTask",
    "KnightsAndKnaves",
    "LengthUnit",
    "MatchesPattern",
    "MathAnswer",
    "Messages",
    "OverlongPenalty",
    "Problem",
    "Product",
    "Proxy",
    "ReasoningGymTask",
    "Refined",
    "RelativeLength",
    "RestartBonus",
    "Reward",
    "RewardBatch",
    "RewardFunction",
    "RunningSum",
    "SampleReward",
    "Scorer",
    "SortDigits",
    "Split",
    "Stage",
    "Stepped",
    "TagFormat",
    "Task",
    "TrustedThinking",
    "TryAgain",
    "TwoSkills",
    "UnaryFeedback",
    "UnitTests",
    "choose_temperature",
    "draw_prompts",
    "drop_thoughts",
    "prompt_influence",
    "restart_row",
    "reward_functions",
    "reward_pass_at",
    "split_of",
]
