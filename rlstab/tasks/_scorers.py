"""How a completion is compared with the answer of a dataset's row."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from rlstab.errors import ConfigError

__all__ = ["ExactAnswer", "MathAnswer", "Scorer"]


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

    Raises:
        ConfigError: if math-verify is not installed.

    Reference: Math-Verify, https://github.com/huggingface/Math-Verify.
    """

    def __post_init__(self) -> None:
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "MathAnswer needs math-verify, which is not installed: pip install 'rlstab[tasks]'"
            ) from error

    def score(self, completion: str, answer: str) -> float | None:
        """Compare the expressions."""
        from math_verify import parse, verify

        right = parse(answer if "boxed" in answer else rf"\boxed{{{answer.strip().strip('$')}}}")
        return float(verify(right, parse(completion))) if right else None
