"""A data set of the Hugging Face Hub, or of one's own files, as a task."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from rlstab.errors import ConfigError
from rlstab.tasks._scorers import Scorer, answer_text
from rlstab.tasks._task import Split, Task

__all__ = ["HubTask"]


@final
@dataclass(frozen=True, kw_only=True)
class HubTask(Task):
    """Questions and answers of a data set, scored by a `Scorer`.

    Args:
        dataset: name on the Hub, or folder with data files named after their splits, as `train.jsonl`.
        scorer: compares completion and answer.
        config: configuration of the data set, where it has several.
        revision: commit, tag or branch.
        question: column of the question: text, or messages.
        answer: column of the answer; a list, such as a program's tests, is joined by line breaks.
        answer_pattern: regular expression found in the answer column; its first group is the answer.
        system: system message before each question.
        chat: whether prompts are messages, for the tokenizer's chat template; else they are plain text.
        train: split to train on, slices as `train[:90%]` included.
        test: split held out.
        keep: further columns, kept under their names for reward parts that read them.

    Raises:
        ConfigError: if training and held-out split are the same, if the pattern has no group, or if plain text is asked
            for together with a system message.

    Example:
        >>> from rlstab.tasks import ExactAnswer
        >>> task = HubTask(dataset="openai/gsm8k", config="main", scorer=ExactAnswer(), answer_pattern=r"#### (.+)")
        >>> task.reward(["6 · 12 = ?"] * 2, ["72", "71"], answer=["72", "72"])
        [1.0, 0.0]
    """

    name: ClassVar[str] = "hub"
    answer_columns: ClassVar[tuple[str, ...]] = ("answer",)

    dataset: str
    scorer: Scorer
    config: str | None = None
    revision: str | None = None
    question: str = "question"
    answer: str = "answer"
    answer_pattern: str | None = None
    system: str | None = None
    chat: bool = True
    train: str = "train"
    test: str = "test"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.train == self.test:
            raise ConfigError(f"HubTask: train and test are both {self.train!r}; expected two disjoint splits")
        if self.system is not None and not self.chat:
            raise ConfigError("HubTask: a system message needs chat: true")
        if {"prompt", "answer"} & set(self.keep):
            raise ConfigError(f"HubTask: keep {self.keep}; expected other columns than 'prompt' and 'answer'")
        try:
            groups = 1 if self.answer_pattern is None else re.compile(self.answer_pattern).groups
        except re.error as error:
            raise ConfigError(
                f"HubTask: answer_pattern {self.answer_pattern!r} is no regular expression: {error}"
            ) from error
        if groups < 1:
            raise ConfigError(
                f"HubTask: answer_pattern {self.answer_pattern!r} has no group; put the answer in parentheses"
            )

    def prompts(self, n: int, *, split: Split = "train", seed: int = 0) -> Dataset:
        """`n` rows of a split in a random order, with columns `prompt`, `answer` and those to `keep`.

        Raises:
            ConfigError: if the data set cannot be loaded, lacks a column or has fewer rows, or if an answer does not
                match the pattern.
        """
        rows = self._load(self.train if split == "train" else self.test)
        missing = [column for column in (self.question, self.answer, *self.keep) if column not in rows.column_names]
        if missing:
            raise ConfigError(f"HubTask: {self.dataset} has no column {missing[0]!r}; there are {rows.column_names}")
        if not 1 <= n <= len(rows):
            raise ConfigError(
                f"HubTask: {n} prompts of split {split!r}; {self.dataset} has {len(rows)}, ask for 1 to that many"
            )
        chosen = rows.shuffle(seed=seed).select(range(n))
        prompts = [self._prompt(question) for question in chosen[self.question]]
        answers = [self._answer(text) for text in chosen[self.answer]]
        kept = {column: chosen[column][:] for column in self.keep}
        return Dataset.from_dict({"prompt": prompts, "answer": answers, **kept})

    def score(self, completion: str, row: Mapping[str, Any]) -> float | None:
        """The scorer's verdict."""
        return self.scorer.score(completion, row["answer"])

    def scores(self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """The scorer's verdicts."""
        return self.scorer.scores(completions, [row["answer"] for row in rows])

    def _load(self, split: str) -> Dataset:
        try:
            return load_dataset(self.dataset, self.config, split=split, revision=self.revision)
        except (OSError, ValueError, DatasetsError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"HubTask: split {split!r} of dataset {self.dataset!r} cannot be loaded: {reason}"
            ) from error

    def _prompt(self, question: Any) -> Any:
        if not self.chat:
            return question
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        return messages if self.system is None else [{"role": "system", "content": self.system}, *messages]

    def _answer(self, text: Any) -> str:
        if self.answer_pattern is None:
            return answer_text(text)
        found = re.search(self.answer_pattern, str(text))
        if found is None:
            raise ConfigError(f"HubTask: answer_pattern {self.answer_pattern!r} is not found in the answer {text!r}")
        return found[1]
