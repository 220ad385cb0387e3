"""Docstrings in Markdown: autodoc and napoleon see their sections, MyST renders their text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from docutils import nodes
from docutils.utils import new_document
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata


class Markdown(SphinxDirective):
    """Content in Markdown within a page in reStructuredText."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Parse the content into nodes."""
        source, _ = self.get_source_info()
        document = new_document(source, self.state.document.settings)
        MystParser().parse("\n".join(self.content), document)
        return document.children


def to_markdown(lines: Iterable[str], where: str) -> Iterator[str]:
    """Turn what napoleon made of a docstring into Markdown: rubrics into bold lines, examples into code blocks."""
    fenced = example = False
    for line in lines:
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if not fenced and not example and line.lstrip().startswith(">>> "):
            example = True
            yield line[: len(line) - len(line.lstrip())] + "```pycon"
        elif example and not line.strip():
            example = False
            yield "```"
        if not fenced and not example and line.startswith(".. "):
            rubric = re.fullmatch(r"\.\. rubric:: (.+)", line)
            if rubric is None:
                raise ExtensionError(f"{where}: docstrings are Markdown, found {line!r}")
            line = f"**{rubric[1]}**"
        yield line
    if example:
        yield "```"


def render(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Hand a docstring that napoleon has processed to the `markdown` directive."""
    lines[:] = [".. markdown::", "", *(f"   {line}".rstrip() for line in to_markdown(list(lines), name)), ""]


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register with Sphinx."""
    app.add_directive("markdown", Markdown)
    app.connect("autodoc-process-docstring", render, priority=600)
    return {"parallel_read_safe": True}
