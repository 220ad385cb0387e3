"""What a task is: prompts, and a reward that a program can verify."""

import hashlib
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final, get_args

from datasets import Dataset

from rlstab.errors import ConfigError, RewardError
from rlstab.tasks._attempt import Attempt, described, shown

__all__ = ["EmbeddedTask", "Messages", "Problem", "Split", "Task", "split_of", "text_of"]

Split = Literal["train", "test"]
"""The prompts that are trained on, or those that are held out."""

Messages = Sequence[Mapping[str, Any]]
"""A conversation: messages with `role` and `content`."""

TEST_SHARE = 0.2
DIGITS = "0123456789"


def split_of(key: str) -> Split:
    """The split a problem belongs to: a hash of its key decides, so the splits are disjoint by construction.

    About one problem in five is held out, whatever the order, the seed or the process that asks.

    Args:
        key: the problem's identity; problems with the same key always share a split.

    Returns:
        `"train"` or `"test"`.

    Example:
        >>> [split_of(key) for key in ("apple", "pear", "plum")]
        ['train', 'train', 'test']
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") < TEST_SHARE * 2**64 else "train"


class Task(ABC):
    """Prompts and a verifiable reward: subclass it with `prompts` and `score`, and pass `task.reward` to a trainer.

    `name` identifies the task in logs, `answer_columns` are the dataset columns that `score` reads.

    Example:
        >>> from collections.abc import Mapping
        >>> from datasets import Dataset
        >>> class Echo(Task):
        ...     name = "echo"
        ...     answer_columns = ("answer",)
        ...     def prompts(self, n, *, split="train", seed=0):
        ...         words = [f"{split}{seed}-{index}" for index in range(n)]
        ...         return Dataset.from_dict({"prompt": words, "answer": words})
        ...     def score(self, completion, row):
        ...         return float(completion == row["answer"])
        >>> Echo().reward(["a", "b"], ["a", "a"], answer=["a", "b"])
        [1.0, 0.0]
    """

    name: ClassVar[str]
    answer_columns: ClassVar[tuple[str, ...]]

    @abstractmethod
    def prompts(self, n: int, *, split: Split = "train", seed: int = 0) -> Dataset:
        """`n` prompts of one split, in column `prompt`, with the answer columns beside it.

        Args:
            n: number of rows.
            split: `"train"`, or the held-out `"test"`.
            seed: seed of the draw; the same arguments give the same rows.

        Returns:
            A dataset of `n` rows.
        """

    @abstractmethod
    def score(self, completion: str, row: Mapping[str, Any]) -> float | None:
        """The reward of one completion, 1.0 when it is correct.

        Args:
            completion: the text that the model wrote, without special tokens.
            row: the answer columns of the prompt's row, none of them None.

        Returns:
            A finite number, or None if this completion cannot be judged.
        """

    def scores(self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Sequence[float | None]:
        """The rewards of many completions; override it where scoring them together is faster than one by one.

        Args:
            completions: texts.
            rows: the answer columns of each completion's prompt.
        """
        return [self.score(completion, row) for completion, row in zip(completions, rows, strict=True)]

    @final
    def reward(
        self, prompts: Sequence[str | Messages], completions: Sequence[str | Messages], **columns: Any
    ) -> list[float | None]:
        """Score a batch; the signature is that of a TRL reward function.

        A row whose answer column holds None does not belong to this task and is left unscored.

        Args:
            prompts: the prompts, plain or conversational.
            completions: one completion for each prompt, plain text or a list of messages ending in the answer.
            columns: the dataset's other columns, one value for each prompt; other keyword arguments are ignored.

        Returns:
            One reward for each completion, None where it cannot be judged.

        Raises:
            RewardError: if a length differs from that of `prompts`, an answer column is missing, a completion holds
                no text, or `score` raised, or returned something other than a finite number or None.
        """
        self._check_batch(len(prompts), completions, columns)
        answers = zip(*(columns[column] for column in self.answer_columns), strict=True)
        rows = [dict(zip(self.answer_columns, answer, strict=True)) for answer in answers]
        own = [index for index, row in enumerate(rows) if None not in row.values()]
        texts = [text_of(completions[index], owner=f"task {self.name}") for index in own]
        rewards: list[float | None] = [None] * len(prompts)
        for index, score in zip(own, self._scores(texts, [rows[index] for index in own]), strict=True):
            rewards[index] = score
        return rewards

    def _scores(self, texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """The checked scores; where they cannot be had, an error that names the first completion that fails."""
        with Attempt() as attempt:
            scores = self.scores(texts, rows)
            if len(scores) != len(texts):
                raise RewardError(f"{len(scores)} scores for {len(texts)} completions")
            return [self._checked(score) for score in scores]
        if len(texts) > 1:
            for text, row in zip(texts, rows, strict=True):
                self._scores([text], [row])
        where = f"completion {shown(texts[0])}" if len(texts) == 1 else "no completion fails by itself"
        raise RewardError(f"task {self.name}: {described(attempt.error)}; {where}") from attempt.error

    def _check_batch(self, size: int, completions: Sequence[str | Messages], columns: Mapping[str, Any]) -> None:
        missing = [column for column in self.answer_columns if column not in columns]
        if missing:
            raise RewardError(
                f"task {self.name}: column {missing[0]!r} is missing; the dataset has {sorted(columns)}; "
                "train on the rows of this task's `prompts`"
            )
        lengths = {"completions": len(completions)} | {column: len(columns[column]) for column in self.answer_columns}
        for key, length in lengths.items():
            if length != size:
                raise RewardError(
                    f"task {self.name}: {key} has {length} values; expected one for each of {size} prompts"
                )

    @staticmethod
    def _checked(score: Any) -> float | None:
        if score is None:
            return None
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise RewardError(f"score {score!r}; expected a finite number or None")
        return float(score)


def text_of(completion: str | Messages, *, owner: str) -> str:
    """The text of a completion: itself, or its last message's.

    Args:
        completion: plain text, or messages that end in one with text.
        owner: who asks, for the error.

    Raises:
        RewardError: if there is no text.
    """
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if not isinstance(content, str):
        raise RewardError(f"{owner}: completion {completion!r}; expected text or messages ending in text")
    return content


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem of an embedded task.

    Args:
        prompt: the text shown to the model.
        solution: one correct completion.
        key: the problem's identity for `split_of`.
        answer: the values of the task's answer columns.

    Example:
        >>> Problem(prompt="503=", solution="035", key="035", answer={"answer": "035"}).solution
        '035'
    """

    prompt: str
    solution: str
    key: str
    answer: Mapping[str, Any]


