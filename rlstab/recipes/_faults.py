"""Why a recipe is refused: finds the innermost value that does not fit, and says what would.

jsonargparse decides what fits; this only searches. A value is refused if parsing it as its type, or building it,
fails; the fault lies in a name that does not exist, or in the deepest value that is refused while all inside it fit.
"""

import inspect
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from rlstab.losses import Objective, Part, presets
from rlstab.recipes._tree import CLASS_KEYS, hint

_PLAIN = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    types.NoneType: "null",
    dict: "a mapping",
    Mapping: "a mapping",
    list: "a list",
    tuple: "a list",
    Sequence: "a list",
}


def find_fault(path: str, value: Any, kind: Any, *, build: bool = True) -> str | None:
    """A message on the innermost fault of `value`, or None if it fits `kind`.

    Args:
        path: dotted key at which the value stands.
        value: plain data.
        kind: the type that it should become.
        build: whether the value must also build, or only parse.
    """
    if _refusal(value, kind, build=build) is None:
        return None
    for option in _options(kind):
        match value:
            case dict() if _is_built(option):
                return _class_fault(path, value, option)
            case str() if _is_named(option) and not {str, float} & set(_options(kind)):
                return _class_fault(path, {"class_path": value}, option)
            case dict() if _item_kind(option, dict, Mapping):
                return _mapping_fault(path, value, _item_kind(option, dict, Mapping))
            case list() if _item_kind(option, list, tuple, Sequence):
                item_kind = _item_kind(option, list, tuple, Sequence)
                fault = _first_fault((f"{path}.{index}", item, item_kind) for index, item in enumerate(value))
                return fault or _misfit(path, value, kind)
        if isinstance(value, str) and get_origin(option) is Callable:
            return f"{path}: expected the import path of a function, as module.function; {value!r} cannot be imported"
    return _misfit(path, value, kind)


def _first_fault(children: Iterable[tuple[str, Any, Any]]) -> str | None:
    return next((fault for child in children if (fault := find_fault(*child))), None)


def _misfit(path: str, value: Any, kind: Any) -> str:
    return f"{path}: expected {expected(kind)}, got {value!r}"


