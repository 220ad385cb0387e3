"""Runs whose weights FSDP or DeepSpeed have spread over two processes, on the CPU, and what a guard makes of them.

Every batch of these runs is the same, so that a run which goes back makes the same losses and weights again, if it got
back all that decides them.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from accelerate import DistributedType, PartialState
from datasets import Dataset
from small_runs import TOKENIZER, run_folder, tiny_policy, trainer_of
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer
from watched_hosts import settings

from rlstab.errors import ConfigError
from rlstab.losses import ClippedSurrogate, Objective, ReverseKL
from rlstab.monitors import Level, RollBack, Rule
from rlstab.trainers import Guard, Signals, watch

SPIKED = Rule(signal="step/loss", detector=Level(above=4.0, steps=1), action=RollBack(remedy=None), cause="numerics")


def fsdp(version: int, **changes: Any) -> dict[str, Any]:
    """Arguments of a trainer with FSDP, which accelerate offers on accelerators only and torch on a CPU too."""
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    config = {"version": version, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"], "sync_module_states": "false"}
    config["state_dict_type"] = "SHARDED_STATE_DICT"
    return {"use_cpu": False, "fsdp": True, "fsdp_config": {**config, **changes}}


def deepspeed(stage: int) -> dict[str, Any]:
    """Arguments of a trainer with DeepSpeed, as a launcher sets it up."""
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": f"{stage}"}
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    ops: Any = import_module("deepspeed.ops")
    ops.__compatible_ops__ = {}  # else it compiles a collective operation of its own, for minutes
    return {"use_cpu": False, "ddp_backend": "gloo"}


def whole_weights(trainer: Any) -> dict[str, Tensor]:
    """Copies by name, on every process."""
    if trainer.is_deepspeed_enabled:
        whole = import_module("deepspeed.utils").safe_get_full_fp32_param
        return {name: whole(weight).clone() for name, weight in trainer.model.named_parameters()}
    found: dict[str, Any] = get_model_state_dict(trainer.model, options=StateDictOptions(full_state_dict=True))
    return {name: weight.clone() for name, weight in found.items()}


class Course(TrainerCallback):
    """Keeps the weights and the learning rate after each step, and makes some steps far too large.

    Args:
        trainer: whose.
        spikes: the steps.
    """

    def __init__(self, trainer: Any, spikes: tuple[int, ...]) -> None:
        self._trainer, self._spikes = trainer, spikes
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.rates: dict[int, float] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 in self._spikes:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] = 1.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights[state.global_step] = whole_weights(self._trainer)
        self.rates[state.global_step] = kwargs["optimizer"].param_groups[0]["lr"]


def trained(
    output: Path,
    arguments: dict[str, Any],
    *,
    steps: int,
    spikes: tuple[int, ...] = (),
    guard: Guard | None = None,
    resume: Path | None = None,
    saves: bool = False,
) -> dict[str, Any]:
    """What became of one run, which may save at step 5."""
    schedule: dict[str, Any] = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 20, "max_steps": steps}
    saving: dict[str, Any] = {"save_strategy": "steps" if saves else "no", "save_steps": 5}
    args = SFTConfig(**settings(output, **schedule, **saving, **arguments))
    rows = Dataset.from_dict({"text": ["17+4=21"] * 32})
    trainer = SFTTrainer(tiny_policy(), args, train_dataset=rows, processing_class=TOKENIZER)
    run = run_folder(output / "run") if os.environ["RANK"] == "0" else None
    watcher = watch(trainer, [SPIKED] if guard else [], guard=guard, run=run)
    trainer.add_callback(course := Course(trainer, spikes))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return {
        "kind": str(trainer.accelerator.distributed_type),
        "processes": trainer.accelerator.num_processes,
        "weights": course.weights,
        "rates": course.rates,
        "losses": {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row},
        "backs": [(event.step, event.fields["to"]) for event in run.events().of("rolled_back")] if run else [],
        "ring": watcher._keeper.ring.steps,
    }


def gone_back(output: Path, arguments: dict[str, Any], *, resumes: bool) -> dict[str, Any]:
    """A run that nothing happens to, one that goes back to its very start and to step 4, and one resumed between."""
    guard = Guard(every=2, settle=2)
    runs = {
        "plain": trained(output / "plain", arguments, steps=4),
        "spiked": trained(output / "spiked", arguments, steps=8, spikes=(1, 5), guard=guard, saves=resumes),
    }
    if resumes:
        checkpoint = output / "spiked" / "checkpoint-5"
        guard = replace(guard, folder=output / "ring")
        runs["resumed"] = trained(output / "resumed", arguments, steps=8, guard=guard, resume=checkpoint)
    return runs


def by_fsdp(output: Path) -> dict[str, Any]:
    """The runs under both versions."""
    return {
        f"fsdp{version}": gone_back(output / f"fsdp{version}", fsdp(version), resumes=version == 1)
        for version in (1, 2)
    }


def compared(output: Path, arguments: dict[str, Any]) -> list[float]:
    """The losses of a policy that is compared over its whole vocabulary with the one that was passed."""
    exact = ReverseKL(reference="initial", form="exact")
    objective = Objective(policy=ClippedSurrogate(), drift=0.1 * exact)
    trainer = trainer_of(output, objective, settings={"max_steps": 3, "learning_rate": 2e-2, **arguments})
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def by_flat_weights(output: Path) -> dict[str, Any]:
    """What FSDP1, whose weights only a forward can read, says of whole distributions, and a run without them."""
    arguments = {"max_steps": 2, **fsdp(1)}
    with pytest.raises(ConfigError) as refused:
        trainer_of(output, Objective(exact=ReverseKL(form="exact")), settings=arguments)
    run = run_folder(output / "run") if os.environ["RANK"] == "0" else None
    objective = Objective(policy=ClippedSurrogate(), drift=0.1 * ReverseKL(samples="old"))
    trainer = trainer_of(output, objective, signals=Signals(), run=run, settings=arguments)
    trainer.train()
    skipped = [str(event.fields["reason"]) for event in run.events().of("signal_skipped")] if run else []
    return {"steps": trainer.state.global_step, "refused": str(refused.value), "skipped": skipped}


def by_deepspeed(output: Path) -> dict[str, Any]:
    """The runs under ZeRO-2 and ZeRO-3."""
    return {
        f"zero{stage}": gone_back(output / f"zero{stage}", deepspeed(stage), resumes=stage == 3) for stage in (2, 3)
    }


def compared_by_deepspeed(output: Path) -> dict[int, list[float]]:
    """Such as look at whole distributions, by stage."""
    return {stage: compared(output / f"compared{stage}", deepspeed(stage)) for stage in (2, 3)}
