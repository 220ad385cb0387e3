"""Conversations in which answers are handed in: what they ask, what demonstrations show, and who judges."""

import json
import re

import pytest

from rlstab.errors import ConfigError
from rlstab.models import tiny_chat_tokenizer
from rlstab.recipes import TinyModel
from rlstab.recipes._evaluate import prompt_ids
from rlstab.tasks import Dialogue, SortDigits, TryAgain, TwoSkills, split_of

TASK = Dialogue(task=SortDigits(digits=3), attempts=3)


def test_prompts_are_those_of_a_user_and_calls_are_judged() -> None:
    rows = TASK.prompts(20, split="test", seed=3)
    solutions = TASK.solutions(20, split="test", seed=3)
    for row, solution in zip(rows, solutions, strict=True):
        [message] = row["prompt"]
        answer = json.loads(row["answer"])["answer"]
        assert message["role"] == "user"
        assert sorted(message["content"][:3]) == list(answer)
        assert split_of(answer) == "test"
        assert solution == f"submit(answer={answer})"
        assert [TASK.score(text, row) for text in (solution, answer, f"{solution} ", "submit(answer=)")] == [1, 1, 0, 0]
        environment = TryAgain(TASK, attempts=2)
        environment.reset(**row)
        assert [environment.submit("x"), environment.submit(answer)] == ["Incorrect. Please think again.", "Correct!"]


def test_demonstrations_show_every_turn() -> None:
    rows = TASK.demonstrations(400, seed=1, noise=0.25)
    turns = dict.fromkeys(("1", "2", "3", "solved"), 0)
    right = 0
    for row in rows:
        asked, *before = row["prompt"]
        answer = "".join(sorted(asked["content"][:3]))
        calls, feedback = before[::2], [message["content"] for message in before[1::2]]
        solved = feedback[-1:] == ["Correct!"]
        turns["solved" if solved else str(1 + len(calls))] += 1
        wrong = [f"submit(answer={answer})" != message["content"] for message in calls]
        assert wrong == ([False] if solved else [True] * len(calls))
        assert all(re.fullmatch(r"submit\(answer=\d{3}\)", message["content"]) for message in calls)
        assert (row["completion"] == "") == solved
        right += row["completion"] == f"submit(answer={answer})"
    assert min(turns.values()) > 70
    assert right / (400 - turns["solved"]) == pytest.approx(0.75, abs=0.07)
    assert TASK.demonstrations(400, seed=1, noise=0.25).to_list() == rows.to_list()


def test_a_task_that_asks_for_less_than_it_shows_stays_so() -> None:
    task = Dialogue(task=TwoSkills(tested="kept"))
    assert {row["prompt"][0]["content"][0] for row in task.prompts(20)} == {"A"}
    assert {row["prompt"][0]["content"][0] for row in task.demonstrations(20)} == {"A", "B"}
    assert task.completion_length == len("submit(answer=)") + task.task.completion_length


def test_without_an_attempt_there_is_nothing_to_show() -> None:
    with pytest.raises(ConfigError, match="Dialogue: attempts 0; expected at least 1"):
        Dialogue(attempts=0)


def test_a_tiny_chat_model_reads_its_conversations_back() -> None:
    tokenizer = TinyModel(hidden=16, heads=2, chat=True).load(TASK, seed=0).tokenizer
    assert tokenizer.get_vocab() == tiny_chat_tokenizer().get_vocab()
    row = TASK.demonstrations(8, seed=1)[2]
    [ids] = prompt_ids(tokenizer, [row["prompt"]])
    text = str(tokenizer.decode(ids))
    assert text.endswith("<eos>a:")
    assert text.count("<eos>") == len(row["prompt"])
    said = tokenizer("submit(answer=035, when=now)<eos>")["input_ids"]
    function = {"name": "submit", "arguments": {"answer": "035", "when": "now"}}
    assert tokenizer.parse_response(said, prefix=ids)["tool_calls"] == [{"type": "function", "function": function}]
    plain = tokenizer.parse_response(tokenizer("no<eos>")["input_ids"], prefix=ids)
    assert plain == {"role": "assistant", "content": "no"}
