"""Whole runs of a small recipe: to the end, stopped by Ctrl-C, and resumed."""

import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import pytest
from accelerate import PartialState
from rich.console import Console
from two_processes import PROCESSES, in_two_processes

from rlstab.cli import main
from rlstab.errors import ConfigError, RecipeError, RecordError
from rlstab.recipes import Outcome, read_recipe, run_recipe
from rlstab.record import RunFolder

TEXT = """
model: {class_path: TinyModel, init_args: {hidden: 32, heads: 2}}
task: {class_path: SortDigits, init_args: {digits: 2}}
warmup: {steps: 60, batch_size: 32, learning_rate: 5e-3}
objective:
  terms:
    policy: ClippedSurrogate
    drift:
      class_path: JensenShannon
      init_args: {coef: {class_path: Linear, init_args: {start: 0.1, end: 0.0, steps: 8}}}
advantage: GroupNorm
engine: Transformers
signals: {drift_every: 10}
trainer:
  max_steps: 30
  learning_rate: 1e-3
  per_device_train_batch_size: 16
  gradient_accumulation_steps: 2
  steps_per_generation: 4
  num_generations: 4
  num_iterations: 2
  max_completion_length: 4
  gradient_checkpointing: false
  bf16: false
  dataloader_pin_memory: false
evaluation: {prompts: 10, samples: 4, ks: [1, 4], every: 12}
threads: 1
"""
TIMES = {"train/step_time"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    (path / "recipe.yaml").write_text(TEXT)
    return path


def run(folder: Path, name: str, *overrides: tuple[str, str], resume: bool = False) -> Outcome:
    read = read_recipe(folder / "recipe.yaml", [("output", str(folder / name)), *overrides], resume=resume)
    return run_recipe(read, resume=resume, console=Console(quiet=True))


@pytest.fixture(scope="module")
def whole(folder: Path) -> RunFolder:
    """A run without a stop."""
    outcome = run(folder, "whole")
    assert not outcome.interrupted
    return outcome.folder


def metrics(folder: RunFolder) -> dict[int, dict[str, Any]]:
    """The numbers of each step; what is no number, such as the mismatch of no tokens, as text, which equals itself."""
    rows = folder.metrics().rows
    kept = {row.step: {key: value for key, value in row.values.items() if key not in TIMES} for row in rows}
    return {
        step: {key: "nan" if math.isnan(value) else value for key, value in values.items()}
        for step, values in kept.items()
    }


def evaluations(folder: RunFolder) -> list[tuple[object, Mapping[str, float]]]:
    return [(event.fields["phase"], event.fields["values"]) for event in folder.events().of("evaluation")]  # type: ignore[misc]


def test_a_run_leaves_its_folder(whole: RunFolder) -> None:
    names = {path.relative_to(whole.path).as_posix() for path in whole.path.rglob("*")}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "events.jsonl",
        "report.html",
        "plots/reward.png",
        "plots/kl_drift.png",
        "plots/mismatch.png",
        "checkpoints/checkpoint-30/model.safetensors",
        "initial/model.safetensors",
    } <= names
    assert not any("unfinished" in name for name in names)
    assert [event.kind for event in whole.events().rows] == ["evaluation", "evaluation", "finished"]


def test_every_step_has_its_row(whole: RunFolder) -> None:
    rows = metrics(whole)
    assert sorted(rows) == list(range(1, 31))
    for row in rows.values():
        assert {"train/reward", "mismatch/k3", "objective/policy/loss", "objective/drift/loss"} <= row.keys()
    assert [step for step, row in rows.items() if "drift/initial/kl" in row] == [1, 11, 21]
    assert [step for step, row in rows.items() if "eval/pass@1" in row] == [12, 24]
    assert any(row["train/reward_std"] > 0 for row in rows.values())
    assert rows[4]["objective/drift/weight"] == pytest.approx(0.1 * (1 - 3 / 8))


def test_before_and_after(whole: RunFolder) -> None:
    (first, before), (second, after) = evaluations(whole)
    assert (first, second) == ("before", "after")
    keys = {"eval/pass@1", "eval/pass@4", "eval/reward", "eval/entropy", "eval/kl"}
    assert before.keys() == after.keys() == keys | {f"{key}_se" for key in keys}
    assert before["eval/kl"] == 0.0
    assert after["eval/kl"] > 0.0
    assert all(math.isfinite(value) for value in (*before.values(), *after.values()))
    phases = [row.fields.get("phase") for row in whole.rollouts().rows]
    assert {"before", "after"} <= set(phases)


def test_the_resolved_configuration_is_kept(whole: RunFolder) -> None:
    kept = read_recipe(whole.config_path)
    assert kept.recipe.output == whole.path
    assert kept.recipe.trainer["max_steps"] == 30
    assert "adam_beta2" in whole.config_text()


