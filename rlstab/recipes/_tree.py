"""A recipe as plain data: read from YAML, changed by dotted overrides, before any class is looked up."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from rlstab.errors import RecipeError

Tree = dict[str, Any]

CLASS_KEYS = ("class_path", "init_args")
SHIPPED = "configs"
MOST_LISTED, SHOWN_OF_MORE = 60, 3


def hint(name: object, known: Iterable[str], *, listed_by: str | None = None) -> str:
    """The nearest match of a name, and what exists, as the end of a message: of a long list the three nearest.

    Args:
        name: what was given.
        known: what exists.
        listed_by: the command that lists all that exists.

    >>> hint("coeff", ["coef", "mean"])
    "did you mean 'coef'? There are: coef, mean"
    """
    name, known = str(name), list(known)
    if not known:
        return "there are none"
    nearest = get_close_matches(name, known, n=1) or [other for other in known if other.casefold() == name.casefold()]
    start = f"did you mean {nearest[0]!r}? " if nearest else ""
    if len(known) <= MOST_LISTED:
        return f"{start}There are: {', '.join(known)}"
    shown = get_close_matches(name, known, n=SHOWN_OF_MORE, cutoff=0.0)
    where = f"; `{listed_by}` lists them" if listed_by else ""
    return f"{start}Nearest of {len(known)}: {', '.join(shown)}{where}"


def load_tree(path: Path) -> Tree:
    """The content of a recipe file.

    Raises:
        RecipeError: there is no such file, it is not YAML, a key stands twice, or it holds no mapping.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"recipe {path}: no such file; {_other_recipes(path)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: cannot be read ({error})") from error
    try:
        _refuse_repeated_keys(path, yaml.compose(text, Loader=yaml.SafeLoader))
        tree = get_loader("yaml")(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {path}: expected a mapping of settings, got {tree!r}")
    return tree


def _other_recipes(path: Path) -> str:
    """The recipe nearest to a file that does not exist, and all in its folder and in `configs/`."""
    folders = list(dict.fromkeys((path.parent, Path(SHIPPED))))
    names = {str(file): file.name for folder in folders for file in sorted(folder.glob("*.y*ml"))}
    searched = " and ".join(str(folder.resolve()) for folder in folders)
    if not names:
        return f"there is no recipe (*.yaml) in {searched}"
    nearest = get_close_matches(path.name, names.values(), n=1)
    start = next((f"did you mean {file!r}? " for file, name in names.items() if [name] == nearest), "")
    return f"{start}In {searched} there are: {', '.join(names)}"


def _refuse_repeated_keys(path: Path, node: yaml.Node | None) -> None:
    children: Iterable[yaml.Node] = ()
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise RecipeError(f"recipe {path}, line {line}: the key {key.value!r} stands twice; keep one")
            seen.add(key.value)
        children = [value for _, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    for child in children:
        _refuse_repeated_keys(path, child)


def set_value(tree: Tree, key: str, text: str) -> None:
    """Set the value at a dotted key, in place, as an override of the command line does.

    A key below a class (`{class_path: ..., init_args: ...}`, or its bare name) is an argument of the class; a number
    counts through a list. What does not exist yet is made.

    Args:
        tree: the recipe.
        key: as in `objective.terms.drift.coef`.
        text: the value in YAML.

    Raises:
        RecipeError: the key leads into something that has no keys, or `text` is not YAML.

    >>> tree = {"objective": {"terms": {"drift": "ReverseKL"}}}
    >>> set_value(tree, "objective.terms.drift.coef", "0.1")
    >>> tree["objective"]["terms"]["drift"]
    {'class_path': 'ReverseKL', 'init_args': {'coef': 0.1}}
    """
    try:
        value = get_loader("yaml")(text) if text else None
    except yaml.YAMLError as error:
        raise RecipeError(f"--{key}: the value {text!r} is not YAML: {' '.join(str(error).split())}") from error
    node: Any = tree
    names = key.split(".")
    for depth, name in enumerate(names):
        position: str | int = name
        where = ".".join(names[:depth])
        if isinstance(node, list):
            position = _position(node, name, key=key, where=where)
        elif isinstance(node, dict):
            node = _arguments(node, name)
        else:
            raise RecipeError(f"--{key}: {where} is {node!r} and has no key {name!r}")
        if depth == len(names) - 1:
            node[position] = value
        else:
            node = _opened(node, position)


def _arguments(node: Tree, name: str) -> Tree:
    """Where a key of a mapping belongs: beside the class's name, or among its arguments."""
    if "class_path" not in node or name in CLASS_KEYS:
        return node
    if node.get("init_args") is None:
        node["init_args"] = {}
    arguments: Tree = node["init_args"]
    return arguments


def _opened(node: Any, name: Any) -> Any:
    """What stands at a key, made ready to take keys of its own."""
    if isinstance(node, dict) and node.get(name) is None:
        node[name] = {}
    if isinstance(node[name], str):
        node[name] = {"class_path": node[name], "init_args": {}}
    return node[name]


def _position(node: list[Any], name: str, *, key: str, where: str) -> int:
    if name.isdecimal() and int(name) < len(node):
        return int(name)
    raise RecipeError(f"--{key}: {where} is a list of {len(node)}, expected a position from 0 on, got {name!r}")


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ between two trees, with the old and the new value.

    >>> changed_keys({"seed": 0, "trainer": {"max_steps": 5}}, {"seed": 0, "trainer": {"max_steps": 9}})
    {'trainer.max_steps': (5, 9)}
    """
    before, after = flat(old), flat(new)
    keys = dict.fromkeys([*before, *after])
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by their dotted keys.

    >>> flat({"seed": 0, "trainer": {"max_steps": 5}})
    {'seed': 0, 'trainer.max_steps': 5}
    """
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return values