def _refusal(value: Any, kind: Any, *, build: bool = True) -> ArgumentError | ValueError | None:
    """Why jsonargparse does not take a value as `kind`, or why the class does not."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        parsed = parser.parse_object({"value": deepcopy(value)})  # parsing changes what it reads
        if build:
            parser.instantiate(parsed)
    except (ArgumentError, ValueError) as error:
        return error
    return None


def _mapping_fault(path: str, items: Mapping[str, Any], kind: Any) -> str:
    for key, item in items.items():
        if fault := find_fault(f"{path}.{key}", item, kind):
            others = [other for other in items if other != key]
            near = get_close_matches(key, others, n=1) if isinstance(item, dict) and "class_path" not in item else []
            return f"{fault}; did you mean {path}.{near[0]}?" if near else fault
    return _misfit(path, items, Mapping[str, kind])


def _class_fault(path: str, spec: Mapping[str, Any], base: Any) -> str:
    """The fault of what should become an instance of `base`: its name, its arguments, or what they say together."""
    if "class_path" in spec:
        surplus = [key for key in spec if key not in CLASS_KEYS]
        if surplus:
            return f"{path}: {surplus[0]!r} stands beside class_path: move it under init_args"
        target = _named(spec["class_path"], base)
        arguments = spec.get("init_args") or {}
    else:
        target, arguments = base, spec
    if isinstance(target, str):
        return f"{path}: {target}"
    if inspect.isabstract(target):
        return f"{path}: expected class_path, {expected(base)}; got {spec!r}"
    if fault := _argument_fault(path, target, arguments):
        return fault
    refusal = " ".join(str(_refusal(spec, base)).split())
    return refusal if refusal.startswith(path) else f"{path}: {refusal}"


def _argument_fault(path: str, target: Callable[..., Any], arguments: Mapping[str, Any]) -> str | None:
    kinds = argument_kinds(target)
    for key, value in arguments.items():
        if key not in kinds:
            return f"{path}.{key}: {target.__name__} has no argument {key!r} (value {value!r}); {hint(key, kinds)}"
    for name, parameter in inspect.signature(target).parameters.items():
        if name in kinds and name not in arguments and parameter.default is parameter.empty:
            return f"{path}.{name}: {target.__name__} needs it, expected {expected(kinds[name])}"
    return _first_fault((f"{path}.{key}", item, kinds[key]) for key, item in arguments.items())


def _named(name: Any, base: Any) -> Any:
    """The class or function that a class path names, or the message that there is none."""
    known = known_targets(base)
    if not isinstance(name, str):
        return f"expected the name of a class as class_path, got {name!r}"
    if "." not in name:
        where = "rlstab methods" if issubclass(base, Objective | Part) else None
        return known.get(name) or f"no {base.__name__} is called {name!r}; {hint(name, known, listed_by=where)}"
    module_name, _, attribute = name.rpartition(".")
    try:
        members = vars(import_module(module_name))
    except ImportError as error:
        return f"class_path {name!r} cannot be imported: {error}"
    if attribute not in members:
        return f"module {module_name} has no {attribute!r}; {hint(attribute, members.get('__all__', known))}"
    target = members[attribute]
    if isinstance(target, type) and not issubclass(target, base):
        return f"{name} is no {base.__name__}; {hint(attribute, known)}"
    return target


@cache
def argument_kinds(target: Callable[..., Any]) -> Mapping[str, Any]:
    """The arguments of a class or function, by name, with their types."""
    hints = get_type_hints(target.__init__ if isinstance(target, type) else target)  # type: ignore[misc]
    parameters = inspect.signature(target).parameters.values()
    return {p.name: hints.get(p.name, Any) for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def known_targets(base: type) -> dict[str, Callable[..., Any]]:
    """The classes that can stand for `base`, and presets for an objective, by the name that a recipe uses."""
    found: dict[str, Callable[..., Any]] = {}
    if base is Objective:
        found |= {name: vars(presets)[name] for name in presets.__all__}
    if _is_public(base) and not inspect.isabstract(base):
        found[base.__name__] = base
    children: list[type] = base.__subclasses__()
    for child in children:
        found |= known_targets(child)
    return dict(sorted(found.items()))


def _is_public(cls: type) -> bool:
    """Whether a class is for recipes to name: one of a room's `__all__`, or one of the user's own."""
    room, _, private = cls.__module__.partition("._")
    return cls.__name__ in vars(sys.modules[room])["__all__"] if private else not cls.__name__.startswith("_")


def expected(kind: Any) -> str:
    """A type in words.

    >>> expected(float | None)
    'a number or null'
    """
    words = []
    for option in _options(kind):
        if get_origin(option) is Literal:
            words.append("one of " + ", ".join(map(repr, get_args(option))))
        elif _is_named(option):
            words.append("one of " + ", ".join(known_targets(option)))
        elif _is_built(option):
            words.append("a mapping of " + ", ".join(argument_kinds(option)))
        else:
            words.append(_PLAIN.get(get_origin(option) or option, str(option)))
    return " or ".join(words)


def _options(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Annotated:
        return _options(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return tuple(option for member in get_args(kind) for option in _options(member))
    return (kind,)


def _item_kind(option: Any, *containers: type) -> Any:
    """The type of the values in a container type, or None for another type."""
    arguments = [argument for argument in get_args(option) if argument is not Ellipsis]
    return arguments[-1] if arguments and get_origin(option) in containers else None


def _is_named(option: Any) -> bool:
    """Whether a type is one whose subclasses a recipe names."""
    return inspect.isabstract(option) or option is Objective


def _is_built(option: Any) -> bool:
    """Whether a type is one that a recipe builds by naming a class or its arguments."""
    return isinstance(option, type) and (inspect.isabstract(option) or is_dataclass(option))
