"""What a composable objective costs: time of rlstab over time of its host, measured in turn in one process.

    python benchmarks/objective_overhead.py [--json FILE] [--seconds N] [--shapes BxT ...] [--cases NAME ...]

Three parts:

- `loss`: `_compute_loss` and `backward` of `StableGRPOTrainer` and of `trl.GRPOTrainer`, on a stub that returns
  prepared log-probs and entropies as leaves, so that nothing but the loss is timed; for rlstab also what it does when
  a step closes, which is when it reads its metrics. The host makes its sampler correction when it generates, rlstab
  in the loss. Objectives of five terms are held against the host with all the terms it has: policy with sampler
  correction, `beta`, entropy bonus;
- `step`: a whole `training_step` of both on a tiny model, generation included, signals off, from the same seeds;
- `import`: processor seconds that `rlstab` and `rlstab.losses` take after torch, in fresh processes.

Each round times three trainers one after the other, in every order in turn: the host, rlstab, and the host again in
a second instance. `ratio` is the median over rounds of rlstab / host, `noise` that of host again / host, `fastest` the
ratio of the fastest samples of both, which a busy machine disturbs least. A sample of a loss is as many calls in a row
as fill 25 ms; `one call` is the same ratio of single calls in turn, each of which finds caches that another has filled,
as a step of training does. On a CPU the clock is the processor time of
this process on one thread, so that waiting does not count; on CUDA it is the wall clock between two synchronisations.
Before anything is timed, both losses and gradients are compared.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
import trl
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer

import rlstab
from rlstab import losses
from rlstab.models import tiny_causal_lm, tiny_tokenizer
from rlstab.trainers import StableGRPOTrainer
from rlstab.trainers._batches import REFERENCE_LOGPS, zero_outside_loss

SHAPES = ("8x64", "8x512", "32x512", "64x2048")
PROMPT_LENGTH = 16
WARMUP, MOST_ROUNDS = 3, 1000
SAMPLE = 25e-3  # seconds that a sample of a loss takes at least, by repetition
SINGLE = 0.2  # share of the time of a loss for single calls
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
HOST_TARGET, FIVE_TARGET, IMPORT_TARGET = 1.02, 1.15, 0.3
IMPORT_PROCESSES = 5
SHARES = {"loss": 0.6, "step": 0.4}


@dataclass(frozen=True)
class Case:
    """Arguments of the host, and what stands in the batch; `objective` where it is not that of the arguments."""

    config: Mapping[str, Any]
    old: bool = True
    sampler: bool = False
    objective: losses.Objective | None = None
    target: float = HOST_TARGET


# Clip corrected for the sampler, penalties towards start and old policy, two parts for entropy.
POLICY = losses.ClippedSurrogate(low=0.2, high=0.28, weights=(losses.TruncatedIS(max=3.0),))
PROXIMAL = losses.KL(estimator="k2", reference="old", coef=0.01)
FIVE_TERMS = losses.Objective(
    policy=POLICY,
    drift=losses.KL(estimator="k3", weight="differentiable", coef=0.04),
    proximal=PROXIMAL,
    covariance=losses.KLCov(coef=0.01),
    entropy=losses.EntropyBonus(coef=1e-3),
)
# With two of the divergence family, which are exact up to rounding for any log-probs, and cost more.
FIVE_TERMS_WITH_DIVERGENCES = losses.Objective(
    policy=POLICY,
    drift=losses.ReverseKL(coef=0.04),
    proximal=PROXIMAL,
    mixture=losses.JensenShannon(coef=0.01),
    entropy=losses.EntropyBonus(coef=1e-3),
)
HOST_WITH_ALL = {
    "loss_type": "dapo",
    "beta": 0.04,
    "entropy_coef": 1e-3,
    "vllm_importance_sampling_mode": "token_truncate",
}

CASES = {kind: Case({"loss_type": kind}) for kind in LOSS_TYPES} | {
    "gspo": Case({"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}),
    "grpo, on policy": Case({"loss_type": "grpo"}, old=False),
    "dapo, beta": Case({"loss_type": "dapo", "beta": 0.04}),
    "dapo, entropy bonus": Case({"loss_type": "dapo", "entropy_coef": 1e-3}),
    "dapo, sampler correction": Case(
        {"loss_type": "dapo", "vllm_importance_sampling_mode": "token_truncate"}, sampler=True
    ),
    "five terms": Case(HOST_WITH_ALL, sampler=True, objective=FIVE_TERMS, target=FIVE_TARGET),
    "five terms, divergences": Case(
        HOST_WITH_ALL, sampler=True, objective=FIVE_TERMS_WITH_DIVERGENCES, target=FIVE_TARGET
    ),
}
STEPS: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo"},
    "grpo, beta, two updates per batch": {"loss_type": "grpo", "beta": 0.04, "num_iterations": 2},
}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and the distance of the quartiles."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "iqr": high - low}


class Clock:
    """Processor time on a CPU; wall time between synchronisations on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def time(self, work: Callable[[], object]) -> float:
        start = self._now()
        work()
        return self._now() - start

    def _now(self) -> float:
        if not self._cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def measure(
    work: Sequence[Callable[[], object]],
    clock: Clock,
    seconds: float,
    prepare: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Rounds of host, rlstab and host again for about so many seconds of wall time, after a warm-up."""
    rows: list[list[float]] = []
    until = 0.0
    gc.collect()
    for number, order in zip(range(WARMUP + MOST_ROUNDS), itertools.cycle(itertools.permutations(range(3)))):
        times = [0.0, 0.0, 0.0]
        for which in order:
            if prepare is not None:
                prepare(which, number)
            times[which] = clock.time(work[which])
        if number < WARMUP:
            until = time.monotonic() + seconds
            continue
        rows.append(times)
        if time.monotonic() >= until:
            break
    host, ours, again = (min(column) for column in zip(*rows, strict=True))
    return {
        "rounds": len(rows),
        "ratio": spread([row[1] / row[0] for row in rows]),
        "noise": spread([row[2] / row[0] for row in rows]),
        "fastest": {"ratio": ours / host, "noise": again / host},
    }


class Prepared:
    """Scores a batch with tensors made beforehand, in place of a forward pass."""

    scores: tuple[Tensor, Tensor]

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, None]:
        return (*self.scores, None)


class PreparedHost(Prepared, GRPOTrainer):  # type: ignore[misc]
    """The host without its forward pass."""


class PreparedOurs(Prepared, StableGRPOTrainer):
    """rlstab without its forward pass."""


def constant_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 7) for text in completions]


class Bench:
    """Builds trainers of one tiny model, which the host can also load from a folder as its reference."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        self._folder = folder
        self._tokenizer = tiny_tokenizer("0123456789+=-")
        tiny_causal_lm(self._tokenizer, seed=1).save_pretrained(folder / "model")
        self._tokenizer.save_pretrained(folder / "model")
        self._model_class = type(tiny_causal_lm(self._tokenizer, seed=1))

    def config(self, **changes: Any) -> GRPOConfig:
        values: dict[str, Any] = {
            "output_dir": str(self._folder / "run"),
            "per_device_train_batch_size": 32,
            "num_generations": 8,
            "max_completion_length": 16,
            "learning_rate": 1e-3,
            "bf16": False,
            "use_cpu": self.device.type == "cpu",
            "gradient_checkpointing": False,
            "report_to": [],
            "seed": 3,
        }
        return GRPOConfig(**{**values, **changes})

    def trainer(self, kind: type[Any], args: GRPOConfig, **extra: Any) -> Any:
        """A trainer of its own copy of the model, in training mode."""
        if issubclass(kind, StableGRPOTrainer):
            extra = {"signals": None, **extra}
        model = self._model_class.from_pretrained(self._folder / "model")
        prompts = Dataset.from_dict({"prompt": [f"{i * 7919 % 1000}=" for i in range(256)]})
        trainer = kind(model, constant_reward, args, train_dataset=prompts, processing_class=self._tokenizer, **extra)
        trainer.model.to(self.device).train()
        trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps  # as its loop would set it
        return trainer

    def scoring_trainers(self, case: Case) -> list[Any]:
        """Host, rlstab and host again."""
        extra: dict[str, Any] = {"rollout_func": never_called} if case.sampler else {}
        ours = dict(extra)
        args = self.config(**case.config)
        if case.objective is not None:
            ours["objective"] = case.objective
        elif case.sampler:
            with_engine = copy.copy(args)
            with_engine.use_vllm = True
            ours["objective"] = losses.presets.from_config(with_engine)
        trainers = [
            self.trainer(PreparedHost, self.config(**case.config), **extra),
            self.trainer(PreparedOurs, self.config() if "objective" in ours else args, **ours),
            self.trainer(PreparedHost, self.config(**case.config), **extra),
        ]
        if case.sampler:
            for trainer in trainers:
                trainer.use_vllm = True  # the host applies its correction, without an engine
        return trainers


def never_called(prompts: list[str], trainer: Any) -> dict[str, Any]:
    raise AssertionError("nothing is generated here")


def batch_of(case: Case, rows: int, width: int, device: torch.device) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """The host's dictionary for completions of half to full width, and leaves to score them with."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint((width + 1) // 2, width + 1, (rows, 1), generator=generator)
    mask = torch.arange(width) < lengths

    def noisy(base: Tensor, scale: float) -> Tensor:
        return ((base + scale * torch.randn(rows, width, generator=generator)) * mask).to(device)

    logp = -torch.rand(rows, width, generator=generator) * 3 * mask
    inputs: dict[str, Any] = {
        "prompt_ids": torch.full((rows, PROMPT_LENGTH), 5, device=device),
        "prompt_mask": torch.ones(rows, PROMPT_LENGTH, dtype=torch.long, device=device),
        "completion_ids": torch.full((rows, width), 5, device=device),
        "completion_mask": mask.long().to(device),
        "advantages": torch.randn(rows, generator=generator).to(device),
        "num_items_in_batch": mask.sum().to(device),
        "rlstab_rewards": torch.zeros(rows, device=device),
        "rlstab_group": torch.arange(rows, device=device) // 8,
        "rlstab_truncated": torch.zeros(rows, dtype=torch.bool, device=device),
    }
    if case.old:
        inputs["old_per_token_logps"] = noisy(logp, 0.1)
    if case.config.get("beta"):
        inputs["ref_per_token_logps"] = inputs[REFERENCE_LOGPS + "initial"] = noisy(logp, 0.3)
    if case.sampler:
        inputs["sampling_per_token_logps"] = noisy(inputs["old_per_token_logps"].cpu(), 0.05)
        rho = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]).exp()
        inputs["importance_sampling_ratio"] = rho.clamp(max=3.0)  # the host's default bound
    entropy = (torch.rand(rows, width, generator=generator) * mask).to(device)
    zero_outside_loss(inputs)  # as it is done where completions are generated
    return inputs, (logp.to(device).requires_grad_(), entropy.requires_grad_())


def loss_and_backward(trainer: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of the log-probs. The host reads its metrics in the loss, rlstab as a step closes."""
    logp, entropy = trainer.scores
    logp.grad = entropy.grad = None
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    if isinstance(trainer, StableGRPOTrainer):
        trainer._close_step()
    trainer.state.global_step += 1
    return loss.detach(), logp.grad


def repeat(times: int, work: Callable[[], object]) -> None:
    for _ in range(times):
        work()


def difference(ours: tuple[Tensor, Tensor], host: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Of the losses, and of the gradients relative to their norm."""
    return {
        "loss": float((ours[0] - host[0]).abs()),
        "gradient": float((ours[1] - host[1]).norm() / host[1].norm()),
    }


def measure_loss(bench: Bench, name: str, shape: str, clock: Clock, seconds: float) -> dict[str, Any]:
    """The figures of one case at one shape."""
    case = CASES[name]
    rows, width = map(int, shape.split("x"))
    inputs, scores = batch_of(case, rows, width, bench.device)
    trainers = bench.scoring_trainers(case)
    for trainer in trainers:
        trainer.scores = scores
    trainers[1]._open_step([inputs])
    host, ours, _ = (loss_and_backward(trainer, inputs) for trainer in trainers)
    calls = max(1, round(SAMPLE / clock.time(partial(loss_and_backward, trainers[0], inputs))))
    call = [partial(loss_and_backward, trainer, inputs) for trainer in trainers]
    work = [partial(repeat, calls, one) for one in call]
    same = {} if case.objective is not None else {"difference": difference(ours, host)}
    single = measure(call, clock, SINGLE * seconds)["ratio"]
    repeated = measure(work, clock, (1 - SINGLE) * seconds)
    return {"case": name, "shape": shape, "target": case.target, **same, **repeated, "single": single}


class Stepper:
    """Drives a trainer by hand, one `training_step` at a time."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._batches = self._forever()
        self._batch: Any = None
        self.losses: list[float] = []
        trainer.create_optimizer()

    def _forever(self) -> Iterator[Any]:
        while True:
            yield from self._trainer.get_train_dataloader()

    def prepare(self, seed: int) -> None:
        """The optimizer's step, the next prompts, the seed."""
        if self._batch is not None:
            self._trainer.optimizer.step()
            self._trainer.state.global_step += 1
        self._trainer.optimizer.zero_grad()
        self._batch = next(self._batches)
        torch.manual_seed(seed)

    def step(self) -> None:
        self.losses.append(float(self._trainer.training_step(self._trainer.model, self._batch, None)))


def measure_steps(bench: Bench, name: str, clock: Clock, seconds: float) -> dict[str, Any]:
    """Whole steps from the same seeds."""
    kinds = (GRPOTrainer, StableGRPOTrainer, GRPOTrainer)
    steppers = [Stepper(bench.trainer(kind, bench.config(**STEPS[name]))) for kind in kinds]
    work = [stepper.step for stepper in steppers]
    result = measure(work, clock, seconds, lambda which, number: steppers[which].prepare(seed=number))
    apart = max(abs(ours - host) for ours, host in zip(steppers[1].losses, steppers[0].losses, strict=True))
    return {"case": name, "target": HOST_TARGET, "difference": {"loss": apart}, **result}


# ---------------------------------------------------------------------- imports

IMPORT_CODE = """
import time
def now():
    return time.perf_counter(), time.process_time()
start = now()
import torch
middle = now()
import {module}
print(*(b - a for a, b in (*zip(start, middle), *zip(middle, now()))))
"""


def measure_import(module: str, processes: int) -> dict[str, Any]:
    """Seconds of torch, and of what the module adds to it, in fresh processes: of the processor, and by the wall.

    A process before them leaves the bytecode, as any first import does.
    """
    code = [sys.executable, "-c", IMPORT_CODE.format(module=module)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    _, *runs = (
        subprocess.run(code, capture_output=True, text=True, check=True, env=environment).stdout.split()
        for _ in range(1 + processes)
    )
    torch_wall, torch_cpu, added_wall, added_cpu = (
        spread([float(x) for x in column]) for column in zip(*runs, strict=True)
    )
    seconds = {"torch": torch_cpu, "added": added_cpu, "torch_wall": torch_wall, "added_wall": added_wall}
    return {"module": module, "target": IMPORT_TARGET, **seconds}


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what the figures were made."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl, accelerate, rlstab)}
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
    }


def jobs(arguments: argparse.Namespace, bench: Bench) -> list[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Everything to measure: part, what is shown while it runs, and the work."""
    clock = Clock(bench.device)
    cells = [(name, shape) for name in arguments.cases for shape in arguments.shapes]
    of_loss = SHARES["loss"] * arguments.seconds / max(len(cells), 1)
    of_step = SHARES["step"] * arguments.seconds / len(STEPS)
    return [
        *(("loss", f"{n} {s}", partial(measure_loss, bench, n, s, clock, of_loss)) for n, s in cells),
        *(("step", f"step: {n}", partial(measure_steps, bench, n, clock, of_step)) for n in STEPS),
        *(
            ("import", f"import {module}", partial(measure_import, module, arguments.processes))
            for module in ("rlstab", "rlstab.losses")
        ),
    ]


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All figures."""
    torch.set_num_threads(1)
    disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {"machine": machine(device), "loss": [], "step": [], "import": []}
    columns = (TextColumn("{task.description:40}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        todo = jobs(arguments, Bench(Path(folder), device))
        task = progress.add_task("", total=len(todo))
        for part, title, work in todo:
            progress.update(task, description=title)
            results[part].append(work())
            progress.advance(task)
    return results


def tables(results: Mapping[str, Any]) -> list[Table]:
    """What is printed: `*` marks a median above its target."""
    figures = ("rlstab / host", "min", "max", "IQR", "host / host", "fastest", "rounds")
    loss, step = (
        Table("case", "shape", *figures, "one call", title="loss and backward"),
        Table("case", *figures, title="training_step"),
    )
    for row in results["loss"]:
        loss.add_row(row["case"], row["shape"], *_cells(row), f"{row['single']['median']:.3f}")
    for row in results["step"]:
        step.add_row(row["case"], *_cells(row))
    imports = Table("module", "torch, s", "added, s", "min", "max", "added, wall s", title="import")
    for row in results["import"]:
        added = row["added"]
        mark = "*" if added["median"] > row["target"] else ""
        numbers = [f"{x:.3f}" for x in (added["min"], added["max"], row["added_wall"]["median"])]
        imports.add_row(row["module"], f"{row['torch']['median']:.2f}", f"{added['median']:.3f}{mark}", *numbers)
    return [loss, step, imports]


def _cells(row: Mapping[str, Any]) -> list[str]:
    ratio = row["ratio"]
    mark = "*" if ratio["median"] > row["target"] else ""
    spread_of = [f"{ratio[key]:.3f}" for key in ("min", "max", "iqr")]
    beside = [f"{row['noise']['median']:.3f}", f"{row['fastest']['ratio']:.3f}", str(row["rounds"])]
    return [f"{ratio['median']:.3f}{mark}", *spread_of, *beside]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--seconds", type=float, default=150.0, help="time for losses and steps (default: 150)")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="BxT", help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--processes", type=int, default=IMPORT_PROCESSES, help="per import")
    arguments = parser.parse_args()
    results = run(arguments, Console(stderr=True))
    for table in tables(results):
        Console(width=120).print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
