"""The wheel: what is in it, and that it works where the checkout is not."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, distribution
from pathlib import Path
from textwrap import dedent

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def run(command: Sequence[str | Path], cwd: Path) -> str:
    """What a command prints; no path into the checkout reaches it."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built in a copy of the checkout, links and all, so that neither leaves a trace in the other."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", "losses", "rollouts"):
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    shutil.copytree(ROOT / "rlstab", copy / "rlstab", ignore=shutil.ignore_patterns("__pycache__"))
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."], copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel, what it declares, what that declares, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python")]
    run([*pip, "install", "--no-deps", "--no-index", wheel], folder)
    for dependency in closure(installed(folder)):
        link_files(dependency, site_packages(folder))
    return folder


def site_packages(environment: Path) -> Path:
    (site,) = environment.glob("lib/python*/site-packages")
    return site


def installed(environment: Path) -> Distribution:
    """The wheel as it stands in an environment."""
    (metadata,) = site_packages(environment).glob("rlstab-*.dist-info")
    return Distribution.at(metadata)


def requirements(package: Distribution, extras: Sequence[str] = ()) -> Iterator[Requirement]:
    """What a distribution declares to need on this machine, with some of its extras."""
    for line in package.requires or ():
        needed = Requirement(line)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield needed


def closure(package: Distribution) -> list[Distribution]:
    """All that a distribution needs, directly or not, from the environment that runs the tests."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, tuple[str, ...]]] = set()
    waiting = list(requirements(package))
    while waiting:
        needed = waiting.pop()
        name, extras = canonicalize_name(needed.name), tuple(sorted(needed.extras))
        if (name, extras) not in seen:
            seen.add((name, extras))
            found[name] = distribution(name)
            waiting += requirements(found[name], extras)
    return list(found.values())


def link_files(package: Distribution, site: Path) -> None:
    """Put the files of a distribution into another environment, as links."""
    for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
        if not top.endswith(".pth") and not (site / top).exists():
            (site / top).symlink_to(Path(str(package.locate_file(top))).resolve())


def version_of(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"rlstab"}
    packed = {name for name in names if name.endswith(".py")}
    assert packed == {path.relative_to(ROOT).as_posix() for path in (ROOT / "rlstab").rglob("*.py")}
    assert "rlstab/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_installed_wheel_imports(wheel: Path, environment: Path, tmp_path: Path) -> None:
    code = "import rlstab, rlstab.losses; print(rlstab.__file__, rlstab.__version__)"
    file, version = run([environment / "bin/python", "-c", code], tmp_path).split()
    assert Path(file).is_relative_to(environment)
    assert version == version_of(wheel)


def test_the_installed_command_runs(wheel: Path, environment: Path, tmp_path: Path) -> None:
    assert version_of(wheel) in run([environment / "bin/rlstab", "--version"], tmp_path)


def test_what_the_wheel_declares_is_here_in_range(environment: Path) -> None:
    needed = list(requirements(installed(environment)))
    assert {"torch", "transformers", "trl"} <= {requirement.name for requirement in needed}
    assert "vllm" not in {requirement.name for requirement in needed}
    versions = {requirement: distribution(requirement.name).version for requirement in needed}
    assert [str(requirement) for requirement, found in versions.items() if found not in requirement.specifier] == []


def test_every_module_imports_with_what_the_wheel_declares(environment: Path, tmp_path: Path) -> None:
    """Modules that need an extra are named after it, and those of Triton, which the CUDA build of torch brings."""
    code = """
        import importlib, importlib.util, pkgutil, rlstab
        absent = () if importlib.util.find_spec("triton") else ("triton",)
        for found in pkgutil.walk_packages(rlstab.__path__, "rlstab."):
            name = found.name.rpartition(".")[2].lstrip("_")
            if not name.startswith(("ray", "textual", "vllm")) and not name.endswith(absent):
                importlib.import_module(found.name)
                print(found.name)
    """
    imported = run([environment / "bin/python", "-c", dedent(code)], tmp_path).split()
    assert {"rlstab.losses.presets", "rlstab.recipes._run", "rlstab.trainers._grpo", "rlstab.cli"} <= set(imported)


def test_a_package_that_is_not_declared_is_not_there(environment: Path, tmp_path: Path) -> None:
    code = "import importlib.util as u; print([name for name in ('pytest', 'sphinx', 'torch') if u.find_spec(name)])"
    assert run([environment / "bin/python", "-c", code], tmp_path).strip() == "['torch']"
