"""What a published method is made of, what it is for and what proves it: read from its docstring and its objective."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rlstab.losses._controllers import Controller
from rlstab.losses._objective import Objective
from rlstab.losses._parts import Part


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of a paper, as its docstring tells it.

    Args:
        name: the name of its preset or class.
        says: the first line of the docstring.
        stabilises: its paragraph `Stabilises:`.
        differs: `Differs:`, where the authors' code and their paper, or this and the paper, part; may be empty.
        proof: `Proof:`, worked examples (vectors) and tests.
        reference: `Reference:`, title and address of the paper.
        parts: what its objective is composed of, by class, each once.

    >>> from rlstab.losses import presets
    >>> method_of(presets.kl_cov).parts
    ('ImportanceSurrogate', 'KLCov', 'GroupNorm')
    """

    name: str
    says: str
    stabilises: str
    differs: str
    proof: str
    reference: str
    parts: tuple[str, ...]


def method_of(thing: Callable[..., object]) -> Method:
    """What there is to say of a preset, or of a class that is a method by itself.

    Args:
        thing: a preset, whose objective is made to tell the parts if it needs no arguments, or a class.

    >>> from rlstab.losses import presets
    >>> method_of(presets.dapo).stabilises
    'entropy collapse under a symmetric clip'
    """
    doc = inspect.getdoc(thing) or ""
    signature = inspect.signature(thing)
    needs_nothing = all(one.default is not one.empty for one in signature.parameters.values())
    made = thing() if signature.return_annotation is Objective and needs_nothing else None
    parts = tuple(dict.fromkeys(_parts(made))) if isinstance(made, Objective) else ()
    told = {key.lower(): _paragraph(doc, key) for key in ("Stabilises", "Differs", "Proof", "Reference")}
    return Method(name=thing.__name__, says=doc.partition("\n")[0].rstrip("."), parts=parts, **told)


def _paragraph(doc: str, key: str) -> str:
    """The paragraph that begins with `key:`, on one line and without its full stop."""
    found = re.search(rf"^{key}:\s+(.*?)(?:\n\s*\n|\n>>>|\Z)", doc, re.DOTALL | re.MULTILINE)
    return " ".join(found[1].split()).rstrip(".") if found else ""


def _parts(objective: Objective) -> Iterator[str]:
    for term in objective.terms.values():
        yield from _names(term)
    if objective.advantage is not None:
        yield from _names(objective.advantage)


def _names(part: Part) -> Iterator[str]:
    """The class of a part, and those of the parts that were chosen for it."""
    yield type(part).__name__
    for field in dataclasses.fields(part):
        value = vars(part).get(field.name)
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, Controller):
                yield type(item).__name__
            elif isinstance(item, Part) and field.init and item != _default(field):
                yield from _names(item)


def _default(field: "dataclasses.Field[object]") -> object:
    factory = field.default_factory
    return factory() if callable(factory) else field.default
