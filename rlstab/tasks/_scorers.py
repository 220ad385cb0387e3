"""How a completion is compared with the answer of a dataset's row."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, final

from rlstab.errors import ConfigError, RewardError
from rlstab.tasks._checks import check_fields
from rlstab.tasks._worker import worker

__all__ = ["ExactAnswer", "MathAnswer", "Scorer", "answer_text"]

MATH = str(Path(__file__).with_name("_math_main.py"))


def answer_text(value: object) -> str:
    r"""A right answer as text: of several, as the tests of a program, one on each line.

    >>> answer_text(["assert f(1) == 1", "assert f(2) == 4"])
    'assert f(1) == 1\nassert f(2) == 4'
    """
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


class Scorer(ABC):
    """Compares a completion with the right answer.

    Example:
        >>> class Contains(Scorer):
        ...     def score(self, completion, answer):
        ...         return float(answer in completion)
        >>> Contains().score("It is Monday.", "Monday")
        1.0
    """

    @abstractmethod
    def score(self, completion: str, answer: str) -> float | None:
        """The reward of one completion.

        Args:
            completion: the text that the model wrote.
            answer: the right answer.

        Returns:
            A finite number, 1 for a right completion, or None if it cannot be judged.
        """

    def scores(self, completions: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        """The rewards of many completions, each with its own right answer."""
        return [self.score(completion, answer) for completion, answer in zip(completions, answers, strict=True)]


@final
@dataclass(frozen=True, kw_only=True)
class ExactAnswer(Scorer):
    """1 if the completion is the answer, surrounding white space aside, else 0.

    Args:
        after: text that announces the answer, as `Answer:`; what stands after its last occurrence is compared, and a
            completion without it is wrong. None compares the whole completion.

    Example:
        >>> ExactAnswer(after="Answer:").score("Sunday comes next. Answer: Monday", "Monday")
        1.0
    """

    after: str | None = None

    def score(self, completion: str, answer: str) -> float:
        """Compare the texts."""
        _, found, given = ("", True, completion) if self.after is None else completion.rpartition(self.after)
        return float(bool(found) and given.strip() == answer.strip())


@final
@dataclass(frozen=True, kw_only=True)
class MathAnswer(Scorer):
    r"""1 if the completion's final expression equals the answer as mathematics, else 0; needs math-verify.

    The answer may be a number or LaTeX, with or without delimiters: `1,234` equals `\boxed{1234}`, `\frac{1}{2}` equals
    `0.5`. A row whose answer is no expression cannot be judged.

    math-verify guards its time by signals, which work in a process's main thread only. Here it runs in a process of its
    own, so any thread may ask; the process is killed, and started anew, when an expression is beyond its limits.

    Args:
        timeout: seconds for one comparison.
        memory: most address space of the process, in MiB.
        late: what becomes of a completion whose comparison takes longer, or too much memory: `"wrong"`, as math-verify
            has it, `"none"` for unjudged, or `"raise"`.

    Raises:
        ConfigError: if math-verify is not installed, or a limit is not positive.

    Reference: Math-Verify, https://github.com/huggingface/Math-Verify.
    """

    timeout: float = 5.0
    memory: int = 4096
    late: Literal["wrong", "none", "raise"] = "wrong"

    def __post_init__(self) -> None:
        if find_spec("math_verify") is None:
            raise ConfigError("MathAnswer needs math-verify, which is not installed: pip install 'rlstab[tasks]'")
        check_fields(
            self, {"timeout": (self.timeout > 0, "seconds above 0"), "memory": (self.memory > 0, "MiB above 0")}
        )

    def score(self, completion: str, answer: str) -> float | None:
        """Compare the expressions.

        Raises:
            RewardError: if the comparison is beyond its limits and `late` is `"raise"`.
        """
        try:
            equal = worker(MATH, "compare", memory=self.memory).call(completion, answer, timeout=self.timeout)
        except RewardError:
            if self.late == "raise":
                raise
            return 0.0 if self.late == "wrong" else None
        return None if equal is None else float(equal)
