"""The type checker behind `pytest --shapes`: shapes and dtypes of tensors; all other types are mypy's."""

from collections.abc import Callable
from inspect import isclass
from typing import Any, TypeVar, get_args

from beartype import beartype
from jaxtyping import AbstractArray

Checked = TypeVar("Checked", bound=Callable[..., Any])


def check(function: Checked) -> Checked:
    """Check the arguments and results that are annotated with a shape."""
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if has_shape(hint)}
    return beartype(function)


def has_shape(hint: Any) -> bool:
    """Does a hint hold a shape, if only within a mapping or a union?"""
    return (isclass(hint) and issubclass(hint, AbstractArray)) or any(map(has_shape, get_args(hint)))
