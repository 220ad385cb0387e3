"""Makes one run: the quick start's recipe with the changes of its fault, smaller and longer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback

import rlstab
from collapses._engine import Faulty
from collapses._mode import Changes, Fault
from rlstab.errors import EngineError
from rlstab.recipes import PretrainedModel, Recipe, TinyModel, evaluate, read_recipe, warm_up
from rlstab.record import RunFolder
from rlstab.tasks import EmbeddedTask
from rlstab.trainers import GRPOConfig, Guard, Periodically, StableGRPOTrainer, Watch

QUICKSTART = Path(__file__).resolve().parents[2] / "configs/quickstart.yaml"
EXAMINED_EVERY, SAMPLES = 30, 8
COMMON: Changes = {
    "trainer.max_steps": 300,
    "trainer.per_device_train_batch_size": 32,
    "trainer.steps_per_generation": 1,
    "trainer.learning_rate": 2.5e-4,
    "evaluation.prompts": 48,
    "prompts": 2048,
    "signals.sync": False,  # it would stop a run with a faulty engine at once; other stacks have no such check
}
TASKS: dict[str, Changes] = {
    "sort5": {"task.init_args.digits": 5, "trainer.max_completion_length": 6},
    "sort4": {"task.init_args.digits": 4, "trainer.max_completion_length": 5, "warmup.steps": 400},
    "sort3": {"task.init_args.digits": 3, "trainer.max_completion_length": 4},
    "countdown": {
        "task": {"class_path": "Countdown", "init_args": {}},
        "warmup.steps": 800,
        "warmup.noise": 0.0,
        "trainer.max_completion_length": 7,
    },
}
BESIDE = "collapse.json"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One run.

    Args:
        mode: name of the failure mode.
        strength: which of its faults.
        task: what is learned.
        hidden: width of the model.
        layers: depth of the model.
        seed: of the policy's start, the data and the samples.
        guarded: whether the watch may go back and repair.
    """

    mode: str
    strength: int
    task: str
    hidden: int
    layers: int
    seed: int
    guarded: bool = False

    @property
    def name(self) -> str:
        """The name of its folder."""
        guarded = "-guarded" if self.guarded else ""
        return f"{self.mode}-{self.strength}-{self.task}-{self.hidden}x{self.layers}{guarded}-{self.seed}"


def is_finished(setting: Setting, place: Path) -> bool:
    """Whether the run is there already."""
    return (place / setting.name / BESIDE).exists()


def described(folder: Path) -> Setting:
    """What a run folder is a run of."""
    return Setting(**json.loads((folder / BESIDE).read_text()))


def record(setting: Setting, fault: Fault, place: Path, *, recipe: Path | None = None) -> RunFolder:
    """Make one run and return its folder, without samples and checkpoints; one that is there already is kept.

    Args:
        setting: The run.
        fault: What is done to it.
        place: Where the run folder goes, and the starting points that runs share.
        recipe: Another recipe than that of the fault; what no recipe says stays as it is.
    """
    output = place / setting.name
    if is_finished(setting, place):
        return RunFolder.open(output)
    shutil.rmtree(output, ignore_errors=True)
    model = {"model.init_args.hidden": setting.hidden, "model.init_args.layers": setting.layers}
    changes = {**COMMON, **TASKS[setting.task], **model, **fault.changes}
    settings = {**(changes if recipe is None else {}), "seed": setting.seed, "output": str(output)}
    read = read_recipe(recipe or QUICKSTART, [(key, json.dumps(value)) for key, value in settings.items()])
    folder = RunFolder.create(output, config_text=read.text)
    trainer = _trainer(read.recipe, fault, folder, place)
    watcher = rlstab.watch(trainer, guard=Guard() if setting.guarded else None)
    examine = _examination(read.recipe, trainer, folder, watcher)
    examine(0)
    trainer.add_callback(Periodically(EXAMINED_EVERY, examine))
    try:
        trainer.train()
        if trainer.state.global_step % EXAMINED_EVERY:
            examine(trainer.state.global_step)
        folder.append_event("finished", step=trainer.state.global_step)
    except EngineError as error:  # what a run with NaN in its weights ends with
        folder.append_event("stopped", step=trainer.state.global_step, reason=str(error))
    for part in ("rollouts", "checkpoints"):
        shutil.rmtree(output / part, ignore_errors=True)
    trainer.state.save_to_json(str(output / "trainer_state.json"))
    (output / BESIDE).write_text(json.dumps(asdict(setting)))
    return folder


