"""An embedded task as a conversation in which answers are handed in by a tool."""

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, final

from datasets import Dataset

from rlstab.tasks._checks import check_fields
from rlstab.tasks._sort_digits import SortDigits
from rlstab.tasks._task import EmbeddedTask, Problem, Split, with_one_wrong_digit
from rlstab.tasks._turns import SOLVED, TRY_AGAIN

__all__ = ["Dialogue"]

CALL = re.compile(r"submit\(answer=([^)]*)\)")


@final
@dataclass(frozen=True, kw_only=True)
class Dialogue(EmbeddedTask):
    """Another embedded task, asked in a conversation and answered by a call: `submit(answer=035)`.

    With the environment `TryAgain` a policy has several attempts. Demonstrations show all of it: each is one answer,
    after as many wrong ones as were drawn, or the silence after a right one.

    Args:
        task: what is asked.
        attempts: most answers of a demonstrated conversation.

    Raises:
        ConfigError: if there are none.

    Example:
        >>> task = Dialogue(task=SortDigits(digits=3))
        >>> task.prompts(1)[0]["prompt"]
        [{'role': 'user', 'content': '959='}]
        >>> task.score("submit(answer=035)", {"answer": '{"answer": "035"}'})
        1.0

    Reference: A Simple "Try Again" Can Elicit Multi-Turn LLM Reasoning (UFO), https://arxiv.org/abs/2507.14295.
    """

    name: ClassVar[str] = "dialogue"
    answer_columns: ClassVar[tuple[str, ...]] = ("answer",)

    task: EmbeddedTask = field(default_factory=SortDigits)
    attempts: int = 5

    def __post_init__(self) -> None:
        check_fields(self, {"attempts": (self.attempts >= 1, "at least 1")})

    @property
    def alphabet(self) -> str:
        """The characters of the task; those of conversations are the tokenizer's."""
        return self.task.alphabet

    @property
    def completion_length(self) -> int:
        """Number of characters of a call."""
        return len(_call("")) + self.task.completion_length

    def draw(self, rng: random.Random) -> Problem:
        """Draw a problem, whose solution is a call."""
        return _called(self.task.draw(rng))

    def score(self, completion: str, row: Mapping[str, Any]) -> float | None:
        """The task's verdict on the answer, called or bare."""
        call = CALL.fullmatch(completion)
        return self.task.score(call[1] if call else completion, json.loads(row["answer"]))

    def prompts(self, n: int, *, split: Split = "train", seed: int = 0) -> Dataset:
        """The task's prompts, each the message of a user."""
        rows = super().prompts(n, split=split, seed=seed)
        asked = [[_user(text)] for text in rows["prompt"]]
        return Dataset.from_dict({**rows.to_dict(), "prompt": asked})

    def demonstrations(self, n: int, *, seed: int = 0, noise: float = 0.0) -> Dataset:
        """`n` answers, each with the conversation before it; in one of `attempts + 1` the problem is solved already.

        Args:
            n: number of rows.
            seed: seed of the draw; the same arguments give the same rows.
            noise: probability that an answer is wrong, in [0, 1].

        Returns:
            A dataset of `n` rows with columns `prompt`, a conversation, and `completion`, a text.
        """
        rng = random.Random(f"{self.name} demonstrations {seed}")
        problems = self._problems(n, split="train", rng=rng, draw=self.draw)
        written = self._written(problems, noise, rng)
        prompts, completions = [], []
        for problem, answer in zip(problems, written, strict=True):
            turn = rng.randrange(self.attempts + 1)
            solved = turn == self.attempts
            failed = [with_one_wrong_digit(problem.solution, rng) for _ in range(0 if solved else turn)]
            before = [(call, TRY_AGAIN) for call in failed] + [(problem.solution, SOLVED)] * solved
            prompts.append([_user(problem.prompt), *(message for turn in before for message in _turn(*turn))])
            completions.append("" if solved else answer)
        return Dataset.from_dict({"prompt": prompts, "completion": completions})

    def _drawn_from(self, split: Split) -> Callable[[random.Random], Problem]:
        draw = self.task._drawn_from(split)
        return lambda rng: _called(draw(rng))


def _call(answer: str) -> str:
    return f"submit(answer={answer})"


def _called(problem: Problem) -> Problem:
    return replace(problem, solution=_call(problem.solution), answer={"answer": json.dumps(problem.answer)})


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _turn(call: str, feedback: str) -> list[dict[str, str]]:
    """A call as it was written, and what came back."""
    return [{"role": "assistant", "content": call}, {"role": "tool", "content": feedback}]
