"""Every error that rlstab raises on purpose, in one tree.

```
RlstabError
├── ConfigError (ValueError)         an argument or a combination that cannot be honoured
│   ├── CompositionError             parts that make no sense together
│   └── RecipeError                  a recipe that cannot be read
├── ShapeError (ValueError)          a tensor of another shape than the axis letters promise
├── MissingFieldError (KeyError)     a part reads a field that the batch does not hold
├── SchemaError (KeyError)           a metric key that `rlstab.schema` does not know
├── RewardError (ValueError)         rewards or verifiers that do not give one finite number, or None, per completion
├── EngineError (RuntimeError)       a rollout engine that cannot do what it was asked
│   └── WeightSyncError              weights that an engine cannot take
├── RoutingError (RuntimeError)      a router whose choice can be neither read nor replaced
├── RecordError (OSError)            a run folder that cannot be written or read
└── HostError (ImportError)          an installed TRL that rlstab was not tested with
```
Each also inherits the standard error that a caller would expect, so `except ValueError` keeps working.
"""

__all__ = [
    "CompositionError",
    "ConfigError",
    "EngineError",
    "HostError",
    "MissingFieldError",
    "RecipeError",
    "RecordError",
    "RewardError",
    "RlstabError",
    "RoutingError",
    "SchemaError",
    "ShapeError",
    "WeightSyncError",
]


class RlstabError(Exception):
    """Base of every error raised by rlstab."""


class ConfigError(RlstabError, ValueError):
    """An argument, or a combination of arguments, that cannot be honoured."""


class CompositionError(ConfigError):
    """Parts of an objective that make no sense together."""


class RecipeError(ConfigError):
    """A recipe that cannot be read: names the element, the key, the value and what was expected."""


class ShapeError(RlstabError, ValueError):
    """A tensor whose shape is not the one its axis letters promise."""


class _MessageKeyError(KeyError):
    """A `KeyError` that prints its message instead of its repr."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class MissingFieldError(RlstabError, _MessageKeyError):
    """A part reads a field of the batch that nobody supplied."""


class SchemaError(RlstabError, _MessageKeyError):
    """A metric key that the schema does not know."""


class RecordError(RlstabError, OSError):
    """A run folder that cannot be created, written or read."""


class RewardError(RlstabError, ValueError):
    """A batch that cannot be scored, or a verifier that returned no finite number."""


class EngineError(RlstabError, RuntimeError):
    """A rollout engine that is closed, broken, or asked for something it cannot do."""


class WeightSyncError(EngineError):
    """Weights that do not fit the engine's model, or that are older than those it has."""


class RoutingError(RlstabError, RuntimeError):
    """A router of a mixture of experts whose choice can be neither read nor replaced."""


class HostError(RlstabError, ImportError):
    """The installed TRL lacks a symbol that rlstab relies on, or is outside the tested range."""
