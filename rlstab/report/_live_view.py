"""What the live view shows of a run: words and numbers only, so that any terminal can draw it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlstab.record import Run, RunFolder, diagnosis_of
from rlstab.report._explain import SHORT, one_line
from rlstab.schema import signal

SIGNALS = (
    (("train/reward",), "reward"),
    (("eval/pass@1", "eval/reward"), "held-out"),
    (("drift/initial/kl", "train/kl"), "drift (KL)"),
    (("mismatch/k3", "sampling/sampling_logp_difference/mean"), "mismatch k3"),
    (("policy/entropy", "train/entropy"), "entropy"),
    (("train/grad_norm",), "grad norm"),
    (("completions/mean_length",), "length"),
    (("train/frac_reward_zero_std",), "no signal"),
)
BARS = "▁▂▃▄▅▆▇█"
LARGEST = 1e200
QUIET = 60
"""Seconds without a new record after which a run that has not finished is called quiet."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One signal: its name, last value and course."""

    name: str
    value: str
    bars: str
    unit: str


@dataclass(frozen=True, kw_only=True)
class View:
    """Everything that is on the screen."""

    title: str
    state: str
    cause: str
    rows: tuple[Row, ...]
    events: tuple[str, ...]
    samples: tuple[str, ...]


def view(run: Run, *, now: float, width: int = 24) -> View:
    """Return what to show of a run at a moment.

    Args:
        run: The run as it is.
        now: The time, in seconds since the epoch.
        width: Characters of each course.
    """
    diagnosis = diagnosis_of(run)
    first = diagnosis.claims[0] if diagnosis.claims else None
    evidence = (
        f"{first.title}: {first.evidence[0]} ({first.words})" if first else SHORT[diagnosis.state].partition(": ")[2]
    )
    rows = [_row(run, key, name, width) for keys, name in SIGNALS if (key := run.first_of(*keys)) is not None]
    return View(
        title=one_line(f"{run.name} · step {run.last_step if run.last_step is not None else '–'} · {_going(run, now)}"),
        state=diagnosis.state,
        cause=one_line(evidence),
        rows=tuple(rows),
        events=tuple(_event(run, index) for index in range(len(run.events.rows)))[-40:],
        samples=_samples(run),
    )


def _row(run: Run, key: str, name: str, width: int) -> Row:
    values = run.metrics.series(key).values
    unit = signal(key).unit
    shown = "" if unit in ("1", "reward") or len(unit) > 11 else unit
    return Row(name=name, value=f"{values[-1]:.4g}", bars=bars(values, width), unit=shown)


def bars(values: NDArray[np.float64], width: int) -> str:
    """Return the course of a signal in `width` characters or fewer; `×` where there is no finite number.

    >>> bars(np.array([0.0, 1.0, 2.0, np.nan]), 8)
    '▁▅█×'
    """
    if not len(values):
        return ""
    drawn = np.where(np.isinf(values), np.nan, np.clip(values, -LARGEST, LARGEST))
    stretches = np.array_split(drawn, min(width, len(values)))
    means = [float(part[np.isfinite(part)].mean()) if np.isfinite(part).any() else math.nan for part in stretches]
    finite = [mean for mean in means if mean == mean]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    span = (high - low) or 1.0
    return "".join("×" if mean != mean else BARS[round((mean - low) / span * (len(BARS) - 1))] for mean in means)


def _going(run: Run, now: float) -> str:
    ended = [event.kind for event in run.events.rows if event.kind in ("finished", "interrupted", "stopped")]
    if ended:
        return ended[-1]
    if not run.times:
        return "waiting for the first step" if not run.metrics.rows else "ended"
    quiet = now - run.times[-1]
    return "running" if quiet < QUIET else f"quiet for {quiet / 60:.0f} min"


def _event(run: Run, index: int) -> str:
    event = run.events.rows[index]
    step = "" if event.step is None else f"{event.step:>6} "
    message = event.fields.get("message")
    if isinstance(message, str):
        return f"{step}{one_line(message)}"
    said = ", ".join(f"{name}: {_short(value)}" for name, value in event.fields.items() if name != "values")
    return one_line(f"{step}{event.kind} {said}")


def _samples(run: Run) -> tuple[str, ...]:
    found = []
    for rollout in run.rollouts.rows[-3:]:
        prompt, completion = (_short(rollout.fields.get(name, "")) for name in ("prompt", "completion"))
        reward = rollout.fields.get("reward", rollout.fields.get("rewards", ""))
        found.append(one_line(f"{rollout.step:>6} {prompt} → {completion}  {_short(reward)}"))
    return tuple(found)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"


class Source:
    """A run folder that is read again when it has grown, and not more often than it takes time to read."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._seen: tuple[int, ...] = ()
        self._rest_until = 0.0

    def latest(self, *, force: bool = False) -> Run | None:
        """Return the run if it has changed since the last call, None if not or if it was read only just now."""
        sizes = self._sizes()
        if not force and (sizes == self._seen or time.monotonic() < self._rest_until):
            return None
        start = time.monotonic()
        run = Run.of(self._folder)
        self._seen, self._rest_until = sizes, start + 10 * (time.monotonic() - start)
        return run

    def _sizes(self) -> tuple[int, ...]:
        files: Sequence[Path] = [self._folder.path / name for name in ("metrics.jsonl", "events.jsonl", "rollouts")]
        return tuple(file.stat().st_mtime_ns if file.exists() else 0 for file in files)
