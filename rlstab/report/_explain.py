"""A diagnosis of a run: from what was read to what is said."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from rlstab.errors import ConfigError, RecordError
from rlstab.monitors import Claim, Diagnosis
from rlstab.record import Run, edited

COLOURS = {"healthy": "bold green", "warning": "bold yellow", "collapsed": "bold red"}
SHORT = {
    "healthy": "healthy: no harm, and nothing that threatens any",
    "warning": "warning: no harm so far",
    "collapsed": "collapsed",
}
EVENTS = 12


def as_json(run: Run, diagnosis: Diagnosis) -> str:
    """Return a diagnosis as JSON, for machines.

    Args:
        run: The run.
        diagnosis: What `rlstab.record.diagnosis_of` said of it.

    Returns:
        One JSON object: name, source, state, exit code, harm, claims with evidence and edits, timeline, unexamined.

    Example:
        >>> from rlstab.record import Metrics, MetricsRow, diagnosis_of
        >>> run = Run(name="a", metrics=Metrics(rows=(MetricsRow(1, 0.0, {"train/reward": 0.5}),), torn=0))
        >>> json.loads(as_json(run, diagnosis_of(run)))["state"]
        'healthy'
    """
    claims = [
        {**vars(claim), "words": claim.words, "edits": [e._asdict() for e in claim.edits]} for claim in diagnosis.claims
    ]
    data = {
        "run": run.name,
        "source": run.source,
        "state": diagnosis.state,
        "exit_code": diagnosis.exit_code,
        "harm": [{"since": harm.since, "says": harm.says} for harm in diagnosis.harm],
        "claims": claims,
        "timeline": [{"step": step, "says": says} for step, says in diagnosis.timeline],
        "unexamined": dict(diagnosis.unexamined),
    }
    return json.dumps(data, indent=1, ensure_ascii=False)


def write_fix(run: Run, diagnosis: Diagnosis, path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Write the recipe of a run with the changes that answer its most likely cause.

    The new recipe has no output folder of its own, so that training with it does not touch the old run.

    Args:
        run: The run.
        diagnosis: What `rlstab.record.diagnosis_of` said of it.
        path: The file to write; one that exists is refused.

    Returns:
        The changes, as `key: value`; empty, and nothing is written, where no cause has any.

    Raises:
        ConfigError: The run has no recipe that could be changed.
        RecordError: The file exists, or cannot be written.

    Example:
        >>> from rlstab.record import Metrics, diagnosis_of
        >>> run = Run(name="a", config="seed: 0", metrics=Metrics(rows=(), torn=0))
        >>> write_fix(run, diagnosis_of(run), "fixed.yaml")
        ()
    """
    edits = {edit.key: edit.value for claim in diagnosis.claims[:1] for edit in claim.edits}
    if not edits:
        return ()
    if not run.settings:
        raise ConfigError(
            f"{run.name} ({run.source}) has no recipe to change; its first cause would have changed {edits}"
        )
    text = edited(run.config, {**edits, "output": None})
    try:
        with Path(path).open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise RecordError(f"cannot write {path}: {error.strerror}") from error
    return tuple(f"{key}: {json.dumps(value)}" for key, value in edits.items())


def print_diagnosis(run: Run, diagnosis: Diagnosis, console: Console) -> None:
    """Print a diagnosis: the state, what happened, each cause with its evidence, what is not known.

    Args:
        run: The run.
        diagnosis: What `rlstab.record.diagnosis_of` said of it.
        console: Where to print.

    Example:
        >>> import sys
        >>> from rlstab.record import Metrics, MetricsRow, diagnosis_of
        >>> run = Run(name="a", metrics=Metrics(rows=(MetricsRow(1, 0.0, {"train/reward": 0.5}),), torn=0))
        >>> print_diagnosis(run, diagnosis_of(run), Console(file=sys.stdout, width=80))
        a: healthy: no harm, and nothing that threatens any
        ...
    """
    console.print(_said(f"{run.name}: ") + Text(SHORT[diagnosis.state], style=COLOURS[diagnosis.state]))
    for harm in diagnosis.harm:
        console.print(Padding(_said(f"step {harm.since}: {harm.says}"), (0, 0, 0, 2)))
    for place, claim in enumerate(diagnosis.claims, start=1):
        console.print()
        for line in _claim(place, claim):
            console.print(line)
    if len(diagnosis.timeline) > 1:
        console.print(Text("\nin order", style="bold"))
        for step, says in diagnosis.timeline[:EVENTS]:
            console.print(Padding(_said(f"step {step}: {says}"), (0, 0, 0, 2)))
    for line in _unknown(diagnosis):
        console.print(line)


def _said(text: str) -> Text:
    return Text(one_line(text))


def _claim(place: int, claim: Claim) -> Iterator[Padding | Text]:
    yield Text(f"{place}. {claim.title}", style="bold") + Text(f"  {claim.words} ({claim.sure:.0%})", style="dim")
    for heading, style, lines in (("", "green", claim.evidence), ("against: ", "yellow", claim.against)):
        for line in lines:
            yield Padding(Text("• ", style=style) + _said(f"{heading}{line}"), (0, 0, 0, 3))
    if claim.unread:
        yield Padding(Text(f"? would settle it: {', '.join(claim.unread)}", style="dim"), (0, 0, 0, 3))
    yield Padding(Text(claim.remedy), (0, 0, 0, 3))
    for edit in claim.edits:
        yield Padding(
            Text(one_line(f"{edit.key}: {json.dumps(edit.value)}"), style="cyan") + Text(f"  # {edit.why}"),
            (0, 0, 0, 5),
        )


def _unknown(diagnosis: Diagnosis) -> Iterator[Text]:
    missing: dict[str, list[str]] = {}
    for name, keys in diagnosis.unexamined.items():
        missing.setdefault(", ".join(keys), []).append(name)
    if missing:
        yield Text("\nnot looked at", style="bold")
    for needs, names in missing.items():
        yield Text(f"  {', '.join(names)}: needs {needs}", style="dim")


def one_line(text: str) -> str:
    r"""Return text without line breaks and control characters, which could move the cursor of a terminal.

    >>> one_line("a\x1b[2Jb\nc")
    'a[2Jb c'
    """
    return "".join(char for char in text.replace("\n", " ").replace("\t", " ") if char.isprintable())
