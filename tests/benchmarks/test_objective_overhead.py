"""The benchmark of the objective's cost runs, compares equal losses, and writes figures that add up."""

import json
from typing import Any

import pytest
from running import output_of

CASES = ("grpo", "vespo", "dapo, beta", "dapo, sampler correction", "five terms")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("benchmark") / "figures.json"
    sizes = ["--seconds", "0.2", "--processes", "1", "--shapes", "8x6"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        text = output_of("benchmarks/objective_overhead.py", "--json", file, *sizes, "--cases", *CASES)
    assert "rlstab / host" in text
    figures: dict[str, Any] = json.loads(file.read_text())
    return figures


def test_every_case_is_measured_against_the_host_and_the_host_against_itself(results: dict[str, Any]) -> None:
    assert [(row["case"], row["shape"]) for row in results["loss"]] == [(case, "8x6") for case in CASES]
    assert len(results["step"]) == 2
    for row in results["loss"] + results["step"]:
        assert row["rounds"] >= 1
        for ratios in (row["ratio"], row["noise"], row.get("single", row["ratio"])):
            assert 0 < ratios["min"] <= ratios["median"] <= ratios["max"]
    assert all(row["single"] != row["ratio"] for row in results["loss"])


def test_what_is_timed_computes_the_same(results: dict[str, Any]) -> None:
    compared = [row["difference"] for row in results["loss"] if "difference" in row]
    assert len(compared) == len(CASES) - 1  # all but the objective that the host does not have
    assert all(difference["loss"] <= 1e-6 and difference["gradient"] <= 1e-6 for difference in compared)
    assert all(row["difference"]["loss"] <= 1e-6 for row in results["step"])


def test_imports_are_timed_beside_torch(results: dict[str, Any]) -> None:
    assert [row["module"] for row in results["import"]] == ["rlstab", "rlstab.losses"]
    assert all(row["torch"]["median"] > 0 and row["added"]["median"] > 0 for row in results["import"])


def test_machine_versions_date_and_command_are_noted(results: dict[str, Any]) -> None:
    machine = results["machine"]
    assert {
        "date",
        "command",
        "device",
        "cpu",
        "cores",
        "threads",
        "python",
        "torch",
        "trl",
        "rlstab",
    } <= machine.keys()
    assert "--shapes 8x6" in machine["command"]
    assert machine["threads"] == 1