class EmbeddedTask(Task):
    """A task whose problems a few lines of code can draw and solve: nothing is downloaded.

    A subclass gives the characters of its prompts and completions (`alphabet`), the longest completion
    (`completion_length`) and `draw`; prompts, the held-out split and demonstrations follow from these.

    Example:
        >>> class LastDigit(EmbeddedTask):
        ...     name, alphabet, answer_columns = "last_digit", "0123456789=", ("answer",)
        ...     completion_length = 1
        ...     def draw(self, rng):
        ...         digits = f"{rng.randrange(1000):03}"
        ...         return Problem(prompt=f"{digits}=", solution=digits[2], key=digits, answer={"answer": digits[2]})
        ...     def score(self, completion, row):
        ...         return float(completion == row["answer"])
        >>> row = LastDigit().demonstrations(1)[0]
        >>> row["prompt"][2] == row["completion"]
        True
    """

    @property
    @abstractmethod
    def alphabet(self) -> str:
        """The characters of prompts and completions, each once."""

    @property
    @abstractmethod
    def completion_length(self) -> int:
        """Number of characters of the longest correct completion."""

    @abstractmethod
    def draw(self, rng: random.Random) -> Problem:
        """Draw one problem of either split.

        Args:
            rng: the only source of randomness.

        Returns:
            The problem with a correct solution.
        """

    def prompts(self, n: int, *, split: Split = "train", seed: int = 0) -> Dataset:
        """`n` prompts of one split, drawn independently, with the answer columns beside column `prompt`.

        Args:
            n: number of rows.
            split: `"train"`, or the held-out `"test"`; `split_of` keeps them disjoint.
            seed: seed of the draw; the same arguments give the same rows.

        Returns:
            A dataset of `n` rows.

        Raises:
            ConfigError: if `n` is not positive or the split is unknown.
        """
        rng = random.Random(f"{self.name} prompts {split} {seed}")
        problems = self._problems(n, split=split, rng=rng, draw=self._drawn_from(split))
        answers = {column: [problem.answer[column] for problem in problems] for column in self.answer_columns}
        return Dataset.from_dict({"prompt": [problem.prompt for problem in problems], **answers})

    def demonstrations(self, n: int, *, seed: int = 0, noise: float = 0.0) -> Dataset:
        """`n` solved problems of the training split, a share of them with exactly one wrong digit.

        A changed digit always makes the completion incorrect, so `noise` is the expected share of wrong demonstrations.

        Args:
            n: number of rows.
            seed: seed of the draw; the same arguments give the same rows.
            noise: probability that a demonstration is wrong, in [0, 1].

        Returns:
            A dataset of `n` rows with columns `prompt` and `completion`.

        Raises:
            ConfigError: if `n` is not positive or `noise` is no probability.
        """
        rng = random.Random(f"{self.name} demonstrations {seed}")
        problems = self._problems(n, split="train", rng=rng, draw=self.draw)
        completions = self._written(problems, noise, rng)
        return Dataset.from_dict({"prompt": [problem.prompt for problem in problems], "completion": completions})

    def solutions(self, n: int, *, split: Split = "train", seed: int = 0, noise: float = 0.0) -> list[str]:
        """Correct completions of the prompts that `prompts` gives for the same arguments, in their order.

        Args:
            n: number of prompts.
            split: as for `prompts`.
            seed: as for `prompts`.
            noise: probability that a completion has one wrong digit, in [0, 1].

        Returns:
            `n` completions, without an end of sequence.

        Raises:
            ConfigError: if `n` is not positive, the split is unknown or `noise` is no probability.
        """
        rng = random.Random(f"{self.name} prompts {split} {seed}")
        problems = self._problems(n, split=split, rng=rng, draw=self._drawn_from(split))
        return self._written(problems, noise, random.Random(f"{self.name} solutions {seed}"))

    def _written(self, problems: Sequence[Problem], noise: float, rng: random.Random) -> list[str]:
        """The solutions, a share of them with one wrong digit."""
        if not 0.0 <= noise <= 1.0:
            raise ConfigError(f"task {self.name}: noise {noise}; expected a probability between 0 and 1")
        return [
            with_one_wrong_digit(problem.solution, rng) if rng.random() < noise else problem.solution
            for problem in problems
        ]

    def _drawn_from(self, split: Split) -> Callable[[random.Random], Problem]:
        """What draws the problems that are asked in a split; a hook for tasks that ask other ones than they show."""
        return self.draw

    def _problems(
        self, n: int, *, split: Split, rng: random.Random, draw: Callable[[random.Random], Problem]
    ) -> list[Problem]:
        if n < 1:
            raise ConfigError(f"task {self.name}: n {n}; expected at least 1")
        if split not in get_args(Split):
            raise ConfigError(f"task {self.name}: split {split!r}; expected one of {get_args(Split)}")
        problems: list[Problem] = []
        while len(problems) < n:
            problem = draw(rng)
            if split_of(problem.key) == split:
                problems.append(problem)
        return problems


def with_one_wrong_digit(solution: str, rng: random.Random) -> str:
    position = rng.choice([index for index, char in enumerate(solution) if char in DIGITS])
    wrong = rng.choice([digit for digit in DIGITS if digit != solution[position]])
    return solution[:position] + wrong + solution[position + 1 :]
