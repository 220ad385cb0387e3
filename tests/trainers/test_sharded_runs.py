"""Under FSDP and DeepSpeed, on two processes: who goes back gets all of a run back, and passes see whole heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sharded_runs import by_deepspeed, by_flat_weights, by_fsdp, compared_by_deepspeed
from small_runs import assert_same_weights
from two_processes import in_two_processes

from rlstab.trainers._keeper import PASSING

PARTS = ("weights", "0-of-2.safetensors", "1-of-2.safetensors")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs write."""
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def fsdp(output: Path) -> list[Any]:
    """Both processes' results."""
    return in_two_processes(by_fsdp, output)


@pytest.fixture(scope="module")
def deepspeed(output: Path) -> list[Any]:
    """Both processes' results."""
    return in_two_processes(by_deepspeed, output)


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        ("fsdp", "fsdp1"),
        ("fsdp", "fsdp2"),
        pytest.param("deepspeed", "zero2", marks=pytest.mark.deepspeed),
        pytest.param("deepspeed", "zero3", marks=pytest.mark.deepspeed),
    ],
)
def test_a_sharded_run_goes_back_to_itself(found: str, kind: str, output: Path, request: pytest.FixtureRequest) -> None:
    """From step 2 to the start, where the optimizer holds nothing, and from step 6 to step 4; then it goes on."""
    both = request.getfixturevalue(found)
    for result in both:
        plain, spiked = result[kind]["plain"], result[kind]["spiked"]
        assert {run["kind"] for run in result[kind].values()} == {f"DistributedType.{found.upper()}"}
        assert {run["processes"] for run in result[kind].values()} == {2}
        assert spiked["losses"][2] > 4 < spiked["losses"][6]
        for step, same in {3: 1, 4: 2, 6: 2, 7: 3, 8: 4}.items():
            assert_same_weights(spiked["weights"][step], plain["weights"][same])
            assert spiked["rates"][step] == plain["rates"][same]
        assert [spiked["losses"][step] for step in (3, 4, 7, 8)] == [plain["losses"][step] for step in (1, 2, 3, 4)]
        assert spiked["ring"] == [0, 2, 6, 8]
    assert both[0][kind]["spiked"]["backs"] == [(2, 0), (6, 4)]
    assert not (output / kind / "spiked" / PASSING).exists()


@pytest.mark.parametrize(
    ("found", "kind"), [("fsdp", "fsdp1"), pytest.param("deepspeed", "zero3", marks=pytest.mark.deepspeed)]
)
def test_the_weights_of_a_ring_are_in_the_checkpoint(
    found: str, kind: str, output: Path, request: pytest.FixtureRequest
) -> None:
    """Resumed at step 5, it goes back at step 6 to step 4, which no other file of the checkpoint holds."""
    both = request.getfixturevalue(found)
    for result in both:
        resumed = result[kind]["resumed"]
        assert_same_weights(resumed["weights"][8], result[kind]["plain"]["weights"][4])
        assert resumed["ring"] == [0, 2, 6, 8]
    assert both[0][kind]["resumed"]["backs"] == [(6, 4)]
    files = {path.name for path in (output / kind / "ring").iterdir()}
    assert files == {f"step-0000000{step}.{part}" for step in (0, 2, 6, 8) for part in PARTS}


def test_flat_weights_are_trained_and_what_cannot_read_them_says_so(tmp_path: Path) -> None:
    both = in_two_processes(by_flat_weights, tmp_path)
    for result in both:
        assert result["steps"] == 2
        assert "a term reads whole distributions" in result["refused"]
        assert "use FSDP2" in result["refused"]
    assert any("FSDP1 keeps weights flat" in reason for reason in both[0]["skipped"])


@pytest.mark.deepspeed
@pytest.mark.wrong_shapes  # a head in parts has none until it is gathered
def test_whole_distributions_are_those_of_gathered_heads(tmp_path: Path) -> None:
    """ZeRO-3 holds no whole head outside of a forward; its passes gather it, those of the drift signal too."""
    both = in_two_processes(compared_by_deepspeed, tmp_path)
    for losses in both:
        assert losses[3] == pytest.approx(losses[2], rel=1e-4)
        assert len(set(losses[3])) == 3
