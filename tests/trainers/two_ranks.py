"""What two processes do in `test_two_processes.py`: one scenario after the other, with the results of each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import Trace, Tracer, config, digits_reward, prompts, run
from expert_ranks import guided as expert_guided
from expert_ranks import imitated, resampled
from routed_ranks import replayed, sharded_replay
from sharded_models import restored_shards, sharded_gradients
from small_runs import TOKENIZER, run_folder, tiny_policy, trainer_of, weights
from test_exact_distillation import distil
from test_overlap import Mortal, copying
from transformers import TrainerCallback
from trl import GRPOTrainer
from watched_hosts import host

from rlstab.batch import LogProbs
from rlstab.errors import EngineError
from rlstab.losses import (
    KL,
    ClippedSurrogate,
    ConflictWeight,
    ForwardKL,
    GroupNorm,
    JensenShannon,
    KLCov,
    Objective,
    ReverseKL,
    TopEntropy,
    TruncatedIS,
)
from rlstab.monitors import Level, RollBack, Rule
from rlstab.trainers import ExtraRow, ExtraRows, Guard, Reset, Signals, watch
from rlstab.trainers._extra_rows import cycled

SETTINGS: dict[str, Any] = {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 3}
ROWS = 12
# Three prompts of four completions: the second group has two rows on each of two processes.
SPREAD: dict[str, Any] = {
    "num_generations": 4,
    "num_iterations": 2,
    "max_steps": 2,
    "optim": "sgd",
    "learning_rate": 1.0,
}


def every_phase() -> Objective:
    """Rollout parts, step statistics, references, rows of a buffer and a sampler correction; means over the step."""
    return Objective(
        policy=ClippedSurrogate(weights=(ConflictWeight(), TruncatedIS(max=1.1), TopEntropy(fraction=0.6))),
        covariance=0.5 * KLCov(fraction=0.1),
        drift=0.1 * JensenShannon(reference="initial").mean("sequence"),
        pull=0.1 * KL(reference="initial").mean(8),
        exact=0.1 * ReverseKL(reference="initial", form="exact"),
        near=0.1 * ReverseKL(reference="anchor"),
        keep=0.5 * ForwardKL(samples="reference", rows="buffer"),
        advantage=GroupNorm(),
    )


class Kept(ExtraRows):
    """Six rows of different lengths, five of which a step has: shares of them are uneven."""

    role, per_step = "buffer", 5
    carries = frozenset({LogProbs("initial")})

    def prepare(self, trainer: Any) -> None:
        """Fits."""

    def step(self, number: int) -> Sequence[ExtraRow]:
        """The next five."""
        return [
            ExtraRow(
                prompt_ids=[4 + place, 13],
                completion_ids=[5, *range(4, 5 + place)],
                logps={"initial": [-2.0 - 0.1 * place] * (2 + place)},
            )
            for place in cycled(6, self.per_step, number, seed=0)
        ]


def known_completions(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions and log-probs that the place of a row among all rows decides, longer on later processes."""
    first = trainer.accelerator.process_index * len(prompts)
    completion_ids, logprobs = [], []
    for row in range(first, first + len(prompts)):
        generator = torch.Generator().manual_seed(row)
        ids = torch.randint(4, 14, (3 + row // 2,), generator=generator)
        ids[0] = 5  # a beginning that all completions share
        completion_ids.append([*ids.tolist(), TOKENIZER.eos_token_id])
        scores: list[float | None] = (-2.8 + 0.2 * torch.randn(len(ids) + 1, generator=generator)).tolist()
        logprobs.append([None if t == 1 and row % 3 == 0 else score for t, score in enumerate(scores)])
    return {"prompt_ids": TOKENIZER(prompts)["input_ids"], "completion_ids": completion_ids, "logprobs": logprobs}


def spread_run(output: Path, *, rows: int, accumulation: int) -> dict[str, Any]:
    """Two updates on known completions: gradients, rows of the run folder, and how many processes there were."""
    settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation, **SPREAD}
    folder = run_folder(output / "spread") if os.environ.get("RANK", "0") == "0" else None
    trainer = trainer_of(
        output / "spread-output",
        every_phase(),
        settings=settings,
        rollout_func=known_completions,
        signals=Signals(drift_every=1),
        extra_rows=[Kept()],
        reset=Reset(every=2),
        run=folder,
    )
    trace = Trace()
    trainer.add_callback(Tracer(trace))
    trainer.train()
    gradients = [
        {name.removeprefix("module."): gradient for name, gradient in step.items()} for step in trace.gradients
    ]
    measured = [dict(row.values) for row in folder.metrics().rows] if folder else []
    processes = trainer.accelerator.num_processes
    return {"processes": processes, "gradients": gradients, "rows": measured, "groups": groups_of(trainer)}


def groups_of(trainer: Any) -> list[int]:
    """The prompts that this process holds completions of."""
    ids = torch.cat([inputs["rlstab_group"] for inputs in trainer._buffered_inputs])
    return sorted(set(ids.tolist()))


def beside_the_host(output: Path) -> dict[str, Any]:
    """The host and the drop-in on the same seed."""
    settings = {**SETTINGS, "loss_type": "dapo"}
    host = GRPOTrainer(
        tiny_policy(),
        digits_reward,
        config(output / "host", **settings),
        train_dataset=prompts(),
        processing_class=TOKENIZER,
    )
    theirs = run(host)
    ours = run(trainer_of(output / "ours", settings=settings))
    return {
        "processes": host.accelerator.num_processes,
        "losses": (ours.losses, theirs.losses),
        "weights": (ours.weights, theirs.weights),
        "logs": (ours.logs, theirs.logs),
    }


def stopped_and_resumed(output: Path) -> dict[str, Any]:
    """A whole run, and one that resumes within a generation."""
    settings = {**SETTINGS, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = trainer_of(output / "whole", settings=settings)
    whole.train()
    resumed = trainer_of(output / "resumed", settings=settings)
    resumed.train(resume_from_checkpoint=str(output / "whole" / "checkpoint-1"))
    return {"processes": whole.accelerator.num_processes, "weights": (weights(resumed), weights(whole))}


def failed(output: Path) -> dict[str, Any]:
    """The engine of the last process gives up in the third generation; then both resume from what they left."""
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1

    def made(name: str, lives: int) -> Any:
        def engine(model: Any, tokenizer: Any) -> Mortal:
            return Mortal(copying(model, tokenizer), lives if last else 100)

        return trainer_of(output / name, settings={"max_steps": 3}, engine=engine)

    whole = made("unfailing", 100)
    whole.train()
    failing = made("failing", 3)  # one of them for the proof of the first sync
    with pytest.raises(EngineError) as failure:
        failing.train()
    resumed = made("after", 100)
    resumed.train(resume_from_checkpoint=str(output / "failing" / f"checkpoint-{failing.state.global_step}"))
    return {
        "processes": whole.accelerator.num_processes,
        "failure": str(failure.value),
        "step": failing.state.global_step,
        "weights": (weights(resumed), weights(whole)),
    }


def distilled(output: Path) -> dict[str, Any]:
    """The host's distillation and the drop-in's, on the same seed."""
    ours, theirs = (run(distil(output / f"distilled-{host}", host=host, beta=0.3)) for host in (False, True))
    return {
        "processes": int(os.environ["WORLD_SIZE"]),
        "losses": (ours.losses, theirs.losses),
        "gradients": (ours.gradients, theirs.gradients),
    }


class HurtOne(TrainerCallback):
    """Adds noise to the weights of the last process only, as a broken device would."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once, at step 5."""
        if state.global_step + 1 == 5 and args.process_index == args.world_size - 1:
            generator = torch.Generator().manual_seed(0)
            for parameter in kwargs["model"].parameters():
                parameter.data += torch.randn(parameter.shape, generator=generator)


def guarded(output: Path) -> dict[str, Any]:
    """A fault of one process under a guard that keeps its ring in files, and the run without the fault."""
    results: dict[str, Any] = {}
    for name in ("healthy", "hurt"):
        trainer = host("SFT", output / f"guarded-{name}", max_steps=8, lr_scheduler_type="constant")
        if name == "hurt":
            trainer.add_callback(HurtOne())
        back = RollBack(remedy=None)
        rule = Rule(signal="step/loss", detector=Level(above=3.3, steps=1), action=back, cause="numerics")
        watcher = watch(trainer, [rule], guard=Guard(every=2, folder=output / f"ring-{name}"))
        trainer.train()
        results |= {name: weights(trainer), f"{name}-ring": watcher._keeper.ring.steps}
        results[f"{name}-back"] = watcher._keeper.rollbacks
        results[f"{name}-losses"] = [row["loss"] for row in trainer.state.log_history[:-1]]
    return {"processes": trainer.accelerator.num_processes, **results}


def scenarios(output: Path) -> dict[str, Any]:
    """The results of every scenario."""
    # With several processes transformers loads the optimizer to `cpu:0`, a place that torch knows as `cpu` only.
    torch.serialization.register_package(
        0, lambda _: None, lambda storage, place: storage if place == "cpu:0" else None
    )
    return {
        "spread": spread_run(output, rows=ROWS // 4, accumulation=2),
        "host": beside_the_host(output),
        "resumed": stopped_and_resumed(output),
        "failed": failed(output),
        "distilled": distilled(output),
        "guarded": guarded(output),
        "imitated": imitated(output, rows=4),
        "expert": expert_guided(output, rows=8),
        "resampled": resampled(output),
        "shards": {"processes": torch.distributed.get_world_size(), **restored_shards()},
        "sharded": {"processes": torch.distributed.get_world_size(), "gradients": sharded_gradients()},
        "routed": replayed(output),
        "routed and sharded": sharded_replay(),
    }
