"""The wheel: what is in it, and that it works where the checkout is not."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

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
    """A fresh virtual environment with the wheel, and the dependencies of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python")]
    run([*pip, "install", "--no-deps", "--no-index", wheel], folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return folder


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
