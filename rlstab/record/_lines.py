"""Files of JSON lines that survive a kill at any byte.

A line is one JSON object in standard JSON. It is handed to the system in one call in append mode, so that a killed
writer leaves at most one torn line. The next line never joins a torn one: it starts on a fresh line.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TypeAlias

from rlstab.errors import ConfigError, RecordError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

_FLOAT = "$float"


def encode(value: object, name: str) -> Json:
    """Return `value` as standard JSON data that `decode` turns back into it.

    Non-finite floats become `{"$float": "nan" | "inf" | "-inf"}`; a key of the user's own that starts with `$` gets a
    second one. Numbers of other libraries become Python's.

    Raises:
        ConfigError: A part of `value` has no JSON form; the message names it after `name`.
    """
    match value:
        case None | bool() | str():
            return value
        case Integral():
            return int(value)
        case Real():
            number = float(value)
            return number if math.isfinite(number) else {_FLOAT: repr(number)}
        case Mapping():
            return encode_mapping(value, name)
        case Sequence() if not isinstance(value, bytes | bytearray):
            return [encode(item, f"{name}[{index}]") for index, item in enumerate(value)]
    raise ConfigError(
        f"{name}={value!r} is a {type(value).__name__}, expected a number, string, bool, None, list or mapping; "
        "convert it first (a tensor: .item() or .tolist())"
    )


def encode_mapping(mapping: Mapping[str, object], name: str) -> dict[str, Json]:
    """Return a mapping as JSON data, as `encode` does."""
    return {_encode_key(key, name): encode(item, f"{name}.{key}") for key, item in mapping.items()}


def _encode_key(key: object, name: str) -> str:
    if not isinstance(key, str):
        raise ConfigError(f"{name} has the key {key!r}, expected a string")
    return f"${key}" if key.startswith("$") else key


def decode(data: dict[str, Json]) -> Json:
    """Undo `encode` for one JSON object; an object hook for `json.loads`."""
    match data:
        case {"$float": str(text)}:
            return float(text)
    return {key.removeprefix("$"): value for key, value in data.items()}


def append_line(path: Path, row: Mapping[str, Json]) -> None:
    """Append one row to a file of lines, on a fresh line where the file ends in a torn one.

    Args:
        path: The file; created if absent.
        row: Data as `encode` returns them.

    Raises:
        RecordError: The line could not be written whole.
    """
    text = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    line = text.encode("utf-8", "backslashreplace") + b"\n"
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(file).st_size
            torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
            rest = memoryview(b"\n" + line if torn else line)
            while rest:
                rest = rest[os.write(file, rest) :]
        finally:
            os.close(file)
    except OSError as error:
        raise RecordError(explain(error, f"cannot write to {path}")) from error


def read_lines(path: Path) -> Iterator[dict[str, object] | None]:
    """Yield the rows of a file of lines, and None for each torn line; nothing for an absent file.

    Raises:
        RecordError: The file exists and cannot be read.
    """
    if path.is_fifo() or path.is_char_device():
        raise RecordError(f"cannot read {path}: it is no file, and reading it might never end")
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise RecordError(explain(error, f"cannot read {path}")) from error
    for line in lines:
        if line:
            yield _parse(line)


def _parse(line: bytes) -> dict[str, object] | None:
    hook = decode if b'"$' in line else None
    try:
        row = json.loads(line.decode("utf-8"), object_hook=hook, parse_constant=_refuse_constant)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not standard JSON")


def explain(error: OSError, what: str) -> str:
    """Return a one-line message for a failed system call: what failed, why, and the remedy where there is one."""
    remedies = {
        errno.ENOSPC: "free some space, then resume the run",
        errno.EDQUOT: "free some of your quota, then resume the run",
        errno.EFBIG: "raise the limit on file size (ulimit -f), then resume the run",
        errno.EACCES: "check the permissions, or choose another folder",
        errno.EROFS: "choose a folder on a writable file system",
    }
    remedy = remedies.get(error.errno or 0)
    return f"{what}: {error.strerror}" + (f"; {remedy}" if remedy else "")
