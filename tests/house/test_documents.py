"""README and documentation: their links lead somewhere, their commands parse, their tables are whole."""

import re
import shlex
from pathlib import Path

import pytest
from generated_tables import metrics, owned_arguments

from rlstab.cli import _split_overrides
from rlstab.recipes import read_recipe
from rlstab.schema import SIGNALS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/*.md", "docs/guide/*.md", "benchmarks/*.md") for path in ROOT.glob(pattern)
)
README = (ROOT / "README.md").read_text()


def links(text: str) -> list[str]:
    """Targets of links and images that are paths."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [target.partition("#")[0] for target in targets if not target.startswith(("http", "#"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    assert [target for target in links(path.read_text()) if not (path.parent / target).exists()] == []


def test_a_broken_link_is_seen() -> None:
    found = links("[a](README.md#top) ![b](docs/none.png) [c](https://example.org)\n```\nd[0](x)\n```\n")
    assert found == ["README.md", "docs/none.png"]


def test_the_readme_names_targets_of_the_makefile() -> None:
    named = set(re.findall(r"^make (\w+)|`make (\w+)", README, re.MULTILINE))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    names = {name for pair in named for name in pair if name}
    assert {"quickstart", "test"} <= names <= targets


def commands(name: str) -> list[list[str]]:
    """The words behind `rlstab NAME` in the README's blocks of shell."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    words = [shlex.split(line, comments=True) for line in blocks.splitlines()]
    return [line[2:] for line in words if line[:2] == ["rlstab", name]]


def test_the_recipes_of_the_readme_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipes = [_split_overrides(words) for words in commands("train")]
    fresh = [(own, overrides) for own, overrides in recipes if "--resume" not in own]
    assert fresh
    for own, overrides in fresh:
        assert dict(overrides)["output"] == str(read_recipe(own[0], overrides).recipe.output)
    runs = {f"{dict(overrides)['output']}" for _, overrides in fresh}
    resumed = [(own, overrides) for own, overrides in recipes if "--resume" in own]
    assert all(Path(own[0]).parent.as_posix() in runs and not overrides for own, overrides in resumed)
    assert {words[0] for words in commands("report")} <= runs


def cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line.strip("|"))


def test_the_tables_of_metrics_hold_every_signal() -> None:
    prefixes = re.findall(r"```\{metrics\} (\S+)", (ROOT / "docs/guide/metrics.md").read_text())
    rows = [line for prefix in prefixes for line in metrics(prefix)[2:]]
    assert sorted(cells(row)[0].strip(" `") for row in rows) == sorted(entry.key for entry in SIGNALS)
    assert {len(cells(row)) for row in rows} == {6}


@pytest.mark.parametrize("owner", ["objective", "advantage", "recipe"])
def test_the_tables_of_arguments_have_two_columns(owner: str) -> None:
    lines = owned_arguments(owner)
    assert len(lines) > 3
    assert {len(cells(line)) for line in lines} == {2}
