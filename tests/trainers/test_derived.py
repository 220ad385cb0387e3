"""Laws and forecasts of a run follow from its own numbers, and from those of a resumed run alike."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from small_runs import run_folder, trainer_of

from rlstab.monitors import Crossing
from rlstab.trainers import Signals, watch
from rlstab.trainers._derived import Derived


def run(steps: int) -> list[dict[str, float]]:
    """A run on the entropy law whose reward stops paying for distance, and whose attention grows."""
    rows = []
    for step in range(1, steps + 1):
        entropy = 2.0 * 0.98**step
        row = {"policy/entropy": entropy, "train/reward": 0.9 - 0.1 * math.exp(entropy), "train/reward_std": 0.4}
        if (step - 1) % 10 == 0:
            row |= {"drift/initial/kl": (0.01 * step) ** 2, "attention/logit_max": 5.0 * 1.02**step}
        rows.append(row)
    return rows


def test_the_laws_are_found() -> None:
    derived, rows = Derived(), run(120)
    found = [derived.update(i + 1, row, turn=i % 10 == 0) for i, row in enumerate(rows)]
    assert "law/ceiling" not in found[18]
    assert found[19]["law/ceiling"] == pytest.approx(0.8)
    assert found[50]["law/headroom"] == pytest.approx(0.8 - rows[50]["train/reward"])
    assert found[50]["law/explained"] == pytest.approx(1.0)
    assert found[50]["law/residual"] == pytest.approx(0.0, abs=1e-9)
    measured = range(0, 111, 10)
    rewards = [np.mean([rows[j]["train/reward"] for j in range(max(0, i - 9), i + 1)]) for i in measured]
    slope = np.polyfit([0.01 * (i + 1) for i in measured][-10:], rewards[-10:], 1)[0]
    assert found[110]["law/reward_per_sqrt_kl"] == pytest.approx(slope)
    assert found[110]["forecast/attention/logit_max"] == pytest.approx(math.log(1e4 / 5.0) / math.log(1.02) - 111)
    expected = Crossing(bound=0.02, rising=False, window=40, least=15)
    left = [expected.observe(i + 1, row["policy/entropy"]) for i, row in enumerate(rows)]
    assert [row.get("forecast/policy/entropy") for row in found] == left
    assert left[13] is None
    assert left[14] == pytest.approx(math.log(0.02 / rows[14]["policy/entropy"]) / math.log(0.98))
    entropies = [row["policy/entropy"] for row in rows]
    surprise = (1.01**2 + 1.11**2) / 2 + np.mean(entropies[106:111]) - np.mean(entropies[:10])
    assert found[110]["drift/initial/surprise"] == pytest.approx(surprise)


def test_a_trend_that_ends_is_said_to_once() -> None:
    derived = Derived()
    falling, risen = [2.0 * 0.98**step for step in range(100)], [2.0] * 40
    found = [derived.update(i + 1, {"policy/entropy": h}, turn=i % 10 == 0) for i, h in enumerate(falling + risen)]
    forecasts = [row["forecast/policy/entropy"] for row in found if row]
    assert forecasts[0] == pytest.approx(math.log(0.02 / falling[14]) / math.log(0.98))
    assert forecasts.index(math.inf) == len(forecasts) - 1 > len(falling) - 15


def test_a_resumed_run_goes_on() -> None:
    whole, first, second, rows = Derived(), Derived(), Derived(), run(100)
    for derived in (whole, first):
        assert derived.examined({"eval/reward": 0.3}) == {}
    for i, row in enumerate(rows[:-1]):
        whole.update(i + 1, row, turn=i % 10 == 0)
        if i < 55:
            first.update(i + 1, row, turn=i % 10 == 0)
    second.load_state_dict(first.state_dict())
    for i, row in enumerate(rows[55:-1], start=55):
        second.update(i + 1, row, turn=i % 10 == 0)
    assert second.update(100, rows[-1], turn=True) == whole.update(100, rows[-1], turn=True) != {}
    assert second.examined({"eval/reward": 0.3}) == whole.examined({"eval/reward": 0.3}) != {}
    assert whole.examined({"eval/pass@1": 0.3}) == {}


def test_a_watched_run_has_them(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    settings = {"max_steps": 22, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 2}
    watch(trainer_of(tmp_path, settings=settings, signals=Signals(drift_every=4), run=folder))._trainer.train()
    rows = [row.values for row in folder.metrics().rows]
    written = {key for row in rows for key in row}
    assert {"law/ceiling", "law/reward_per_sqrt_kl", "drift/initial/surprise"} <= written
    assert "drift/initial/reward_correlation" in written
    assert all(-1 <= row.get("drift/initial/reward_correlation", 0.0) <= 1 for row in rows)
