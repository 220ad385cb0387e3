import copy
import inspect
import pickle

import pytest

import rlstab.errors
from rlstab.errors import (
    CompositionError,
    ConfigError,
    HostError,
    MissingFieldError,
    RecipeError,
    RecordError,
    RewardError,
    RlstabError,
    SchemaError,
    ShapeError,
)

TREE = {
    ConfigError: (RlstabError, ValueError),
    CompositionError: (ConfigError, ValueError),
    RecipeError: (ConfigError, ValueError),
    ShapeError: (RlstabError, ValueError),
    MissingFieldError: (RlstabError, KeyError),
    SchemaError: (RlstabError, KeyError),
    RewardError: (RlstabError, ValueError),
    RecordError: (RlstabError, OSError),
    HostError: (RlstabError, ImportError),
}


@pytest.mark.parametrize(("error", "bases"), TREE.items())
def test_every_error_is_also_the_standard_one(error: type[Exception], bases: tuple[type[Exception], ...]) -> None:
    for base in bases:
        with pytest.raises(base):
            raise error("what was expected")


def test_the_tree_is_complete_documented_and_public() -> None:
    defined = {
        value
        for name, value in vars(rlstab.errors).items()
        if inspect.isclass(value) and value.__module__ == "rlstab.errors" and not name.startswith("_")
    }
    assert defined == {RlstabError, *TREE}
    assert set(rlstab.errors.__all__) == {error.__name__ for error in defined}
    drawing = rlstab.errors.__doc__ or ""
    for error in TREE:
        assert f"─ {error.__name__} " in drawing
        assert error.__doc__


@pytest.mark.parametrize("error", TREE)
def test_messages_read_as_written(error: type[Exception]) -> None:
    message = "trainer.beta: expected 0, got 'a': drop it"
    for raised in (error(message), copy.copy(error(message)), pickle.loads(pickle.dumps(error(message)))):
        assert str(raised) == message  # a plain KeyError would print its repr
        assert type(raised) is error
