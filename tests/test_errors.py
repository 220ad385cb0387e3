import builtins
import copy
import inspect
import pickle
import re

import pytest

import rlstab.errors
from rlstab.errors import ConfigError, RlstabError

ERRORS = [vars(rlstab.errors)[name] for name in rlstab.errors.__all__ if name != "RlstabError"]
# `── Name (StandardError)`; an error below another one of the tree inherits that one's standard error.
DRAWN = dict(re.findall(r"── (\w+)(?: \((\w+)\))?", rlstab.errors.__doc__ or ""))


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_is_also_the_standard_one_that_the_tree_names(error: type[Exception]) -> None:
    parents = [base for base in error.__bases__ if base in ERRORS] or [error]
    standard = DRAWN[error.__name__] or DRAWN[parents[0].__name__]
    assert standard
    for base in (RlstabError, vars(builtins)[standard]):
        with pytest.raises(base):
            raise error("what was expected")


def test_the_tree_is_complete_and_public() -> None:
    defined = {
        name
        for name, value in vars(rlstab.errors).items()
        if inspect.isclass(value) and value.__module__ == "rlstab.errors" and not name.startswith("_")
    }
    assert defined == set(rlstab.errors.__all__) == {"RlstabError", *DRAWN}
    assert all(error.__doc__ and issubclass(error, RlstabError) for error in ERRORS)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize("error", ERRORS)
def test_messages_read_as_written(error: type[Exception]) -> None:
    message = "trainer.beta: expected 0, got 'a': drop it"
    for raised in (error(message), copy.copy(error(message)), pickle.loads(pickle.dumps(error(message)))):
        assert str(raised) == message  # a plain KeyError would print its repr
        assert type(raised) is error
