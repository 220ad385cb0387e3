"""A term is small: fields, checks, and one formula that is written elsewhere or here."""

import ast
import inspect
from statistics import median
from textwrap import dedent

from rlstab import losses
from rlstab.losses import Term


def code_lines(of: type) -> int:
    """Lines that are neither blank, nor a comment, nor a docstring."""
    source = dedent(inspect.getsource(of))
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    texts = [node.body[0] for node in nodes if ast.get_docstring(node)]
    skipped = {number for text in texts for number in range(text.lineno, (text.end_lineno or 0) + 1)}
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and at not in skipped for at, line in lines)


def test_terms_are_small() -> None:
    known = [getattr(losses, name) for name in losses.__all__]
    terms = [
        part for part in known if inspect.isclass(part) and issubclass(part, Term) and not inspect.isabstract(part)
    ]
    lengths = {term.__name__: code_lines(term) for term in terms}
    assert len(lengths) > 30
    assert median(lengths.values()) <= 20
    assert max(lengths.values()) <= 40, lengths
