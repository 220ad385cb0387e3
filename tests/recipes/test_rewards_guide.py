"""The guide to rewards: its Python runs, its recipe reads, and the schemes that it lists are what it says they are."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rlstab import tasks
from rlstab.recipes import read_recipe
from rlstab.tasks import Correct, OverlongPenalty, Reward, TagFormat

GUIDE = (Path(__file__).resolve().parents[2] / "docs/guide/rewards.md").read_text()


def test_its_python_runs() -> None:
    namespace: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "rewards.md", "exec"), namespace)
    assert namespace["reward_weights"] == [1.0, 0.5, 1.0]


def test_its_recipe_reads(tmp_path: Path) -> None:
    pytest.importorskip("math_verify", reason="needs math-verify, of the extra `tasks`")
    (block,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text("model: {class_path: PretrainedModel, init_args: {name: some}}\n" + block)
    assert read_recipe(tmp_path / "recipe.yaml").recipe.rewards == {
        "correct": Correct(),
        "format": TagFormat(weight=0.5),
        "short": OverlongPenalty(max_length=2048, cache=512, on_error="none"),
    }


def schemes() -> list[Any]:
    table = GUIDE.partition("## The schemes of papers")[2]
    return [
        pytest.param(row, code, id=f"{row}: {code[:20]}")
        for row, cells in re.findall(r"^\| ([^|]+) \| (.*) \|$", table, re.MULTILINE)
        for code in re.findall(r"`([^`]+)`", cells)
    ]


@pytest.mark.parametrize(("scheme", "code"), schemes())
def test_its_schemes_are_code(scheme: str, code: str) -> None:
    known = {name: vars(tasks)[name] for name in tasks.__all__}
    known |= {"judge": Correct(), "bleu": Correct(), "tags": TagFormat(), "task": tasks.SortDigits()}
    known |= {"partial": partial}
    expression = re.sub(r"^(tags = |environment_factory=|\w+: )", "", code)
    value = eval(expression.replace("part=...", "part=bleu"), known)
    assert isinstance(value, Reward) or callable(value)


def test_it_lists_every_part() -> None:
    offered = [vars(tasks)[name] for name in tasks.__all__]
    parts = {kind.__name__ for kind in offered if isinstance(kind, type) and issubclass(kind, Reward)}
    listed = GUIDE.partition("## The parts")[2].partition("## The schemes")[0]
    assert parts - set(re.findall(r"`(\w+)`", listed)) == {"Reward", "SampleReward"}
