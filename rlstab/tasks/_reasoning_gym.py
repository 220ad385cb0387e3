"""The procedurally generated data sets of reasoning-gym, as tasks."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Any, ClassVar, final

from datasets import Dataset

from rlstab.errors import ConfigError
from rlstab.tasks._checks import check_fields
from rlstab.tasks._task import Split, Task, split_of

__all__ = ["ReasoningGymTask"]

CHUNK = 1000  # problems of one generator: some make all of theirs at once
CHUNKS = 4096  # generators of one seed
MOST_TRIES = 100  # problems drawn for each that is asked for


@final
@dataclass(frozen=True, kw_only=True)
class ReasoningGymTask(Task):
    """A data set of reasoning-gym by name, with its own verifier; needs the extra `tasks`.

    The verifiers give partial credit, also to text around a right answer, so the answer is taken out of its tag first.
    A hash of the question decides on the split, so no held-out question is ever trained on.

    Args:
        dataset: name, as `"countdown"` or `"knights_knaves"`.
        parameters: arguments of the data set's configuration, most of them knobs of difficulty; size and seed are not
            among them.
        instruction: what is appended to each question; `{tag}` stands for the tag's name.
        tag: name of the tag around the answer; the last one counts, and a completion without one earns 0.
        partial: pass the verifier's score on, partial credit included; else the reward is 1 for full score and 0 below.
        chat: whether prompts are messages, for the tokenizer's chat template; else they are plain text.

    Raises:
        ConfigError: if reasoning-gym is not installed, or does not know the name or a parameter.

    Reference: Reasoning Gym, https://github.com/open-thought/reasoning-gym.
    """

    name: ClassVar[str] = "reasoning_gym"
    answer_columns: ClassVar[tuple[str, ...]] = ("generator", "index")

    dataset: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    instruction: str = "Give the final answer between <{tag}> and </{tag}>."
    tag: str = "answer"
    partial: bool = False
    chat: bool = True

    def __post_init__(self) -> None:
        check_fields(self, {"tag": (re.fullmatch(r"\w+", self.tag) is not None, "letters, digits and underscores")})
        self._generator(0)

    def prompts(self, n: int, *, split: Split = "train", seed: int = 0) -> Dataset:
        """`n` prompts of one split, with what identifies their problems beside them.

        Raises:
            ConfigError: if `n` is not positive, or the data set has too few different questions for the split.
        """
        if n < 1:
            raise ConfigError(f"task {self.name}: n {n}; expected at least 1")
        rows: list[dict[str, Any]] = []
        for tries, (generator, index) in enumerate(self._problems(seed)):
            if len(rows) == n:
                break
            if tries == MOST_TRIES * n + CHUNK:
                raise ConfigError(
                    f"task {self.name}: {n} prompts of split {split!r}; found {len(rows)} among {tries} problems of "
                    f"{self.dataset!r}: raise its difficulty, or ask for fewer"
                )
            question = self._entry(generator, index)["question"]
            if split_of(question) == split:
                rows.append({"prompt": self._prompt(question), "generator": generator, "index": index})
        return Dataset.from_list(rows)

    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        """The verifier's score of what stands in the last tag."""
        answers = re.findall(rf"<{self.tag}>(.*?)</{self.tag}>", completion, re.DOTALL)
        if not answers:
            return 0.0
        entry = self._entry(row["generator"], row["index"])
        credit = float(self._generator(row["generator"]).score_answer(answers[-1].strip(), entry))
        return credit if self.partial else float(credit >= 1.0)

    def _problems(self, seed: int) -> Iterator[tuple[int, int]]:
        for chunk in range(CHUNKS):
            for index in range(CHUNK):
                yield (seed * CHUNKS + chunk) * CHUNK, index

    def _generator(self, seed: int) -> Any:
        return _generator(self.dataset, json.dumps(dict(self.parameters), sort_keys=True), seed)

    def _entry(self, generator: int, index: int) -> Any:
        return _entry(self.dataset, json.dumps(dict(self.parameters), sort_keys=True), generator, index)

    def _prompt(self, question: str) -> Any:
        text = f"{question}\n\n{self.instruction.format(tag=self.tag)}"
        return [{"role": "user", "content": text}] if self.chat else text


@cache
def _generator(name: str, parameters: str, seed: int) -> Any:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ConfigError(
            "ReasoningGymTask needs reasoning-gym, which is not installed: pip install 'rlstab[tasks]'"
        ) from error
    if name not in DATASETS:
        near = get_close_matches(name, DATASETS, n=3, cutoff=0.0)
        raise ConfigError(
            f"ReasoningGymTask: dataset {name!r} is none of the {len(DATASETS)} of reasoning-gym; nearest: "
            f"{', '.join(near)}"
        )
    try:
        return create_dataset(name, **json.loads(parameters), size=CHUNK, seed=seed)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"ReasoningGymTask: dataset {name!r} refuses parameters {parameters}: {error}") from error


@cache
def _entry(name: str, parameters: str, seed: int, index: int) -> Any:
    """A problem, kept: not every data set gives the same one again."""
    return _generator(name, parameters, seed)[index]
