"""The tables of the guide on watching are whole."""

import re

import pytest
from watch_tables import TABLES

from rlstab.monitors import CAUSES, default_rules


def cells(line: str) -> int:
    return len(re.split(r"(?<!\\)\|", line.strip("|")))


@pytest.mark.parametrize("name", TABLES)
def test_lines_have_as_many_cells_as_the_head(name: str) -> None:
    lines = TABLES[name]()
    assert len(lines) > 5
    assert {cells(line) for line in lines} == {cells(lines[0])}


def test_default_rules_have_causes_that_are_explained() -> None:
    assert {rule.cause for rule in default_rules()} <= CAUSES.keys()
    assert len(TABLES["rules"]()) == len(default_rules()) + 2
