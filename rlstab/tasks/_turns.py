"""Several attempts at a problem, with nothing but "wrong, try again" between them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from rlstab.errors import RewardError
from rlstab.tasks._checks import check_fields
from rlstab.tasks._reward import Reward, RewardBatch
from rlstab.tasks._task import Task

__all__ = ["TryAgain", "UnaryFeedback"]

TRY_AGAIN = "Incorrect. Please think again."
SOLVED = "Correct!"
CLOSED = "No attempt is left."


@final
class TryAgain:
    """An environment for the host's tools: a policy hands in answers until one is right, or no attempt is left.

    A factory of these is the `environment_factory` of TRL's trainers, which then offer `submit` as a tool; the paper's
    feedback is a user's turn instead. `UnaryFeedback` turns the attempts into a reward.

    Args:
        task: judges the answers; an answer with a reward of 1 or more is right.
        attempts: most answers of one conversation; 5 in the paper.

    Example:
        >>> from functools import partial
        >>> from rlstab.tasks import SortDigits
        >>> environment_factory = partial(TryAgain, SortDigits(digits=3), attempts=5)
        >>> environment = environment_factory()
        >>> environment.reset(prompt="503=", answer="035")
        >>> environment.submit("053"), environment.submit("035")
        ('Incorrect. Please think again.', 'Correct!')

    Reference: A Simple "Try Again" Can Elicit Multi-Turn LLM Reasoning (UFO), https://arxiv.org/abs/2507.14295; words
        as in its code, https://github.com/lichengliu03/unary-feedback.
    """

    def __init__(self, task: Task, attempts: int = 5) -> None:
        self._task = task
        self._attempts = attempts
        self._row: Mapping[str, Any] = {}
        self._answers: list[str] = []
        self._solved = False

    def reset(self, **row: Any) -> None:
        """Begin with another problem.

        Args:
            row: the row of the dataset.
        """
        self._row = {column: row[column] for column in self._task.answer_columns}
        self._answers, self._solved = [], False

    def submit(self, answer: str) -> str:
        """Hand in an answer to the problem.

        Args:
            answer: the answer, in the form that the problem asks for.

        Returns:
            Whether it is correct.
        """
        if self._solved or len(self._answers) == self._attempts:
            return SOLVED if self._solved else CLOSED
        self._answers.append(answer)
        self._solved = (self._task.score(answer, self._row) or 0.0) >= 1.0
        return SOLVED if self._solved else TRY_AGAIN

    @property
    def answers(self) -> list[str]:
        """The answers so far."""
        return list(self._answers)

    @property
    def solved(self) -> bool:
        """Whether the last answer is right."""
        return self._solved


@final
@dataclass(frozen=True, kw_only=True)
class UnaryFeedback(Reward):
    r"""UFO's reward of several attempts: the earlier the better, and no answer twice.

    $\gamma^{t} - \lambda\,(1 - E/T)$ if the answer with index $t$ (from 0) is right, else $-\lambda\,(1 - E/T)$, where
    $E$ of the $T$ answers are different, up to white space and case. Empty answers do not count.

    Args:
        decay: $\gamma$.
        repetition: $\lambda$.

    Raises:
        ConfigError: if a factor is outside [0, 1].

    Example:
        >>> from rlstab.tasks import SortDigits
        >>> environment = TryAgain(SortDigits(digits=3))
        >>> environment.reset(answer="035")
        >>> for answer in ("503", "503", "035"):
        ...     _ = environment.submit(answer)
        >>> [round(reward, 4) for reward in UnaryFeedback()(["503="], ["..."], environments=[environment])]
        [0.0833]

    Reference: UFO, https://arxiv.org/abs/2507.14295; as in its code, https://github.com/lichengliu03/unary-feedback.
    """

    decay: float = 0.5
    repetition: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, {key: (0 <= vars(self)[key] <= 1, "between 0 and 1") for key in ("decay", "repetition")})

    @property
    def columns(self) -> tuple[str, ...]:
        """The environments of the conversations, which the host passes."""
        return ("environments",)

    @property
    def separable(self) -> bool:
        """Each conversation is scored by itself."""
        return True

    def rewards(self, batch: RewardBatch) -> list[float | None]:
        """The rewards.

        Raises:
            RewardError: if an environment is no `TryAgain`.
        """
        return [self._reward(environment) for environment in batch.column("environments")]

    def _reward(self, environment: object) -> float:
        if not isinstance(environment, TryAgain):
            raise RewardError(f"environment {environment!r}; expected TryAgain, by the trainer's environment_factory")
        given = ["".join(answer.split()).casefold() for answer in environment.answers if answer.strip()]
        if not given:
            return 0.0
        solved = self.decay ** (len(given) - 1) if environment.solved else 0.0
        return solved - self.repetition * (1 - len(set(given)) / len(given))
