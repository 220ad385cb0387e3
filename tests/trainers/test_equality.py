"""The drop-in equals its host: loss, gradients and logged metrics, over several updates off policy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from equality import CASES, LOSS_TYPES, build, gradient_distance, run
from tested_combinations import table

TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time", "epoch", "total_flos")


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Host metrics that ours lacks or logs with another value."""
    return {
        key: (ours.get(key), value)
        for key, value in theirs.items()
        if key not in TIMES
        and not key.startswith(("sampling/", "eval_runtime", "eval_samples", "eval_steps", "eval_step_time"))
        and ours.get(key) != pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True)
    }


@pytest.mark.parametrize("name", CASES)
def test_loss_gradient_and_metrics_equal_the_hosts(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    theirs = run(build(case, tmp_path, host=True))
    ours = run(build(case, tmp_path, host=False))
    assert len(ours.losses) == len(theirs.losses) >= case.steps
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-6, abs=1e-6)
    if "loss" in case.identical:
        assert ours.losses == theirs.losses
    if "gradient" in case.identical:
        for found, expected in zip(ours.gradients, theirs.gradients, strict=True):
            assert [key for key, gradient in expected.items() if not torch.equal(found[key], gradient)] == []
    distances = [gradient_distance(a, b) for a, b in zip(ours.gradients, theirs.gradients, strict=True)]
    assert max(distances) <= 1e-6, distances
    assert any(float(g.abs().max()) > 0 for g in theirs.gradients[-1].values())
    for mine, host in zip(ours.logs, theirs.logs, strict=True):
        assert not differing(mine, host)


def test_the_table_in_the_documentation_has_a_line_for_every_case() -> None:
    lines = table(CASES)[2:]
    assert len(lines) == len(set(lines)) == len(CASES) > 50
    assert all(line.count("|") == 7 for line in lines)
    assert sum("loss, gradient" in line for line in lines) > 30
    for loss_type in LOSS_TYPES:
        mine = [line for line in lines if f"`loss_type={loss_type}`" in line]
        assert any(case.config == {"loss_type": loss_type} for case in CASES.values())
        for words in ("`beta=", "recorded | recorded", "recorded |  |", "|  |  |"):
            assert any(words in line for line in mine), (loss_type, words)
