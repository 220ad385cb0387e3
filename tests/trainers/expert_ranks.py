"""Runs with an expert, and with other prompts in place of some, for `test_two_processes.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from equality import Trace, run
from small_runs import WatchedAdvantage, trainer_of
from test_sft import sft

from rlstab.losses import PSFT, ClippedSurrogate, GroupCenter, ImportanceSFT, Objective, TrSFT
from rlstab.trainers import MicroGroups, Resample

EXPERT = "31415926"


def traced(trainer: Any) -> dict[str, Any]:
    """Gradients by the names of one process, logs, and how many processes there were."""
    trace: Trace = run(trainer)
    gradients = [{name.removeprefix("module."): g for name, g in step.items()} for step in trace.gradients]
    return {"processes": trainer.accelerator.num_processes, "gradients": gradients, "logs": trace.logs}


def imitated(output: Path, *, rows: int) -> dict[str, Any]:
    """Supervised terms with means over tokens and over demonstrations of the step, and both earlier policies."""
    objective = Objective(
        imitation=TrSFT().mean("token"),
        weighed=0.5 * ImportanceSFT(level="sequence").mean("sequence"),
        clipped=0.5 * PSFT().mean("token"),
    )
    settings: dict[str, Any] = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1, "max_steps": 2}
    return traced(sft(output / "imitated", objective, ours={"snapshot_every": 2}, **settings))


def guided(output: Path, *, rows: int) -> dict[str, Any]:
    """Rollouts without chance, some of them begun by an expert: prompts of an even number are solved anyway."""

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        begun = [text.startswith(EXPERT[:4]) for text in completions]
        even = [int(prompt[0]) % 2 == 0 for prompt in prompts]
        return [float(solved or some) for solved, some in zip(even, begun, strict=True)]

    data = Dataset.from_dict({"prompt": [f"{i}+{i}=" for i in range(8)], "demonstration": [EXPERT] * 8})
    trainer = trainer_of(
        output / "guided",
        Objective(policy=ClippedSurrogate(), imitation=TrSFT().mean("token"), advantage=GroupCenter()),
        data=data,
        reward=reward,
        settings={"per_device_train_batch_size": rows, "max_steps": 2, "max_completion_length": 9, "top_k": 1},
        guidance=MicroGroups(sizes=(2, 1, 1), shares=(0.0, 0.25, 0.5), thresholds=(-1.0, 0.5, 0.5)),
    )
    return traced(trainer)


def resampled(output: Path) -> dict[str, Any]:
    """Groups whose rewards are alike give way; which prompts have a signal, and how many groups each process lacks."""

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        even = [int(prompt[:-1]) % 2 == 0 for prompt in prompts]
        return [float(place % 2 if right else 0) for place, right in enumerate(even)]

    advantage = WatchedAdvantage()
    trainer = trainer_of(
        output / "resampled",
        Objective(policy=ClippedSurrogate().mean("token"), advantage=advantage),
        data=Dataset.from_dict({"prompt": [f"{i * 13 % 100}=" for i in range(24)]}),
        reward=reward,
        settings={"per_device_train_batch_size": 8, "max_steps": 3},
        resample=Resample(attempts=20),
    )
    return {**traced(trainer), "rewards": [batch.column("rewards") for batch in advantage.seen]}
