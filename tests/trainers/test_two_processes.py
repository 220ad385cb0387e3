"""Two processes with gloo: groups, counts and statistics go across them, and a resume goes on in both."""

from pathlib import Path
from typing import Any

import pytest
from equality import gradient_distance
from expert_ranks import guided, imitated
from small_runs import assert_same_weights, trainer_of
from test_equality import differing
from two_processes import in_two_processes
from two_ranks import ROWS, SETTINGS, scenarios, spread_run

from rlstab.errors import ConfigError
from rlstab.trainers import latest_checkpoint


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes write."""
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def ranks(output: Path) -> list[Any]:
    """The results of both."""
    found = in_two_processes(scenarios, output)
    assert [result[name]["processes"] for result in found for name in result] == [2] * 26
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One process with the same completions in one micro-batch."""
    return spread_run(tmp_path_factory.mktemp("alone"), rows=ROWS, accumulation=1)


def test_a_group_was_spread_over_both(ranks: list[Any], alone: Any) -> None:
    assert [result["spread"]["groups"] for result in ranks] == [[0, 1], [1, 2]]
    assert alone["groups"] == [0, 1, 2]
    assert alone["processes"] == 1


def test_the_gradient_is_that_of_one_process(ranks: list[Any], alone: Any) -> None:
    first, second = (result["spread"]["gradients"] for result in ranks)
    for step in (0, 1):
        assert gradient_distance(first[step], second[step]) == 0.0
        assert gradient_distance(first[step], alone["gradients"][step]) <= 1e-6


def test_what_is_measured_is_that_of_one_process(ranks: list[Any], alone: Any) -> None:
    rows = ranks[0]["spread"]["rows"]
    assert len(rows) == len(alone["rows"]) == 2
    for ours, theirs in zip(rows, alone["rows"], strict=True):
        assert ours.keys() == theirs.keys()
        everywhere = [key for key in theirs if key.startswith(("objective/", "policy/", "mismatch/", "train/reward"))]
        assert len(everywhere) > 40
        for key in everywhere:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6, nan_ok=True), key
    assert 0.0 < rows[0]["objective/policy/conflict_weight/conflict"] < 1.0
    assert rows[0]["mismatch/unscored"] == 4.0
    assert rows[1]["objective/covariance/loss"] > 0.0
    # Each process draws its own positions for the drift, among completions of different lengths.
    assert rows[0]["drift/initial/kl"] == 0.0
    assert rows[1]["drift/initial/kl"] > 0.0


def test_the_drop_in_equals_the_host(ranks: list[Any]) -> None:
    for rank, result in enumerate(ranks):
        ours, theirs = result["host"]["losses"]
        assert len(theirs) == 6
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
        assert_same_weights(*result["host"]["weights"])
        if rank == 0:
            for mine, hosts in zip(*result["host"]["logs"], strict=True):
                assert not differing(mine, hosts)
    assert ranks[0]["host"]["losses"] != ranks[1]["host"]["losses"]


def test_both_resume_within_a_generation(ranks: list[Any]) -> None:
    for result in ranks:
        assert_same_weights(*result["resumed"]["weights"])


def test_an_engine_that_gives_up_stops_both_and_leaves_a_checkpoint(ranks: list[Any]) -> None:
    failures = ["the engine of process 1 has failed: all engines are dead", "all engines are dead"]
    assert [result["failed"]["failure"] for result in ranks] == failures
    assert [result["failed"]["step"] for result in ranks] == [2, 2]
    for result in ranks:
        assert_same_weights(*result["failed"]["weights"])


