"""Tables that the code itself makes: metrics from the schema, and who owns which argument of the host."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from rlstab.recipes._reading import OWNED
from rlstab.schema import SIGNALS
from rlstab.trainers._arguments import OWNED_BY_ADVANTAGE, OWNED_BY_OBJECTIVE

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata


def plain(text: str) -> str:
    """Text in which nothing is markup."""
    return re.sub(r"([\\`*_<>|{}$\[\]])", r"\\\1", text)


def code(text: str) -> str:
    """Text as code in a cell of a table."""
    return f"`{text.replace('|', chr(92) + '|')}`" if text else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown; the cells are Markdown."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def metrics(prefix: str) -> list[str]:
    """The signals whose keys begin with one of the prefixes, which commas separate."""
    prefixes = tuple(prefix.split(","))
    rows = [
        (
            code(entry.key),
            f"{plain(entry.meaning)} {code(entry.formula)}",
            plain(entry.unit),
            "" if entry.direction == "none" else entry.direction,
            entry.reduction,
            plain(entry.cadence),
        )
        for entry in SIGNALS
        if entry.key.startswith(prefixes)
    ]
    return table(("Key", "Meaning and formula", "Unit", "Good", "Joined by", "Taken"), rows)


def owned_arguments(owner: str) -> list[str]:
    """The arguments of the host that `objective`, `advantage` or a `recipe` decides in its place."""
    owned = {"objective": OWNED_BY_OBJECTIVE, "advantage": OWNED_BY_ADVANTAGE, "recipe": OWNED}[owner]
    return table(("Argument", "Instead"), [(code(name), plain(remedy)) for name, remedy in owned.items()])


class Metrics(SphinxDirective):
    """`metrics`: a table of signals by prefix of their keys."""

    required_arguments = 1

    def lines(self) -> list[str]:
        """The table in Markdown."""
        return metrics(self.arguments[0])

    def run(self) -> list[nodes.Node]:
        """Render the table."""
        return self.parse_text_to_nodes("\n".join(self.lines()))


class OwnedArguments(Metrics):
    """`owned-arguments`: a table of arguments by owner."""

    def lines(self) -> list[str]:
        """The table in Markdown."""
        return owned_arguments(self.arguments[0])


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register with Sphinx."""
    app.add_directive("metrics", Metrics)
    app.add_directive("owned-arguments", OwnedArguments)
    return {"parallel_read_safe": True}
