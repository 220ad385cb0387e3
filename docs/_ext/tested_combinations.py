"""The table of what is trained beside the host, made from the cases that the tests run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from equality import Case
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata

CASES_AT = Path(__file__).parents[2] / "tests" / "trainers"
HEAD = ("Combination", "Arguments", "Old log-probs", "Sampler's log-probs", "Model", "Equal bit for bit")


def table(cases: dict[str, Case]) -> list[str]:
    """One line of Markdown for each case, below a head."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    return lines + [f"| {' | '.join(row(case))} |" for case in cases.values()]


def row(case: Case) -> tuple[str, ...]:
    """The cells of one case."""
    settings = ", ".join(f"`{name}={value}`" for name, value in case.config.items())
    model = "mixture of experts" if case.moe else "dense"
    return (
        case.title,
        settings,
        "recorded" if case.old_logps else "",
        "recorded" if case.sampler else "",
        f"{model}, LoRA" if case.peft else model,
        ", ".join(case.identical),
    )


class TestedCombinations(SphinxDirective):
    """`tested-combinations`: the table."""

    def run(self) -> list[nodes.Node]:
        """Read the cases and render them."""
        sys.path.insert(0, str(CASES_AT))
        from equality import CASES

        self.env.note_dependency(str(CASES_AT / "equality.py"))
        return self.parse_text_to_nodes("\n".join(table(CASES)))


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register with Sphinx."""
    app.add_directive("tested-combinations", TestedCombinations)
    return {"parallel_read_safe": True}
