"""An engine with weights of its own is proved at each sync; one that goes stale stops the training."""

from pathlib import Path
from typing import Any

import pytest
from small_runs import TOKENIZER, run_folder, tiny_policy, trainer_of

from rlstab.errors import WeightSyncError
from rlstab.losses import ClippedSurrogate, Objective
from rlstab.record import RunFolder
from rlstab.rollouts import TransformersEngine
from rlstab.trainers import Signals

SETTINGS = {"max_steps": 4, "learning_rate": 1e-3, "num_iterations": 1}


def trainer_with_copy(folder: Path, *, bf16: bool = False, **extra: Any) -> tuple[Any, TransformersEngine, RunFolder]:
    policy = tiny_policy()
    engine = TransformersEngine(policy, TOKENIZER, share=False)
    run = run_folder(folder / "run")
    objective = Objective(policy=ClippedSurrogate(low=0.2, high=0.2))
    settings = {**SETTINGS, "bf16": bf16}
    trainer = trainer_of(folder / "host", objective, model=policy, settings=settings, engine=engine, run=run, **extra)
    return trainer, engine, run


def syncs(run: RunFolder) -> list[dict[str, Any]]:
    return [dict(event.fields) for event in run.events().of("weight_sync")]


def test_each_sync_is_proved_and_noted(tmp_path: Path) -> None:
    trainer, engine, run = trainer_with_copy(tmp_path)
    trainer.train()
    found = syncs(run)
    assert [event["version"] for event in found] == [0, 1, 2, 3]
    assert all(event["mean_abs"] < 1e-5 and event["engine"] == engine.id for event in found)
    assert all(event["seconds"] > 0 for event in found)


def test_a_stale_engine_stops_training_before_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, engine, run = trainer_with_copy(tmp_path)
    take = engine._take
    monkeypatch.setattr(engine, "_take", lambda tensors: take(tensors) if trainer.state.global_step < 2 else None)
    with pytest.raises(WeightSyncError, match="nearer to the weights before than to those of version 2"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert [event["version"] for event in syncs(run)] == [0, 1]


def test_mixed_precision_is_no_fault(tmp_path: Path) -> None:
    trainer, _, run = trainer_with_copy(tmp_path, bf16=True)
    trainer.train()
    found = syncs(run)
    assert [event["version"] for event in found] == [0, 1, 2, 3]
    assert all(event["mean_abs"] > 1e-5 for event in found)


def test_the_proof_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, engine, run = trainer_with_copy(tmp_path, signals=Signals(sync=False))
    monkeypatch.setattr(engine, "_take", lambda tensors: None)
    trainer.train()
    assert trainer.state.global_step == 4
    assert syncs(run) == []
