"""Do the default rules warn before the harm, and are they quiet where there is none? Recorded runs, replayed.

    python benchmarks/diagnosis.py record FOLDER --seeds 0 1     # makes the runs: one fault each, or none
    python benchmarks/early_warning.py FOLDER [--seeds 2 3 ...] [--json FILE]

Each run folder is called FAULT-SEED; those of `healthy...` are the controls. The monitor is shown the numbers of the
run step by step, as it would have been, and nothing of the configuration. Every fault has its harm, fixed here
beforehand:

- `reward`: the mean of 10 steps falls below 90 % of its best so far, and the mean of what follows stays below 93 %;
- `held out`: pass@1 on held-out prompts ends 10 % below its best;
- `diversity`: pass@k for the largest k ends two standard errors below its start;
- `numbers`: the first step whose loss or gradient is not finite.

A harm is warned of if an alarm of severity warning or worse opens no later than at its step. A run with a fault and
without its harm is a stressed survivor. Beside the rules stand fixed thresholds, as they are copied from guide to
guide.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from rlstab.monitors import Monitor
from rlstab.record import RunFolder

Rows = Sequence[tuple[int, Mapping[str, float]]]
REWARD, LOSS, NORM = "train/reward", "objective/loss", "train/grad_norm"
WINDOW = 10


def column(rows: Rows, key: str) -> tuple[list[int], np.ndarray]:
    """Steps and values of a signal."""
    found = [(step, values[key]) for step, values in rows if key in values]
    return [step for step, _ in found], np.array([value for _, value in found])


def harm_to_reward(rows: Rows) -> int | None:
    steps, values = column(rows, REWARD)
    if len(values) < 2 * WINDOW:
        return None
    means = np.convolve(values, np.ones(WINDOW) / WINDOW, "valid")
    best = np.maximum.accumulate(means)
    for i, mean in enumerate(means):
        if mean < 0.9 * best[i] and means[i:].mean() < 0.93 * best[i]:
            return steps[i + WINDOW - 1]
    return None


def harm_held_out(rows: Rows) -> int | None:
    steps, values = column(rows, "eval/pass@1")
    if len(values) < 2 or values[-1] >= 0.9 * values.max():
        return None
    return steps[int(np.argmax(values)) + 1]


def harm_to_diversity(rows: Rows) -> int | None:
    keys = {key for _, values in rows for key in values if key.startswith("eval/pass@") and not key.endswith("_se")}
    if not keys:
        return None
    key = max(keys, key=lambda key: int(key.partition("@")[2]))
    (steps, values), (_, errors) = column(rows, key), column(rows, f"{key}_se")
    below = values < values[0] - 2 * np.hypot(errors, errors[0])
    return next((steps[i] for i in range(1, len(values)) if below[i:].all()), None)


def harm_to_numbers(rows: Rows) -> int | None:
    bad = [
        step for step, values in rows if any(key in values and not math.isfinite(values[key]) for key in (LOSS, NORM))
    ]
    return bad[0] if bad else None


HARMS: dict[str, Callable[[Rows], int | None]] = {
    "reward": harm_to_reward,
    "held out": harm_held_out,
    "diversity": harm_to_diversity,
    "numbers": harm_to_numbers,
}
OF_FAULT = {
    "diversity": ("diversity",),
    "entropy": ("diversity",),
    "length": ("held out",),
    "reference_drift": ("held out",),
    "nan_backward": ("numbers",),
    "nan_forward": ("numbers",),
}
DEFAULT_HARMS = ("reward", "held out")


def crossing(key: str, holds: Callable[[np.ndarray], np.ndarray]) -> Callable[[Rows], int | None]:
    """The first step at which a fixed threshold on one signal is passed."""

    def first(rows: Rows) -> int | None:
        steps, values = column(rows, key)
        passed: Sequence[int] = np.flatnonzero(holds(values)).tolist() if len(values) else []
        return steps[passed[0]] if len(passed) else None

    return first


FIXED = {
    "KL to the start > 0.3": crossing("drift/initial/kl", lambda x: x > 0.3),
    "entropy < half its start": crossing("policy/entropy", lambda x: x < 0.5 * x[0]),
    "gradient norm > 5": crossing(NORM, lambda x: ~(x <= 5)),
    "reward 20 % below its best": crossing(REWARD, lambda x: x < 0.8 * np.maximum.accumulate(x)),
}


@dataclass(frozen=True)
class Verdict:
    """What became of one run, and the first step at which each way of watching spoke."""

    fault: str
    seed: int
    steps: int
    harm: int | None
    alarms: int
    first: Mapping[str, int | None]

    @property
    def control(self) -> bool:
        return self.fault.startswith("healthy")


def judge(folder: Path) -> Verdict:
    """Replay one run."""
    fault, _, seed = folder.name.rpartition("-")
    rows = [(row.step, row.values) for row in RunFolder.open(folder).metrics().rows]
    harms = [HARMS[name](rows) for name in OF_FAULT.get(fault, DEFAULT_HARMS)]
    training = [(step, values) for step, values in rows if step > 0]
    monitor, opened = Monitor(), []
    for step, values in training:
        named = {**values, **({"step/loss": values[LOSS]} if LOSS in values else {})}
        opened += [
            alarm
            for alarm in monitor.observe(step, named).alarms
            if alarm.change == "opened" and alarm.severity != "note"
        ]
    first = {name: threshold(training) for name, threshold in FIXED.items()}
    first["rules"] = opened[0].step if opened else None
    harm = min((step for step in harms if step is not None), default=None)
    return Verdict(fault, int(seed), len(training), harm, len(opened), first)


def wilson(hits: int, runs: int) -> str:
    """A share with its 95 % interval."""
    if not runs:
        return "–"
    z, p = 1.96, hits / runs
    centre, half = p + z * z / (2 * runs), z * math.sqrt(p * (1 - p) / runs + z * z / (4 * runs * runs))
    low, high = ((centre + sign * half) / (1 + z * z / runs) for sign in (-1, 1))
    return f"{hits}/{runs} ({low:.2f}–{high:.2f})"


def by_fault(verdicts: Sequence[Verdict]) -> Table:
    table = Table("fault", "runs", "harmed", "warned in time", "lead, steps", "survivors", "flagged")
    for fault in sorted({verdict.fault for verdict in verdicts}):
        of_fault = [verdict for verdict in verdicts if verdict.fault == fault]
        leads = [v.harm - v.first["rules"] for v in of_fault if v.harm is not None and v.first["rules"] is not None]
        timely = [lead for lead in leads if lead >= 0]
        harmed = sum(v.harm is not None for v in of_fault)
        flagged = sum(v.harm is None and v.first["rules"] is not None for v in of_fault)
        lead = f"{median(timely):.0f}" if timely else ""
        counts = (len(of_fault), harmed, len(timely) if harmed else "")
        table.add_row(fault, *map(str, counts), lead, str(len(of_fault) - harmed), str(flagged))
    return table


def by_watch(verdicts: Sequence[Verdict]) -> Table:
    table = Table("watch", "harms warned of in time", "median lead", "controls flagged", "stressed survivors flagged")
    harmed = [v for v in verdicts if v.harm is not None and not v.control]
    controls = [v for v in verdicts if v.control]
    survivors = [v for v in verdicts if v.harm is None and not v.control]
    for name in ("rules", *FIXED):
        leads = [v.harm - first for v in harmed if v.harm is not None and (first := v.first[name]) is not None]
        timely = [lead for lead in leads if lead >= 0]
        flagged = [sum(v.first[name] is not None for v in group) for group in (controls, survivors)]
        table.add_row(
            name,
            wilson(len(timely), len(harmed)),
            f"{median(timely):.0f}" if timely else "",
            wilson(flagged[0], len(controls)),
            wilson(flagged[1], len(survivors)),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds the run folders")
    parser.add_argument("--seeds", type=int, nargs="*", help="default: all that are there")
    parser.add_argument("--json", type=Path, help="file for the verdicts")
    arguments = parser.parse_args()
    folders = [path.parent for path in sorted(arguments.folder.glob("*-[0-9]*/metrics.jsonl"))]
    verdicts = [
        judge(folder)
        for folder in folders
        if arguments.seeds is None or int(folder.name.rpartition("-")[2]) in arguments.seeds
    ]
    console = Console(width=120)
    console.print(by_fault(verdicts))
    console.print(by_watch(verdicts))
    controls = [verdict for verdict in verdicts if verdict.control]
    steps = sum(verdict.steps for verdict in controls)
    if steps:
        alarms = sum(verdict.alarms for verdict in controls)
        console.print(f"alarms per 1000 steps of the controls: {1000 * alarms / steps:.2f} ({alarms} in {steps})")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1) + "\n")


if __name__ == "__main__":
    main()
