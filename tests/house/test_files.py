"""Files beside the package: each recipe and example is run by a test, and the changelog knows the version."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# File below configs/ or examples/ -> why no test runs it.
NOT_RUN: dict[str, str] = {}


def shown_files() -> list[str]:
    """Recipes and examples, as paths from the top."""
    found = [path for folder in ("configs", "examples") for path in (ROOT / folder).rglob("*.*")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found if path.suffix in {".py", ".yaml", ".yml"})


@cache
def names_in_tests() -> tuple[frozenset[str], frozenset[str]]:
    """The names of files in the strings of tests outside of this folder, and the patterns with a folder."""
    trees = [
        ast.parse(path.read_text())
        for path in (ROOT / "tests").rglob("test_*.py")
        if path.parent != Path(__file__).parent
    ]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    names = frozenset(text.rsplit("/", 1)[-1] for text in texts)
    return names, frozenset(text for text in texts if "/*" in text)


@pytest.mark.parametrize("name", shown_files())
def test_a_test_names_each_recipe_and_example(name: str) -> None:
    """By its name, or by a pattern with its folder, as `recipes/*.yaml`."""
    names, patterns = names_in_tests()
    named = Path(name).name in names or any(map(Path(name).match, patterns))
    assert named != (name in NOT_RUN)


def test_exceptions_exist() -> None:
    assert NOT_RUN.keys() <= set(shown_files())


def test_the_changelog_begins_with_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = re.findall(r"^## (\S+)(.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    number, note = headings[0]
    assert number == version.removesuffix(".dev0")
    assert ("in development" in note) == version.endswith(".dev0")
