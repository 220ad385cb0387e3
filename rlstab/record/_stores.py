"""Readers of the local stores of TensorBoard, wandb and trackio. None of them needs the package that wrote the store.

The fields that carry scalars are read by their numbers in the published message definitions; whatever follows a torn
record is left out, and counted as one torn line.
"""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path

from rlstab.errors import RecordError
from rlstab.record._names import Row, as_step, flat, metrics_of, number
from rlstab.record._rows import Metrics
from rlstab.record._wire import TornError, fields, integer, messages, text

_BLOCK, _HEADER = 32768, 7
_WANDB_MAGIC = b":W&B"
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_tensorboard(paths: Sequence[Path]) -> Metrics:
    """Return the scalars of the event files of one run."""
    rows: list[Row] = []
    torn = 0
    for path in paths:
        data = path.read_bytes()
        try:
            for record in _framed(data):
                rows += _scalars(record)
        except TornError:
            torn += 1
    if not rows and torn:
        raise RecordError(f"{paths[0]} is no TensorBoard event file, or torn before its first scalar")
    return metrics_of(rows, torn=torn)


def _framed(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file in TensorFlow's framing: length, its checksum, record, its checksum."""
    place = 0
    while place < len(data):
        if place + 12 > len(data):
            raise TornError
        (size,) = struct.unpack_from("<Q", data, place)
        end = place + 12 + size
        if end + 4 > len(data):
            raise TornError
        yield data[place + 12 : end]
        place = end + 4


def _scalars(event: bytes) -> Iterator[Row]:
    """Yield the scalars of an `Event`: wall_time 1, step 2, summary 5 of values 1: tag 1, number 2 or tensor 8."""
    moments = messages(event, 1)
    moment = struct.unpack("<d", moments[-1])[0] if moments and len(moments[-1]) == 8 else 0.0
    step = integer(event, 2)
    for summary in messages(event, 5):
        values = {text(value, 1): found for value in messages(summary, 1) if (found := _value(value)) is not None}
        if values and step < 2**53:
            yield Row(step, moment, values)


def _value(value: bytes) -> float | None:
    for field in fields(value):
        match field:
            case (2, bytes() as raw) if len(raw) == 4:
                return float(struct.unpack("<f", raw)[0])
            case (8, bytes() as tensor):
                return _of_tensor(tensor)
    return None


def _of_tensor(tensor: bytes) -> float | None:
    """Return a `TensorProto` of one float or double: content 4, floats 5, doubles 6."""
    sizes = {4: "<f", 8: "<d"}
    raw = next((data for place in (4, 5, 6) for data in messages(tensor, place)), b"")
    return float(struct.unpack(sizes[len(raw)], raw)[0]) if len(raw) in sizes else None


def read_wandb(path: Path) -> tuple[Metrics, str]:
    """Return the history and the configuration of a `run-*.wandb` file."""
    data = path.read_bytes()
    if data[:4] != _WANDB_MAGIC:
        raise RecordError(f"{path} is no wandb run: it does not begin with {_WANDB_MAGIC.decode()}")
    rows: list[Row] = []
    config: dict[str, object] = {}
    torn = 0
    try:
        for record in _leveldb_records(data):
            for history in messages(record, 2):
                rows += _history(history, len(rows))
            for update in messages(record, 5):
                config |= _items(update)
            for run in messages(record, 17):
                config |= {key: value for part in messages(run, 4) for key, value in _items(part).items()}
    except TornError:
        torn = 1
    return metrics_of(rows, torn=torn), json.dumps(config, indent=1, default=str) if config else ""


def _leveldb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a LevelDB log: blocks of 32 KiB with chunks of checksum, length, type and data."""
    place, parts = _HEADER, []
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        if kind == 0 and size == 0:
            place += left
            continue
        end = place + _HEADER + size
        if end > len(data) or kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            raise TornError
        parts.append(data[place + _HEADER : end])
        place = end
        if kind in (_FULL, _LAST):
            yield b"".join(parts)
            parts = []


def _items(message: bytes) -> dict[str, object]:
    """Return the items 1 of a message: key 1 or nested key 2, value as JSON 16."""
    found: dict[str, object] = {}
    for item in messages(message, 1):
        name = text(item, 1) or "/".join(part.decode("utf-8", "replace") for part in messages(item, 2))
        try:
            found[name] = json.loads(text(item, 16), parse_constant=float)
        except (ValueError, RecursionError):
            continue
    return found


def _history(history: bytes, counted: int) -> Iterator[Row]:
    """Yield the row of a `HistoryRecord`: its items, and its step as field 2 or among them."""
    found = flat(_items(history))
    own = [integer(step, 1) for step in messages(history, 2)]
    named = (found.get("train/global_step"), found.get("_step"), *own, counted)
    step = next((at for value in named if (at := as_step(value)) is not None), counted)
    moment = number(found.get("_timestamp")) or 0.0
    values = {key: n for key, value in found.items() if key[:1] != "_" and (n := number(value)) is not None}
    values.pop("train/global_step", None)
    yield Row(step, moment, values)


def read_trackio(path: Path, name: str | None) -> tuple[Metrics, Sequence[str], str]:
    """Return the metrics of one run of a trackio project, the names of all its runs, and the configuration."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as store:
            names = [
                str(row[0]) for row in store.execute("SELECT run_name FROM metrics GROUP BY run_name ORDER BY MIN(id)")
            ]
            chosen = names[0] if name is None and len(names) == 1 else name
            if chosen is None or chosen not in names:
                return Metrics((), 0), names, ""
            query = "SELECT step, timestamp, metrics FROM metrics WHERE run_name = ? ORDER BY id"
            read = [_trackio_row(*row) for row in store.execute(query, (chosen,))]
            rows = [row for row in read if row is not None]
            config = _trackio_config(store, chosen)
    except sqlite3.Error as error:
        raise RecordError(f"{path} is no trackio store: {error}") from error
    return metrics_of(rows, torn=len(read) - len(rows)), [chosen], config


def _trackio_row(step: object, moment: object, metrics: object) -> Row | None:
    try:
        data = json.loads(metrics if isinstance(metrics, str | bytes) else "")
        time = datetime.fromisoformat(str(moment)).timestamp()
    except (ValueError, RecursionError):
        return None
    at = as_step(step)
    if at is None or not isinstance(data, dict):
        return None
    values = {key: n for key, value in flat(data).items() if key[:1] != "_" and (n := number(value)) is not None}
    inner = values.pop("train/global_step", None)
    return Row(at if inner is None else int(inner), time, values)


def _trackio_config(store: sqlite3.Connection, name: str) -> str:
    if not store.execute("SELECT 1 FROM sqlite_master WHERE name = 'configs'").fetchone():
        return ""
    row = store.execute("SELECT config FROM configs WHERE run_name = ?", (name,)).fetchone()
    return _decoded(row[0]) if row else ""


def _decoded(text: object) -> str:
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
