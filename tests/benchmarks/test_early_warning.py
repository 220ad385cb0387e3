"""The benchmark of early warnings finds the harm, the alarm before it, and the quiet of a healthy run."""

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from running import output_of

from rlstab.record import RunFolder

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "early_warning.py"


def write(place: Path, *, mode: str, steps: int = 120) -> None:
    """A run that learns; `staleness` comes apart from its sampler and falls, `nan_forward` ends in NaN."""
    rng = np.random.default_rng(len(mode))
    setting = {"mode": mode, "strength": 0, "task": "sort5", "hidden": 64, "layers": 2, "seed": 3}
    run = RunFolder.create(place / f"{mode}-0-sort5-64x2-3", config_text="seed: 3")
    (run.path / "collapse.json").write_text(json.dumps(setting))
    for step in range(1, steps):
        learned = 0.9 - 0.5 * math.exp(-step / 20)
        stale = mode == "staleness"
        values = {
            "train/reward": learned * (0.3 if stale and step > 60 else 1.0) + 0.02 * float(rng.normal()),
            "policy/entropy": 0.2 + 0.4 * math.exp(-step / 20),
            "train/grad_norm": math.exp(0.2 * float(rng.normal())),
            "objective/loss": math.nan if mode == "nan_forward" and step == 40 else float(rng.normal()),
            "mismatch/k3": 1e-10 if not stale else 1e-3 * math.exp(step / 8),
        }
        run.append_metrics(step, {**values, "step/loss": values["objective/loss"]})


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("runs")
    for mode in ("healthy", "staleness", "nan_forward"):
        write(place, mode=mode)
    target, picture = place / "out.json", place / "out.png"
    output_of("benchmarks/early_warning.py", "judge", place, "--json", target, "--plot", picture)
    assert picture.stat().st_size > 10_000
    found: dict[str, Any] = json.loads(target.read_text())
    return found


def row(figures: dict[str, Any], mode: str) -> dict[str, Any]:
    return next(run for run in figures["runs"] if run["run"].startswith(f"{mode}-"))


def test_a_healthy_run_has_neither_harm_nor_alarm(figures: dict[str, Any]) -> None:
    healthy = row(figures, "healthy")
    assert (healthy["harm"], healthy["alarms"]) == (None, [])
    assert healthy["first"]["entropy < half its start"] is not None
    assert figures["all"]["alarms per 1000 steps of the controls"] == [0, 119, 0.0]


def test_the_warning_comes_before_the_harm(figures: dict[str, Any]) -> None:
    stale = row(figures, "staleness")
    assert 60 < stale["harm"] <= 70
    assert 40 <= stale["first"]["default rules"] < 60
    assert stale["first"]["gradient norm > 5"] is None
    assert figures["all"]["watches"]["default rules"]["harms warned of before"][:2] == [1, 1]


def test_what_comes_without_a_sign_is_dated_and_left_out_of_the_share(figures: dict[str, Any]) -> None:
    sudden = row(figures, "nan_forward")
    assert (sudden["harm"], sudden["first"]["default rules"]) == (40, 40)


def test_an_evaluation_is_shown_after_its_step(harms: ModuleType) -> None:
    """What was derived when a run was recorded is left out: it is derived anew."""
    rows = [
        (2, {"eval/pass@1": 0.5, "train/reward": 0.4, "law/ceiling": 0.9}),
        (1, {"train/reward": 0.3}),
        (2, {"a": 1.0}),
    ]
    assert importlib.import_module("early_warning").by_step(rows) == [
        (1, {"train/reward": 0.3}),
        (2, {"train/reward": 0.4, "a": 1.0}),
        (2, {"eval/pass@1": 0.5}),
    ]


@pytest.fixture(scope="module")
def harms() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module("collapses._harms")
    sys.path.remove(str(SCRIPT.parent))


def examined(*scores: float) -> list[tuple[int, dict[str, float]]]:
    keys = ("eval/pass@1", "eval/pass@8")
    return [
        (30 * at, dict.fromkeys(keys, score) | {f"{key}_se": 0.02 for key in keys}) for at, score in enumerate(scores)
    ]


def test_a_skill_is_lost_once_it_does_not_come_back(harms: ModuleType) -> None:
    assert harms.skill_lost(examined(0.4, 0.8, 0.6, 0.5)) == 60
    assert harms.skill_lost(examined(0.4, 0.8, 0.6, 0.79)) is None
    assert harms.skill_lost(examined(0.4, 0.8, 0.76, 0.74)) is None  # within two standard errors


def test_variety_is_lost_below_its_start(harms: ModuleType) -> None:
    assert harms.variety_lost(examined(0.9, 0.95, 0.7, 0.6)) == 60
    assert harms.variety_lost(examined(0.9, 0.95, 0.7, 0.89)) is None


def test_steps_are_wasted_if_nothing_is_gained_in_time(harms: ModuleType) -> None:
    assert harms.steps_wasted(examined(0.9, 0.91, 0.9, 0.92, 0.99)) == 90
    assert harms.steps_wasted(examined(0.5, 0.6, 0.5, 0.5, 0.5)) is None


def test_a_reward_is_lost_for_good(harms: ModuleType) -> None:
    rng = np.random.default_rng(0)
    level = np.r_[np.full(50, 0.8), np.full(50, 0.5)] + 0.02 * rng.normal(size=100)
    rows = [(step, {"train/reward": float(value)}) for step, value in enumerate(level, start=1)]
    assert 51 < harms.reward_lost(rows) < 58
    assert harms.reward_lost(rows[:50]) is None
    assert harms.reward_lost([*rows[:70], *[(step, rows[0][1]) for step in range(71, 300)]]) is None


def test_a_sampler_worse_than_the_policy_is_harm(harms: ModuleType) -> None:
    rows = examined(0.4, 0.6, 0.8, 0.9)
    steps = [(step, {"train/reward": 0.55}) for step in range(1, 91)]
    assert harms.sampler_worse([*rows, *steps]) == 60
