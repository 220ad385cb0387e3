"""From a recipe to a trained model: warm-up, evaluation, training, evaluation, report."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from jsonargparse import get_loader
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed

from rlstab.errors import RecipeError
from rlstab.recipes._arguments import check_recipe, host_arguments, host_errors
from rlstab.recipes._beside import beside
from rlstab.recipes._gradients import Updates
from rlstab.recipes._held_out import HeldOutExam
from rlstab.recipes._memory import Sharding
from rlstab.recipes._models import LoadedModel, PretrainedModel
from rlstab.recipes._plan import plan_checked
from rlstab.recipes._reading import ReadRecipe
from rlstab.recipes._recipe import Recipe
from rlstab.recipes._supervised import LoggedProgress, longest_completion, supervised_trainer
from rlstab.recipes._tree import changed_keys
from rlstab.recipes._warmup import WarmUp, warm_up
from rlstab.record import RunFolder
from rlstab.report import print_summary, write_plots, write_report
from rlstab.tasks import EmbeddedTask, reward_functions
from rlstab.trainers import (
    GracefulStop,
    GRPOConfig,
    Periodically,
    ProgressCallback,
    SFTConfig,
    StableGRPOTrainer,
    TrustRegionSFTTrainer,
    Watch,
    latest_checkpoint,
)

__all__ = ["Outcome", "run_recipe"]

STARTING_POINT = ("model", "task", "warmup", "adapter", "seed")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    Args:
        folder: what it left.
        interrupted: whether it was stopped before its end; it can be resumed.
    """

    folder: RunFolder
    interrupted: bool


def run_recipe(read: ReadRecipe, *, resume: bool = False, console: Console | None = None) -> Outcome:
    """Do what a recipe says, and leave a run folder with checkpoints, metrics, plots and a report.

    An interrupt (Ctrl-C) during training saves a checkpoint after the current step and ends the run; a second one, or
    one outside training, ends it where it is. Either way the run can be resumed.

    Args:
        read: the recipe.
        resume: go on in the recipe's run folder, from its last checkpoint, on the same trajectory as a run without a
            stop; without a checkpoint from the start.
        console: where to show the progress; the terminal if not given.

    Returns:
        The run folder, and whether the run reached its end.

    Raises:
        ConfigError: something in the recipe cannot be honoured.
        RecordError: the run folder exists already (or does not, to resume), or cannot be written.
    """
    main = int(os.environ.get("RANK", "0")) == 0
    console = (console or Console()) if main else Console(quiet=True)
    recipe, output = read.recipe, _output(read)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    args = host_arguments(recipe, output)
    checked = check_recipe(recipe, args)
    if main:
        plan_checked(recipe, args, checked.references).warn(console)
    run = _Run(recipe, args, checked.updates, output, _open_folder(read, resume, console) if main else None, console)
    try:
        interrupted = run.go(resume=resume)
    except KeyboardInterrupt:
        interrupted = True
    if run.folder is None:
        return Outcome(folder=RunFolder.open(output), interrupted=interrupted)
    run.folder.append_event("interrupted" if interrupted else "finished")
    _conclude(run.folder, interrupted, console)
    if isinstance(run.trainer, StableGRPOTrainer):
        run.trainer.send_report(run.folder.report)
    return Outcome(folder=run.folder, interrupted=interrupted)


def _open_folder(read: ReadRecipe, resume: bool, console: Console) -> RunFolder:
    output = _output(read)
    if not resume:
        return RunFolder.create(output, config_text=read.text)
    load = get_loader("yaml")
    before = load(RunFolder.open(output).config_text())
    for key, (old, new) in changed_keys(before, load(read.text)).items():
        if key.split(".")[0] in STARTING_POINT:
            raise RecipeError(
                f"{key}: the policy that the run started from depends on it; expected {old!r}, got {new!r}: "
                "start a new run with another --output"
            )
    folder = RunFolder.create(output, config_text=read.text, exist_ok=True)
    for key, (old, new) in changed_keys(before, load(folder.config_text())).items():
        console.print(f"resumed with another {key}: {old} → {new}", highlight=False)
    return folder


