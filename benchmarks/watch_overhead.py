"""What watching costs: time of a GRPO step of TRL under `rlstab.watch` with all probes over the same step alone.

    python benchmarks/watch_overhead.py [--json FILE] [--models NAME ...] [--rounds N] [--steps N]

Each round trains three trainers from the same weights and seeds one after the other, in every order in turn: alone,
watched at the default cadence, and alone again in a second instance. Every round makes the same steps, and what
disturbs a step only slows it: a step's time is that of the fastest round. `ratio` is the sum of these times watched /
alone, `noise` that of alone again / alone, `rounds_ratio` the median over rounds of watched / alone. On a CPU the clock
is the processor time of this process on one thread; on CUDA it is the wall clock with a synchronisation at the end of
each step. At the end the weights of both are compared, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import itertools
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer

import rlstab
from rlstab.models import tiny_causal_lm, tiny_tokenizer
from rlstab.probes import Activations, Attention, SpectralAlignment
from rlstab.trainers import watch

ALPHABET = "0123456789=+-$"
ARMS = ("alone", "watched", "again")


class Size(NamedTuple):
    """A model, its batch, and the ratio that watching may cost."""

    hidden: int
    layers: int
    heads: int
    rows: int
    tokens: int
    target: float


MODELS = {"tiny": Size(64, 2, 4, 256, 8, 1.10), "25M": Size(512, 10, 8, 16, 16, 1.02)}


def trainer_of(size: Size, folder: Path, steps: int, *, watched: bool) -> Any:
    """A trainer of random weights; a watch changes nothing but the time."""
    tokenizer = tiny_tokenizer(ALPHABET)
    model = tiny_causal_lm(tokenizer, seed=1, hidden=size.hidden, layers=size.layers, heads=size.heads)
    args = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=size.rows,
        num_generations=8,
        max_completion_length=size.tokens,
        max_steps=steps,
        learning_rate=1e-5,
        logging_steps=steps,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=3,
    )
    prompts = Dataset.from_dict({"prompt": [f"{i * 7919 % 1000}=" for i in range(512)]})
    trainer = GRPOTrainer(model, reward, args, train_dataset=prompts, processing_class=tokenizer)
    if watched:
        watch(trainer, probes=[Activations(), Attention(), SpectralAlignment()])
    return trainer


def reward(completions: list[str], **_: Any) -> list[float]:
    """Something that varies within a group."""
    return [float(len(set(text))) for text in completions]


class Clock(TrainerCallback):
    """Reads the clock at the end of every step."""

    def __init__(self) -> None:
        self.read: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.read.append(now())


def now() -> float:
    """The clock, once the device is done."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(trainer: Any) -> np.ndarray:
    """Time of each step; the first one carries the start of the training, the last one its end."""
    clock = Clock()
    trainer.add_callback(clock)
    start = now()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return np.diff([start, *clock.read[:-1], now()])


def measure(name: str, rounds: int, steps: int, folder: Path) -> dict[str, Any]:
    """All rounds of one model, after two steps to warm up."""
    size = MODELS[name]
    times: dict[str, list[np.ndarray]] = {arm: [] for arm in ARMS}
    orders = itertools.cycle(itertools.permutations(ARMS))
    weights: dict[str, list[torch.Tensor]] = {}
    seconds(trainer_of(size, folder, 2, watched=True))
    for order in itertools.islice(orders, rounds):
        for arm in order:
            trainer = trainer_of(size, folder, steps, watched=arm == "watched")
            times[arm].append(seconds(trainer))
            weights[arm] = [p.detach().cpu() for p in trainer.model.parameters()]
    fastest = {arm: float(np.min(of_rounds, axis=0).sum()) for arm, of_rounds in times.items()}
    wholes = {arm: np.sum(of_rounds, axis=1) for arm, of_rounds in times.items()}
    return {
        "model": name,
        "parameters": sum(p.numel() for p in weights["alone"]),
        "identical": all(torch.equal(a, b) for a, b in zip(weights["alone"], weights["watched"], strict=True)),
        "seconds": fastest["alone"] / steps,
        "ratio": fastest["watched"] / fastest["alone"],
        "noise": fastest["again"] / fastest["alone"],
        "rounds_ratio": float(np.median(wholes["watched"] / wholes["alone"])),
        "target": size.target,
        "rounds": rounds,
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, arguments.rounds, arguments.steps, Path(folder)) for name in arguments.models]
    table = Table("model", "parameters", "alone, s/step", "watched / alone", "again / alone", "by rounds", "identical")
    for row in rows:
        figures = [f"{row[key]:.3f}" for key in ("seconds", "ratio", "noise", "rounds_ratio")]
        table.add_row(row["model"], f"{row['parameters']:,}", *figures, str(row["identical"]))
    Console(width=120).print(table)
    if arguments.json is not None:
        machine = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", *sys.argv]),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "cpu": platform.processor(),
            "cores": os.cpu_count(),
            **{module.__name__: module.__version__ for module in (torch, transformers, trl, rlstab)},
        }
        arguments.json.write_text(json.dumps({"machine": machine, "watch": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
