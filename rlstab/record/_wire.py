"""The wire format of protocol buffers, as far as logs of scalars need it: fields by number, without definitions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SIZES = {_FIXED64: 8, _FIXED32: 4}


class TornError(Exception):
    """A record ends before it should, or is no message at all."""


class Field(NamedTuple):
    """One field of a message: its number, and the integer or the bytes that it holds."""

    number: int
    value: int | bytes


def fields(message: bytes) -> Iterator[Field]:
    """Yield the fields of a message in the order in which they stand.

    >>> [field.value for field in fields(bytes([8, 150, 1, 18, 1, 65]))]
    [150, b'A']
    """
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == _VARINT:
            value, place = _varint(message, place)
            yield Field(tag >> 3, value)
            continue
        if kind == _BYTES:
            size, place = _varint(message, place)
        elif kind in _SIZES:
            size = _SIZES[kind]
        else:
            raise TornError
        if place + size > len(message):
            raise TornError
        yield Field(tag >> 3, message[place : place + size])
        place += size


def messages(message: bytes, number: int) -> list[bytes]:
    """Return every value of a field that holds bytes."""
    return [field.value for field in fields(message) if field.number == number and isinstance(field.value, bytes)]


def text(message: bytes, number: int) -> str:
    """Return the last value of a field that holds text, "" where it is absent."""
    found = messages(message, number)
    return found[-1].decode("utf-8", "replace") if found else ""


def integer(message: bytes, number: int) -> int:
    """Return the last value of a field that holds an integer, 0 where it is absent."""
    found = [field.value for field in fields(message) if field.number == number and isinstance(field.value, int)]
    return found[-1] if found else 0


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            raise TornError
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise TornError
