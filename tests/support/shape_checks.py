"""The type checker behind `pytest --shapes`."""

from collections.abc import Callable
from typing import Annotated, Any, Self, TypeVar

from beartype import BeartypeConf, FrozenDict, beartype
from beartype.vale import Is

Checked = TypeVar("Checked", bound=Callable[..., Any])

ANYTHING = Annotated[object, Is[lambda _: True]]
CONF = BeartypeConf(hint_overrides=FrozenDict({Self: ANYTHING}))


def check(function: Checked) -> Checked:
    """Check arguments and results; `Self` is anything, since methods are decorated before their class exists."""
    return beartype(conf=CONF)(function)