def _conclude(folder: RunFolder, interrupted: bool, console: Console) -> None:
    """Write the report, and say what is where and how to go on."""
    write_plots(folder)
    write_report(folder)
    checkpoint = latest_checkpoint(folder.checkpoints)
    if interrupted:
        state = (
            f"{checkpoint} holds the state" if checkpoint else "no checkpoint was reached, a resumed run starts anew"
        )
        console.print(f"interrupted; {state}", highlight=False, soft_wrap=True)
        command = f"rlstab train {quote(str(folder.config_path))} --resume"
        console.print(f"go on with: {command}", highlight=False, soft_wrap=True)
        return
    print_summary(folder, console)
    console.print(f"report:      {folder.report}", highlight=False, soft_wrap=True)
    console.print(f"plots:       {folder.plots}", highlight=False, soft_wrap=True)
    if checkpoint is not None:
        console.print(f"checkpoint:  {checkpoint}", highlight=False, soft_wrap=True)


class _Run:
    """The parts of a run in the order in which they are needed; `folder` is None on all ranks but the first."""

    def __init__(
        self,
        recipe: Recipe,
        args: GRPOConfig | SFTConfig,
        updates: Updates,
        output: Path,
        folder: RunFolder | None,
        console: Console,
    ) -> None:
        self.recipe = recipe
        self.args = args
        self.updates = updates
        self.output = output
        self.folder = folder
        self.console = console
        self.trainer: StableGRPOTrainer | TrustRegionSFTTrainer | None = None
        self.watcher: Watch | None = None
        #: Whether no process holds the whole policy, so that none can sample from it by itself.
        self.sharded = Sharding.of_launch().weights > 1
        self.exam = HeldOutExam(
            recipe=recipe, max_new_tokens=longest_completion(recipe, args), load_initial=lambda: self._start().model
        )

    def go(self, *, resume: bool) -> bool:
        """Evaluate, train, evaluate; return whether training was interrupted."""
        if self.sharded:
            command = f"rlstab train {quote(str(self.output / 'config.yaml'))} --resume"
            text = f"weights are spread over processes, so the policy is evaluated afterwards, by one: {command}"
            self.console.print(text, highlight=False, soft_wrap=True)
        checkpoint = latest_checkpoint(self.args.output_dir) if resume else None
        if checkpoint is not None and _is_finished(checkpoint, self.args):
            self._evaluate_finished(checkpoint)
            return False
        supervised = self.recipe.supervised is not None
        if resume and self.folder is not None and (checkpoint is None or supervised):
            self.folder.resume_at(0 if checkpoint is None else _step_of(checkpoint))
        progress = (LoggedProgress if supervised else ProgressCallback)(self.console)
        stop = GracefulStop(self.console)
        trainer = self.trainer = self._trainer([progress, stop])
        policy, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
        self._evaluate("before", 0, policy, tokenizer)
        trainer.accelerator.wait_for_everyone()
        try:
            with stop:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            progress.close()
        if not stop.requested:
            self._evaluate("after", trainer.state.global_step, policy, tokenizer)
        trainer.accelerator.wait_for_everyone()
        return stop.requested

    def _trainer(self, callbacks: list[Any]) -> StableGRPOTrainer | TrustRegionSFTTrainer:
        recipe = self.recipe
        with self.args.main_process_first(local=False):
            match recipe:
                case Recipe(warmup=WarmUp() as settings, task=EmbeddedTask() as task) if not self._warmed.is_dir():
                    self._warm_up(settings, task)
        trainer = self._made(callbacks)
        trainer.remove_callback(PrinterCallback)
        if recipe.watch is not None:
            self.watcher = recipe.watch.attach(trainer, self.folder)
        self.updates.attach(trainer)
        if recipe.evaluation.every is not None and not self.sharded:
            policy, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
            trainer.add_callback(
                Periodically(recipe.evaluation.every, lambda step: self._examine(step, policy, tokenizer))
            )
        return trainer

    def _examine(self, step: int, policy: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Evaluate the policy on the way, in one process, and show the watch of all what was found."""
        values: dict[str, float] = {}
        if self.folder is not None:
            values, _ = self.exam.take(policy, tokenizer)
            self.folder.append_metrics(step, values)
        if self.watcher is not None:
            self.watcher.show(step, values)

    def _made(self, callbacks: list[Any]) -> StableGRPOTrainer | TrustRegionSFTTrainer:
        """The trainer, on rollouts or on demonstrations."""
        recipe, args = self.recipe, self.args
        if isinstance(args, SFTConfig):
            assert recipe.supervised is not None
            with host_errors():
                return supervised_trainer(recipe, recipe.supervised, args, self._start, callbacks)
        data = recipe.task.prompts(recipe.prompts, split="train", seed=recipe.seed)
        data, others = beside(recipe, args, data, self._start, self.output / "buffer")
        model, tokenizer = self._start()
        set_seed(recipe.seed)
        with host_errors():
            return StableGRPOTrainer(
                model,
                reward_functions(recipe.named_rewards, recipe.task),
                args,
                objective=recipe.objective,
                advantage=recipe.advantage,
                signals=recipe.signals,
                run=self.folder,
                engine=recipe.engine,
                replay=recipe.replay,
                environment_factory=None if recipe.environment is None else recipe.environment.of(recipe.task),
                train_dataset=data,
                processing_class=tokenizer,
                callbacks=callbacks,
                peft_config=None if recipe.adapter is None else recipe.adapter.config(),
                **others,
            )

    def _start(self) -> LoadedModel:
        """The policy that training starts from: as it is loaded, or as it came out of the warm-up."""
        recipe = self.recipe
        source = recipe.model if recipe.warmup is None else PretrainedModel(name=str(self._warmed))
        return source.load(recipe.task, seed=recipe.seed)

    @property
    def _warmed(self) -> Path:
        return self.output / "initial"

    def _warm_up(self, settings: WarmUp, task: EmbeddedTask) -> None:
        """Warm the model up, once, and keep it in the run folder."""
        seed = self.recipe.seed
        model, tokenizer = self.recipe.model.load(task, seed=seed)
        columns = (TextColumn("[bold]warm-up"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=self.console) as progress:
            line = progress.add_task("warm-up", total=settings.steps, loss=float("nan"))
            warm_up(
                model.to(self.args.device),
                tokenizer,
                task,
                settings,
                seed=seed,
                on_step=lambda step, steps, loss: progress.update(line, completed=step, loss=loss),
            )
        unfinished = self._warmed.with_name("initial.unfinished")
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.replace(self._warmed)

    def _evaluate(self, phase: str, step: int, policy: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Evaluate the policy of a step, unless the run folder holds that already."""
        if self.folder is None or self.sharded or self._has_evaluated(phase, step):
            return
        with self.console.status(f"evaluating on {self.recipe.evaluation.prompts} held-out prompts, {phase} training"):
            values, examples = self.exam.take(policy, tokenizer)
        self.folder.append_event("evaluation", step=step, phase=phase, values=values)
        self.folder.append_rollouts(step, [{**example, "phase": phase} for example in examples])

    def _has_evaluated(self, phase: str, step: int) -> bool:
        events = [] if self.folder is None else self.folder.events().of("evaluation")
        return any(event.step == step and event.fields["phase"] == phase for event in events)

    def _evaluate_finished(self, checkpoint: Path) -> None:
        """Do what is left of a run that was stopped after its last step."""
        self.console.print(f"{checkpoint} is the last one: raise trainer.max_steps to train on", soft_wrap=True)
        adapter = self.recipe.adapter
        start, tokenizer = self._start()
        if not self._has_evaluated("before", 0):  # its weights were spread over processes
            policy: Any = start if adapter is None else get_peft_model(start, adapter.config())
            self._evaluate("before", 0, policy.to(self.args.device), tokenizer)
            start = self._start().model
        if adapter is None:
            policy = PretrainedModel(name=str(checkpoint)).load(self.recipe.task, seed=self.recipe.seed).model
        else:
            policy = PeftModel.from_pretrained(start, checkpoint)
        self._evaluate("after", _step_of(checkpoint), policy.to(self.args.device), tokenizer)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_finished(checkpoint: Path, args: GRPOConfig | SFTConfig) -> bool:
    """Whether a checkpoint is that of the last step that the arguments ask for."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    if args.max_steps > 0:
        return bool(state["global_step"] >= args.max_steps)
    return bool(state["global_step"] >= state["max_steps"] and state["num_train_epochs"] >= args.num_train_epochs)


def _output(read: ReadRecipe) -> Path:
    if read.recipe.output is None:
        raise RecipeError("output: a run needs its folder; expected a path, got None")
    return read.recipe.output
