"""Every public name stands in an `__all__`, is documented, and has its place on a page of the documentation."""

import subprocess
import sys
import textwrap
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
from public_api import page, public_modules, public_names, undocumented

ROOT = Path(__file__).resolve().parents[2]
MODULES = public_modules("rlstab")


@pytest.fixture(params=MODULES, ids=[module.__name__ for module in MODULES])
def module(request: pytest.FixtureRequest) -> ModuleType:
    chosen: ModuleType = request.param
    return chosen


def test_all_is_sorted_and_complete(module: ModuleType) -> None:
    names: list[str] = module.__all__
    assert sorted(set(names)) == sorted(names)
    assert [name for name in names if name not in vars(module)] == []


def test_public_names_are_documented(module: ModuleType) -> None:
    assert undocumented(module) == []


def test_the_page_lists_what_all_lists(module: ModuleType) -> None:
    directives = [line for line in page(module).splitlines() if line.startswith(".. ")]
    assert [line.rsplit(" ", 1)[-1] for line in directives] == [
        module.__name__,
        *(f"{module.__name__}.{name}" for name in public_names(module)),
    ]


def test_a_room_is_a_face_over_private_modules(module: ModuleType) -> None:
    """What a room offers is defined in its private modules, or in a public one with an `__all__` of its own."""
    if "__path__" not in vars(module):
        pytest.skip("a module, not a room")
    named = {name: vars(module)[name] for name in public_names(module)}
    defined = [value for value in named.values() if isinstance(value, type | FunctionType)]
    assert [value.__name__ for value in defined if value.__module__ == module.__name__] == []


BODIES = {
    "a function": "def part(): ...",
    "a class": "class part: ...",
    "a dataclass": "from dataclasses import dataclass\n@dataclass\nclass part:\n    x: int",
    "a method": "class part:\n    'Documented.'\n    def act(self): ...",
    "a property": "class part:\n    'Documented.'\n    @property\n    def act(self): ...",
    "an alias": "part = int | str",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_the_documentation_stops_at_an_undocumented_name(body: str, tmp_path: Path) -> None:
    built = build_docs(tmp_path, f"'A package.'\n{body}\n__all__ = ['part']")
    assert built.returncode != 0
    assert "public and undocumented: sample.part" in built.stderr


def test_the_documentation_builds_where_all_is_documented(tmp_path: Path) -> None:
    built = build_docs(tmp_path, "'A package.'\ndef part():\n    'Of **it**, as $x^2$.'\n__all__ = ['part']")
    assert built.returncode == 0, built.stderr
    written = (tmp_path / "out/api/sample.txt").read_text()
    assert "sample.part()\n\n   Of **it**, as x^2." in written


def build_docs(folder: Path, source: str) -> subprocess.CompletedProcess[str]:
    (folder / "sample").mkdir()
    (folder / "sample/__init__.py").write_text(source)
    (folder / "index.rst").write_text("Sample\n======\n\n.. toctree::\n   :glob:\n\n   api/*\n")
    settings = f"""
        import sys
        sys.path[:0] = [{str(folder)!r}, {str(ROOT / "docs/_ext")!r}]
        extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser", "markdown_docstrings", "public_api"]
        public_api_package = "sample"
        myst_enable_extensions = ["dollarmath"]
    """
    (folder / "conf.py").write_text(textwrap.dedent(settings))
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "--fail-on-warning",
        "-b",
        "text",
        str(folder),
        str(folder / "out"),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)
