"""Runs that were stopped outside of training, or have ended, and go on."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import pytest
from rich.console import Console

from rlstab.recipes import LoadedModel, ModelSource, read_recipe, run_recipe
from rlstab.record import RunFolder
from rlstab.tasks import Task

QUIET = Console(quiet=True)


RECIPE = """
model: {class_path: TinyModel, init_args: {hidden: 16, heads: 2, layers: 1}}
task: {class_path: SortDigits, init_args: {digits: 2}}
objective: {terms: {policy: ClippedSurrogate}}
engine: Transformers
warmup: {steps: 2, batch_size: 4}
trainer: {max_steps: 2, per_device_train_batch_size: 4, num_generations: 4, max_completion_length: 3, bf16: false,
  dataloader_pin_memory: false}
evaluation: {prompts: 2, samples: 2, ks: [1]}
"""


@final
@dataclass(frozen=True, kw_only=True)
class _Interrupted(ModelSource):
    """A model whose loading is interrupted by Ctrl-C."""

    def load(self, task: Task, *, seed: int) -> LoadedModel:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")


def interrupted_while_loading(recipe: Path) -> RunFolder:
    read = read_recipe(recipe)
    outcome = run_recipe(replace(read, recipe=replace(read.recipe, model=_Interrupted())), console=QUIET)
    assert outcome.interrupted
    return outcome.folder


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """As in a terminal; a job started in the background may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{RECIPE}output: {tmp_path / 'run'}\n")
    return path


def test_a_run_stopped_before_training_starts_anew(recipe: Path) -> None:
    folder = interrupted_while_loading(recipe)
    assert [event.kind for event in folder.events().rows] == ["interrupted"]
    assert folder.report.is_file()
    outcome = run_recipe(read_recipe(folder.config_path, resume=True), resume=True, console=QUIET)
    assert not outcome.interrupted
    kinds = [event.kind for event in outcome.folder.events().rows]
    assert kinds == ["interrupted", "resume", "evaluation", "evaluation", "finished"]
    assert [row.step for row in outcome.folder.metrics().rows] == [1, 2]


def trained_to_the_end(recipe: Path) -> RunFolder:
    return run_recipe(read_recipe(recipe), console=QUIET).folder


@pytest.mark.parametrize("adapter", ["null", "{rank: 2}"])
def test_what_was_left_to_do_after_the_last_step(recipe: Path, adapter: str) -> None:
    """A run stopped during its last evaluation is evaluated, and not trained on."""
    recipe.write_text(f"{recipe.read_text()}adapter: {adapter}\n")
    folder = trained_to_the_end(recipe)
    events = folder.path / "events.jsonl"
    whole = folder.events().of("evaluation")
    events.write_text("".join(line for line in events.read_text().splitlines(True) if '"after"' not in line))
    resumed = run_recipe(read_recipe(folder.config_path, resume=True), resume=True, console=QUIET).folder
    assert [row.step for row in resumed.metrics().rows] == [1, 2]
    again = resumed.events().of("evaluation")
    assert [(event.step, event.fields) for event in again] == [(event.step, event.fields) for event in whole]


def test_a_finished_run_can_be_trained_on(recipe: Path) -> None:
    folder = trained_to_the_end(recipe)
    more = read_recipe(folder.config_path, [("trainer.max_steps", "3")], resume=True)
    resumed = run_recipe(more, resume=True, console=QUIET).folder
    assert [row.step for row in resumed.metrics().rows] == [1, 2, 3]
    assert [event.kind for event in resumed.events().rows][-4:] == [
        "config_replaced",
        "resume",
        "evaluation",
        "finished",
    ]
