"""Before and after training, as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlstab.record import Run, RunFolder
from rlstab.report._explain import one_line
from rlstab.schema import signal

Judgement = Literal["better", "worse", "not clear", ""]

_NAMES = {"eval/reward": "reward", "eval/kl": "KL to the start", "eval/entropy": "entropy", "eval/length": "length"}
_FROM_TRAINING = {
    "eval/reward": ("train/reward",),
    "eval/kl": ("drift/initial/kl",),
    "eval/entropy": ("policy/entropy", "train/entropy"),
    "eval/length": ("completions/mean_length",),
}


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """One line of the table "before → after".

    Args:
        key: Metric key, explained by `rlstab.schema`.
        name: What to call it.
        measured: "held-out" for values of an evaluation, "training" where only the training's own numbers exist.
        before: Value before training, None where it is missing.
        after: Value after training, None where it is missing.
        before_se: Standard error of `before`, None where it is unknown.
        after_se: Standard error of `after`, None where it is unknown.

    Example:
        >>> row = SummaryRow(key="eval/pass@1", name="pass@1", measured="held-out", before=0.25, after=0.75)
        >>> row.change, row.unit
        (0.5, 'fraction')
    """

    key: str
    name: str
    measured: Literal["held-out", "training"]
    before: float | None
    after: float | None
    before_se: float | None = None
    after_se: float | None = None

    @property
    def unit(self) -> str:
        """Unit of the values."""
        return signal(self.key).unit

    @property
    def change(self) -> float | None:
        """After minus before, None where one is missing."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def change_se(self) -> float | None:
        """Standard error of the change, None where that of one side is unknown."""
        return None if self.before_se is None or self.after_se is None else math.hypot(self.before_se, self.after_se)

    @property
    def judgement(self) -> Judgement:
        """Whether the change is good, by the direction of the metric; "not clear" within two standard errors.

        Empty where a value is missing or neither direction is good. A drift from the start is what a gain costs, and is
        not judged either.
        """
        direction = signal(self.key).direction
        if self.change is None or direction == "none" or _is_drift(self.key):
            return ""
        if not math.isfinite(self.change) or abs(self.change) <= 2 * (self.change_se or 0.0):
            return "not clear"
        return "better" if (self.change > 0) == (direction == "higher") else "worse"


def summary(folder: RunFolder) -> list[SummaryRow]:
    """Return what training changed: pass@k, reward, KL to the start, entropy, length.

    Values come from the events of kind `evaluation`. Where these lack reward, KL, entropy or length, the training's own
    numbers stand in: means over the first and the last tenth of what was logged. Rows without any value are left out.

    Args:
        folder: The run.

    Returns:
        One row a metric, in the order of the table.

    Raises:
        RecordError: A file of the folder cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = RunFolder.create(f"{place}/run", config_text="seed: 0")
        ...     folder.append_event("evaluation", step=0, phase="before", values={"eval/pass@1": 0.25})
        ...     folder.append_event("evaluation", step=9, phase="after", values={"eval/pass@1": 0.75})
        ...     [(row.name, row.before, row.after, row.judgement) for row in summary(folder)]
        [('pass@1', 0.25, 0.75, 'better')]
    """
    return summarise(Run.of(folder))


def print_summary(run: Run | RunFolder, console: Console) -> None:
    """Print the table "before → after"; nothing where the run recorded neither evaluations nor reward.

    Args:
        run: As it was read, or its folder.
        console: Where to print.

    Raises:
        RecordError: A file of the folder cannot be read.

    Example:
        >>> import sys, tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = RunFolder.create(f"{place}/run", config_text="seed: 0")
        ...     folder.append_event("evaluation", step=9, phase="after", values={"eval/pass@1": 0.75})
        ...     print_summary(folder, Console(file=sys.stdout, width=60))
        run: before → after
        <BLANKLINE>
                 before    after   change
         ─────────────────────────────────
         pass@1       –   75.0 %        –
        <BLANKLINE>
    """
    run = Run.of(run) if isinstance(run, RunFolder) else run
    styles = {"better": "bold green", "worse": "bold red", "not clear": "yellow", "": ""}
    table = Table(
        title=Text(one_line(f"{run.name}: before → after")), title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summarise(run):
        values = amount(row.before, row.before_se, row.unit), amount(row.after, row.after_se, row.unit)
        table.add_row(Text(one_line(title(row))), *map(Text, values), Text(change(row), style=styles[row.judgement]))
    if table.row_count:
        console.print(table)


def summarise(run: Run) -> list[SummaryRow]:
    """Return the rows of `summary` for a run that has been read."""
    before, after = run.evaluation("before"), run.evaluation("after")
    passes = {key for key in (*before, *after) if key.startswith("eval/pass@") and not key.endswith("_se")}
    rows: list[SummaryRow] = []
    for key in (*sorted(passes, key=lambda key: int(key.removeprefix("eval/pass@"))), *_NAMES):
        if key in before or key in after:
            start = 0.0 if _is_drift(key) else None
            row = SummaryRow(
                key=key,
                name=_NAMES.get(key, key.removeprefix("eval/")),
                measured="held-out",
                before=before.get(key, start),
                after=after.get(key),
                before_se=before.get(f"{key}_se", start),
                after_se=after.get(f"{key}_se"),
            )
            rows.append(row)
        elif stand_in := run.first_of(*_FROM_TRAINING.get(key, ())):
            rows.append(_from_training(run, stand_in, _NAMES[key]))
    return rows


def _from_training(run: Run, key: str, name: str) -> SummaryRow:
    values = run.metrics.series(key).values
    tenth = max(1, len(values) // 10)
    if _is_drift(key):
        errors = run.metrics.series(f"{key}_se").values
        error = float(errors[-1]) if len(errors) == len(values) else None
        return SummaryRow(
            key=key, name=name, measured="training", before=0.0, after=float(values[-1]), before_se=0.0, after_se=error
        )
    before, after = (float(np.mean(part)) for part in (values[:tenth], values[-tenth:]))
    return SummaryRow(key=key, name=name, measured="training", before=before, after=after)


def _is_drift(key: str) -> bool:
    """Return whether a metric is a distance from the start, and so 0 before training."""
    return key in ("eval/kl", "drift/initial/kl")


def title(row: SummaryRow) -> str:
    """Return what a row shows, with its unit where the numbers do not carry it."""
    unit = "" if row.unit in ("fraction", row.name) else f", {row.unit}"
    return f"{row.name}{unit}" + (" (in training)" if row.measured == "training" else "")


def amount(value: float | None, error: float | None, unit: str) -> str:
    """Return a value with its standard error, in per cent for shares.

    >>> amount(0.453, 0.021, "fraction")
    '45.3 ± 2.1 %'
    >>> amount(None, None, "nats/token")
    '–'
    """
    if value is None:
        return "–"
    scale, form = (100, ".1f") if unit == "fraction" else (1, ".3g")
    shown = f"{scale * value:{form}}"
    if error:
        shown += f" ± {scale * error:{'.1f' if unit == 'fraction' else '.2g'}}"
    return f"{shown} %" if unit == "fraction" else shown


def change(row: SummaryRow) -> str:
    """Return the change of a row with its standard error; shares change by points."""
    if row.change is None:
        return "–"
    scale, form = (100, "+.1f") if row.unit == "fraction" else (1, "+.3g")
    error = f" ± {scale * row.change_se:{'.1f' if row.unit == 'fraction' else '.2g'}}" if row.change_se else ""
    return f"{scale * row.change:{form}}{error}" + (" points" if row.unit == "fraction" else "")