def _trainer(recipe: Recipe, fault: Fault, folder: RunFolder, place: Path) -> StableGRPOTrainer:
    assert isinstance(recipe.task, EmbeddedTask)
    model, tokenizer = PretrainedModel(name=str(_warmed(recipe, place))).load(recipe.task, seed=recipe.seed)
    args = _arguments(recipe, folder)
    trainer = StableGRPOTrainer(
        model,
        list(fault.rewards(recipe.task, recipe.seed)),
        args,
        objective=recipe.objective,
        advantage=recipe.advantage,
        signals=recipe.signals,
        run=folder,
        engine=recipe.engine if fault.engine is None else partial(Faulty, **fault.engine),
        replay=recipe.replay,
        train_dataset=recipe.task.prompts(recipe.prompts, split="train", seed=recipe.seed),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    _break(trainer, fault)
    return trainer


def _examination(
    recipe: Recipe, trainer: StableGRPOTrainer, folder: RunFolder, watcher: Watch
) -> Callable[[int], None]:
    """Examines the policy on held-out prompts: for the run folder, and for the watch."""
    assert isinstance(recipe.task, EmbeddedTask)
    task, length = recipe.task, trainer.args.max_completion_length
    held_out = task.prompts(recipe.evaluation.prompts, split="test", seed=recipe.seed)

    def examine(step: int) -> None:
        policy, tokenizer = trainer.model, trainer.processing_class
        result = evaluate(policy, tokenizer, task, held_out, samples=SAMPLES, ks=(1, SAMPLES), max_new_tokens=length)
        values = {f"eval/pass@{k}": estimate for k, estimate in result.pass_at.items()} | {"eval/reward": result.reward}
        errors = {f"{key}_se": value.se for key, value in values.items()}
        means = {key: value.mean for key, value in values.items()}
        folder.append_metrics(step, means | errors)
        watcher.show(step, means)

    return examine


def _arguments(recipe: Recipe, folder: RunFolder) -> GRPOConfig:
    own = {
        "output_dir": str(folder.path / "checkpoints"),
        "seed": recipe.seed,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
    }
    return GRPOConfig(**{**recipe.trainer, **own})


def _warmed(recipe: Recipe, place: Path) -> Path:
    """The warmed-up model of a recipe; three starting points of each kind are made, once, and shared."""
    assert isinstance(recipe.task, EmbeddedTask)
    assert isinstance(recipe.model, TinyModel)
    assert recipe.warmup is not None
    seed, warmth = recipe.seed % 3, recipe.warmup
    kind = f"{recipe.task}-{recipe.model}-{warmth.steps}-{warmth.noise}-{seed}"
    kept = place / "initial" / "".join(letter if letter.isalnum() else "-" for letter in kind)
    if not kept.exists():
        model, tokenizer = recipe.model.load(recipe.task, seed=seed)
        warm_up(model, tokenizer, recipe.task, warmth, seed=seed)
        model.save_pretrained(kept)
        tokenizer.save_pretrained(kept)
    return kept


def _break(trainer: StableGRPOTrainer, fault: Fault) -> None:
    """Put the fault into the gradients, or into the activations of the last block while it trains."""
    if fault.gradient is not None:
        for parameter in trainer.model.parameters():
            parameter.register_hook(partial(_at_step, trainer, fault.gradient))
    if fault.activation is not None:
        layer: nn.Module = trainer.model.get_submodule(f"model.layers.{trainer.model.config.num_hidden_layers - 1}.mlp")
        layer.register_forward_hook(partial(_in_training, trainer, fault.activation))


def _at_step(trainer: StableGRPOTrainer, change: Callable[[int, Tensor], Tensor], values: Tensor) -> Tensor:
    return change(trainer.state.global_step + 1, values)


def _in_training(
    trainer: StableGRPOTrainer, change: Callable[[int, Tensor], Tensor], layer: nn.Module, _: Any, output: Tensor
) -> Tensor:
    return change(trainer.state.global_step + 1, output) if torch.is_grad_enabled() else output
