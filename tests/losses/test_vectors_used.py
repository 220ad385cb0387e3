"""Every worked example of `tests/vectors` is named by a test, or by what it waits for."""

import ast
import json
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
FILES = {path.stem: json.loads(path.read_text()) for path in sorted((TESTS / "vectors").glob("*.json"))}
METHODS = {
    "policy_losses": {entry["method"] for entry in FILES["policy_losses"]["vectors"]},
    "moe_monitors_optim": set(FILES["moe_monitors_optim"]),
}
# Examples of no loss, gradient stabiliser or advantage -> where they belong.
ELSEWHERE = {
    "adactrl_len": "rewards",
    "behavior_injection_weight": "sampling of prompts",
    "gradient_entanglement": "probes",
    "last_layer_grad": "probes",
    "prefix_rft_schedule": "trainers: expert prefixes",
    "reward_r1_reward": "rewards",
    "trapo_hint_levels": "trainers: expert prefixes",
    "ufo_turn_reward": "rewards",
    "uft_hint_prob": "trainers: expert prefixes",
}


@cache
def named() -> set[str]:
    """Every string in a test that is not this one."""
    trees = [ast.parse(path.read_text()) for path in TESTS.rglob("*.py") if path != Path(__file__)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_every_file_of_vectors_is_looked_at() -> None:
    assert METHODS.keys() == FILES.keys()


@pytest.mark.parametrize("file", METHODS)
def test_every_example_is_used(file: str) -> None:
    assert sorted(METHODS[file] - named() - ELSEWHERE.keys()) == []


def test_what_belongs_elsewhere_exists() -> None:
    assert ELSEWHERE.keys() <= set().union(*METHODS.values())
