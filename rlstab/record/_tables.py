"""Readers of logs in text: the trainer state of transformers and TRL, CSV, JSON lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rlstab.errors import RecordError
from rlstab.record._names import STEP_NAMES, TIME_NAMES, Row, as_step, flat, metrics_of, number
from rlstab.record._rows import Metrics

_LONGEST_FIELD = 2**27


def read_trainer_state(path: Path) -> Metrics:
    """Return the log of a `trainer_state.json`."""
    try:
        state = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecordError(
            f"{path} is not JSON ({_short(error)}): it may be cut off; use that of an earlier checkpoint"
        ) from error
    match state:
        case {"log_history": list(entries)}:
            rows = [_row(entry, ("step",), None) for entry in entries if isinstance(entry, dict)]
            return metrics_of([row for row in rows if row], torn=len(entries) - sum(row is not None for row in rows))
    raise RecordError(f"{path} has no list 'log_history': expected the trainer_state.json of a transformers trainer")


def read_csv(path: Path, columns: Mapping[str, str]) -> Metrics:
    """Return a table with one column a metric; `columns` maps our keys to its column names."""
    csv.field_size_limit(_LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey="")
            names = [name for name in reader.fieldnames or () if name]
            _check_columns(path, columns, names)
            return _table((dict(row) for row in reader), columns)
    except csv.Error as error:
        raise RecordError(f"{path} is not CSV: {error}") from error
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is not text in UTF-8 (byte {error.start})") from error


def read_json_lines(path: Path, columns: Mapping[str, str]) -> Metrics:
    """Return a file of one JSON object a line; lines that cannot be read are counted."""
    rows = list(_json_rows(path))
    found = [row for row in rows if row is not None]
    if rows and not found:
        raise RecordError(f"{path}: none of {len(rows)} lines is a JSON object")
    _check_columns(path, columns, list(dict.fromkeys(name for row in found for name in row)))
    table = _table(iter(found), columns)
    return Metrics(table.rows, table.torn + len(rows) - len(found))


def _json_rows(path: Path) -> Iterator[dict[str, object] | None]:
    for line in path.read_bytes().split(b"\n"):
        if line.strip():
            try:
                row = json.loads(line)
                yield flat(row) if isinstance(row, dict) else None
            except (ValueError, RecursionError):
                yield None


def _check_columns(path: Path, columns: Mapping[str, str], names: Sequence[str]) -> None:
    for key, column in columns.items():
        if column not in names:
            held = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise RecordError(f"{path} has no column {column!r} (asked for as {key}); it has: {held or 'none'}")


def _table(rows: Iterator[dict[str, object]], columns: Mapping[str, str]) -> Metrics:
    """Return rows as metrics; a table without a column of steps counts its rows from 1."""
    steps = (columns["step"],) if "step" in columns else STEP_NAMES
    renamed = {column: key for key, column in columns.items() if key != "step"}
    found: list[Row] = []
    torn = 0
    for place, row in enumerate(rows, start=1):
        counted = None if any(name in row for name in steps) else place
        read = _row({renamed.get(name, name): value for name, value in row.items()}, steps, counted)
        if read is None:
            torn += 1
        else:
            found.append(read)
    return metrics_of(found, torn=torn)


def _row(entry: Mapping[str, object], steps: Sequence[str], counted: int | None) -> Row | None:
    """Return the numbers of one entry at its step, None where it has none."""
    step = next((as_step(entry[name]) for name in steps if name in entry), counted)
    if step is None:
        return None
    time = next((number(entry[name]) or 0.0 for name in TIME_NAMES if name in entry), 0.0)
    reserved = {*steps, *TIME_NAMES}
    values = {key: value for key, raw in entry.items() if key not in reserved and (value := number(raw)) is not None}
    return Row(step, time, values)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:100]