def test_one_process_does_not_resume_what_two_have_written(ranks: list[Any], output: Path, tmp_path: Path) -> None:
    checkpoint = latest_checkpoint(output / "whole")
    assert checkpoint == output / "whole" / "checkpoint-4"
    trainer = trainer_of(tmp_path, settings={**SETTINGS, "max_steps": 5})
    with pytest.raises(ConfigError, match="written by 2 processes and is resumed by 1"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_imitation_has_the_gradient_of_one_process(ranks: list[Any], tmp_path: Path) -> None:
    alone = {"imitated": imitated(tmp_path, rows=8), "expert": guided(tmp_path, rows=16)}
    for name, single in alone.items():
        for result in ranks:
            assert len(result[name]["gradients"]) == len(single["gradients"]) == 2
            for ours, theirs in zip(result[name]["gradients"], single["gradients"], strict=True):
                assert gradient_distance(ours, theirs) <= 1e-5
        for ours, theirs in zip(ranks[0][name]["logs"][:-1], single["logs"][:-1], strict=True):
            keys = [key for key in theirs if key.startswith(("objective/", "rollout/"))]
            assert len(keys) > 3
            assert [ours[key] for key in keys] == pytest.approx([theirs[key] for key in keys], rel=1e-4, abs=1e-6)
    assert 0.0 < alone["expert"]["logs"][0]["rollout/guided"] < 0.5


def test_groups_give_way_on_both(ranks: list[Any]) -> None:
    first, second = (result["resampled"] for result in ranks)
    for step, (ours, theirs) in enumerate(zip(first["gradients"], second["gradients"], strict=True)):
        assert gradient_distance(ours, theirs) == 0.0, step
    for result in (first, second):
        for rewards in result["rewards"]:
            groups = rewards.view(-1, 4)
            assert (groups.amax(-1) > groups.amin(-1)).all()
    found = [(row["resample/generations"], row["resample/replaced"]) for row in first["logs"][:-1]]
    assert any(share > 0 for _, share in found)
    assert all((number > 0) == (share > 0) for number, share in found)


@pytest.mark.parametrize("head", ["tied", "untied", "adapter"])
def test_sharded_models_have_the_gradient_of_whole_ones(ranks: list[Any], head: str) -> None:
    for result in ranks:
        ours, whole = result["sharded"]["gradients"][head]
        assert gradient_distance(ours, whole) <= 1e-5
        assert any(gradient.any() for gradient in whole.values())


def test_distillation_equals_the_host(ranks: list[Any]) -> None:
    for result in ranks:
        ours, theirs = result["distilled"]["losses"]
        assert len(theirs) == 6
        assert ours == pytest.approx(theirs, rel=1e-5)
        for mine, hosts in zip(*result["distilled"]["gradients"], strict=True):
            assert gradient_distance(mine, hosts) <= 1e-5
    assert ranks[0]["distilled"]["losses"] != ranks[1]["distilled"]["losses"]


def test_both_replay_the_routes_of_their_own_rows(ranks: list[Any]) -> None:
    first, second = (result["routed"] for result in ranks)
    assert first["rows"] == second["rows"] == [4, 4]
    assert_same_weights(first["weights"], second["weights"])
    assert first["logged"]["routes/flip_share"] == [0.0, 0.0]
    assert min(first["logged"]["routes/own_flip_share"]) > 0.8
    for layer in (0, 1):
        assert max(first["logged"][f"routes/agreement/{layer}"]) < 0.2


def test_a_sharded_model_replays_routes_as_a_whole_one(ranks: list[Any]) -> None:
    for result in ranks:
        losses = result["routed and sharded"]["losses"]
        assert losses["sharded"] == losses["whole"]
        ours, whole = result["routed and sharded"]["gradients"]
        assert ours.keys() == whole.keys()
        assert gradient_distance(ours, whole) <= 1e-6
        assert all(ours[name].abs().sum() > 0 for name in ours if "gate.weight" in name)


def test_a_fault_of_one_process_takes_both_back(ranks: list[Any]) -> None:
    first, second = (result["guarded"] for result in ranks)
    for result in (first, second):
        assert (result["healthy-back"], result["hurt-back"]) == (0, 1)
        assert result["hurt-ring"] == first["hurt-ring"]
        assert max(result["hurt-losses"][6:]) < 3.3 < max(result["hurt-losses"])
        assert_same_weights(result["hurt"], first["hurt"])
    assert first["healthy-ring"] == [2, 4, 6, 8]


def test_shards_go_back_in_place(ranks: list[Any]) -> None:
    for result in ranks:
        again, expected = result["shards"]["losses"]
        assert again == expected
        assert result["shards"]["stayed"]
        assert result["shards"]["share"] == pytest.approx(0.5, abs=0.05)
