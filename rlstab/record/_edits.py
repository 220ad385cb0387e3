"""Changes of single settings in the text of a configuration."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from rlstab.errors import ConfigError


def edited(config: str, changes: Mapping[str, object]) -> str:
    r"""Return a configuration with some of its settings changed.

    Args:
        config: One YAML document, a mapping.
        changes: New value by dotted key; mappings that a key passes through and that are absent are made.

    Returns:
        The new document. Comments are lost, the order of keys is kept.

    Raises:
        ConfigError: `config` is no mapping, or a key passes through something that is none.

    Example:
        >>> print(edited("trainer: {learning_rate: 0.01}\nseed: 0", {"trainer.learning_rate": 0.001}))
        trainer:
          learning_rate: 0.001
        seed: 0
        <BLANKLINE>
    """
    try:
        root = yaml.safe_load(config)
    except yaml.YAMLError as error:
        raise ConfigError(f"the configuration is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, dict):
        raise ConfigError(f"the configuration is a {type(root).__name__}, expected a mapping of settings")
    for key, value in changes.items():
        _set(root, key, value)
    return str(yaml.safe_dump(root, sort_keys=False, allow_unicode=True))


def _set(root: dict[str, object], key: str, value: object) -> None:
    place: dict[str, object] = root
    *path, name = key.split(".")
    for part in path:
        inner = place.get(part)
        if inner is None:
            inner = place[part] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {part!r} is {inner!r} in this configuration, expected a mapping")
        place = inner
    place[name] = value
