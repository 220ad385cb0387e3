import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rlstab.errors import ConfigError
from rlstab.tasks import ExactAnswer, HubTask, MathAnswer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, start in (("train", 0), ("test", 100)):
        rows = [{"q": f"What is {n} + 1?", "a": f"One more.\n#### {n + 1}"} for n in range(start, start + 20)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def task(folder: Path, **changes: Any) -> HubTask:
    settings = {"question": "q", "answer": "a", "answer_pattern": r"####\s*(.+)"}
    return HubTask(**{"dataset": str(folder), "scorer": ExactAnswer(), **settings, **changes})


def test_rows_become_messages_and_answers(folder: Path) -> None:
    rows = task(folder, system="Be brief.").prompts(20)
    assert rows.column_names == ["prompt", "answer"]
    found = {row["prompt"][1]["content"]: row["answer"] for row in rows}
    assert found == {f"What is {n} + 1?": str(n + 1) for n in range(20)}
    assert rows[0]["prompt"][0] == {"role": "system", "content": "Be brief."}


def test_plain_text(folder: Path) -> None:
    assert task(folder, chat=False).prompts(1, split="test")["prompt"][0].startswith("What is 1")


def test_the_seed_chooses_the_rows(folder: Path) -> None:
    own = task(folder)
    first, again, other = (own.prompts(5, seed=seed)["answer"][:] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_splits_are_held_apart(folder: Path) -> None:
    answers = task(folder).prompts(20, split="test")["answer"]
    assert {int(answer) for answer in answers} == set(range(101, 121))


def test_further_columns_are_kept(folder: Path) -> None:
    rows = task(folder, keep=("q",)).prompts(5)
    assert rows.column_names == ["prompt", "answer", "q"]
    assert rows["q"][:] == [prompt[0]["content"] for prompt in rows["prompt"]]


def test_a_list_of_answers_becomes_lines(folder: Path) -> None:
    rows = [{"q": "f?", "a": ["assert f(1)", "assert f(2)"]}]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (answer,) = task(folder, answer_pattern=None).prompts(1)["answer"]
    assert answer == "assert f(1)\nassert f(2)"


def test_slices_of_one_split(folder: Path) -> None:
    own = task(folder, train="train[:75%]", test="train[75%:]")
    parts = [set(own.prompts(n, split=split)["answer"]) for n, split in ((15, "train"), (5, "test"))]  # type: ignore[arg-type]
    assert parts[0].isdisjoint(parts[1])


def test_the_scorer_judges(folder: Path) -> None:
    rows = task(folder).prompts(2)
    completions = [[{"role": "assistant", "content": text}] for text in (rows["answer"][0], "none")]
    assert task(folder).reward(rows["prompt"], completions, answer=rows["answer"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "test"}, r"train and test are both 'test'"),
        ({"answer_pattern": "####"}, r"answer_pattern '####' has no group"),
        ({"answer_pattern": "("}, r"answer_pattern '\(' is no regular expression"),
        ({"chat": False, "system": "x"}, r"a system message needs chat: true"),
        ({"keep": ("answer",)}, r"keep \('answer',\); expected other columns than 'prompt' and 'answer'"),
    ],
)
def test_settings_that_make_no_sense(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task(folder, **changes)


@pytest.mark.parametrize(
    ("changes", "n", "message"),
    [
        ({"question": "nope"}, 1, r"has no column 'nope'; there are \['q', 'a'\]"),
        ({}, 21, r"21 prompts of split 'train'; .* has 20"),
        ({"answer_pattern": "(never)"}, 1, r"answer_pattern '\(never\)' is not found in the answer"),
        ({"train": "nope"}, 1, r"split 'nope' of dataset '.*' cannot be loaded: Unknown split"),
    ],
)
def test_data_that_do_not_fit(folder: Path, changes: dict[str, Any], n: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task(folder, **changes).prompts(n)


def test_files_that_do_not_fit_together(folder: Path) -> None:
    (folder / "test.jsonl").write_text('{"other": [1]}')
    with pytest.raises(ConfigError, match=r"^HubTask: split 'train' of dataset '.*' cannot be loaded: "):
        task(folder).prompts(1)


def test_no_such_data_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^HubTask: split 'train' of dataset '.*nothing' cannot be loaded: "):
        task(tmp_path / "nothing").prompts(1)


@pytest.mark.parametrize(
    ("after", "completion", "reward"),
    [
        (None, " 42\n", 1.0),
        (None, "The answer is 42", 0.0),
        ("Answer:", "Answer: 41, no. Answer: 42", 1.0),
        ("Answer:", "Answer: 42, no. Answer: 41", 0.0),
        ("Answer:", "42", 0.0),
    ],
)
def test_exact_answers(after: str | None, completion: str, reward: float) -> None:
    assert ExactAnswer(after=after).score(completion, "42") == reward


@pytest.fixture
def math() -> MathAnswer:
    pytest.importorskip("math_verify", reason="needs math-verify, of the extra `tasks`")
    return MathAnswer()


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (r"so the result is \boxed{1234}", "1,234", 1.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{0.5}", r"$\frac{1}{2}$", 1.0),
        (r"\boxed{x + 1}", r"\boxed{1 + x}", 1.0),
        (r"\boxed{71}", "72", 0.0),
        ("no number at all", "72", 0.0),
        (r"\boxed{1}", "", None),
    ],
)
def test_mathematical_answers(math: MathAnswer, completion: str, answer: str, reward: float | None) -> None:
    assert math.score(completion, answer) == reward


def test_without_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"MathAnswer needs math-verify, which is not installed: pip install 'rlstab"):
        MathAnswer()
