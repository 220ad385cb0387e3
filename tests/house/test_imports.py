"""What an import of rlstab loads, and under which names the rooms can be imported; each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"accelerate", "datasets", "peft", "ray", "transformers", "trl", "vllm"}


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-W", "error:::rlstab", "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def loaded(*statements: str) -> list[set[str]]:
    """What is loaded after each statement."""
    said = "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    ran = run("\n".join(["import sys", *(f"{statement}\n{said}" for statement in statements)]))
    assert ran.returncode == 0, ran.stderr
    return [set(line.split()) for line in ran.stdout.splitlines()]


@pytest.mark.parametrize("module", ["rlstab", "rlstab.cli", "rlstab.losses", "rlstab.record", "rlstab.schema"])
def test_an_import_loads_no_host(module: str) -> None:
    assert loaded(f"import {module}")[0] & HEAVY == set()


@pytest.mark.parametrize("module", ["rlstab", "rlstab.cli", "rlstab.errors", "rlstab.record", "rlstab.schema"])
def test_rooms_without_tensors_load_no_torch(module: str) -> None:
    assert "torch" not in loaded(f"import {module}")[0]


def test_only_the_trainers_load_trl() -> None:
    """A recipe holds the trainer's settings, so its room stands on the trainers' and loads what they load."""
    rooms = {path.parent.name for path in (ROOT / "rlstab").glob("*/__init__.py")}
    others = rooms - {"trainers", "recipes"}
    before, after = loaded("; ".join(f"import rlstab.{room}" for room in sorted(others)), "import rlstab.trainers")
    assert "trl" not in before
    assert "trl" in after


@pytest.mark.parametrize("room", ["losses", "rollouts"])
def test_the_links_at_the_top_are_relative(room: str) -> None:
    link = ROOT / room
    assert link.is_symlink()
    assert link.readlink() == Path("rlstab") / room
    assert link.is_dir()


@pytest.mark.parametrize("room", ["losses", "rollouts"])
def test_a_linked_room_refuses_another_name(room: str) -> None:
    ran = run(f"import {room}")
    assert ran.returncode == 1
    assert f"rlstab.{room}" in ran.stderr.splitlines()[-1]
    assert ran.stderr.splitlines()[-1].startswith("ImportError")