def test_another_run_does_not_write_into_it(folder: Path, whole: RunFolder) -> None:
    with pytest.raises(RecordError, match=r"whole is not empty .*choose another folder, or resume the run in it"):
        run(folder, "whole")


def test_a_resumed_run_keeps_where_it_started_from(folder: Path, whole: RunFolder) -> None:
    text = whole.config_text()
    with pytest.raises(RecipeError, match=r"^warmup.steps: the policy that the run started from .*expected 60, got 5"):
        run(folder, "whole", ("warmup.steps", "5"), resume=True)
    assert whole.config_text() == text


def test_only_a_run_can_be_resumed(folder: Path) -> None:
    with pytest.raises(RecordError, match=r"no run folder at .*nothing"):
        run(folder, "nothing", resume=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainer.num_generations", "5", r"^trainer: .*num_generations"),
        ("trainer.save_strategy", "sometimes", r"^trainer: sometimes is not a valid SaveStrategy"),
        ("trainer.beta", "0.1", r"beta=0.1 has no effect beside objective"),
        ("trainer.steps_per_generation", "3", r"steps_per_generation=3 is no multiple of gradient_accumulation_steps"),
    ],
)
def test_what_the_trainer_refuses_makes_no_folder(folder: Path, key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        run(folder, "refused", (key, value))
    assert "\n" not in str(caught.value)
    assert not (folder / "refused").exists()


def test_a_part_that_reads_the_sampler_needs_an_engine(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"reads the sampler's log-probs, but generation with transformers"):
        run(folder, "refused", ("engine", "null"), ("objective.terms.drift.samples", "sampler"))
    assert not (folder / "refused").exists()


def command(log: Path, *words: str) -> int:
    """The exit code of `rlstab` with these words, which prints into a file."""
    with log.open("w") as said, redirect_stdout(said), redirect_stderr(said):
        return main(list(words))


def ended(log: Path, *words: str) -> NoReturn:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job started in the background may ignore it
    sys.exit(command(log, *words))


def train(folder: Path, name: str, log: Path) -> BaseProcess:
    """Start the recipe as a command, in a process of its own."""
    words = ["train", str(folder / "recipe.yaml"), "--output", str(folder / name)]
    process = PROCESSES.Process(target=ended, args=(log, *words))
    process.start()
    return process


def wait_for(process: BaseProcess, log: Path, file: Path, lines: int) -> None:
    deadline = time.monotonic() + 120
    while not file.exists() or len(file.read_bytes().splitlines()) < lines:
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def as_one_of_two(folder: Path) -> tuple[int, int, str]:
    """The exit code, the number of processes, and what was printed."""
    log = folder / f"two-{os.environ['RANK']}.txt"
    changes = ["--trainer.use_cpu=true", "--trainer.max_steps=3", "--evaluation.every=2", "--warmup.steps=20"]
    code = command(log, "train", str(folder / "recipe.yaml"), "--output", str(folder / "two"), *changes)
    return code, PartialState().num_processes, log.read_text()


def test_two_processes_train_one_policy(folder: Path) -> None:
    """The first process evaluates and writes, while the other waits."""
    codes, processes, said = zip(*in_two_processes(as_one_of_two, folder), strict=True)
    assert codes == (0, 0), said
    assert processes == (2, 2)
    assert "".join(said).count("before → after") == 1
    run_folder = RunFolder.open(folder / "two")
    assert sorted(metrics(run_folder)) == [1, 2, 3]
    assert [event.kind for event in run_folder.events().rows] == ["evaluation", "evaluation", "finished"]


def test_ctrl_c_and_resume_follow_the_same_trajectory(
    folder: Path, whole: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    log = folder / "stopped.txt"
    process = train(folder, "stopped", log)
    wait_for(process, log, folder / "stopped" / "metrics.jsonl", lines=3)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    output = log.read_text()
    assert process.exitcode == 130, output
    stopped = RunFolder.open(folder / "stopped")
    last = stopped.metrics().rows[-1].step
    assert 3 <= last < 30
    assert f"checkpoint-{last} holds the state" in output
    assert f"go on with: rlstab train {stopped.config_path} --resume" in output
    assert [event.kind for event in stopped.events().rows] == ["evaluation", "interrupted"]
    assert stopped.report.is_file()

    assert main(["train", str(stopped.config_path), "--resume"]) == 0
    assert "before → after" in capsys.readouterr().out
    resumed = RunFolder.open(stopped.path)
    assert metrics(resumed) == metrics(whole)
    assert evaluations(resumed) == evaluations(whole)
    assert [event.step for event in resumed.events().of("resume")] == [last]
