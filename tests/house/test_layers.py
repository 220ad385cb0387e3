"""Each room imports only rooms below it, and foreign packages only where they belong: read from the source."""

import ast
import sys
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "rlstab"

# Top to bottom; the modules of the last line may import each other.
FLOORS = [
    ["__main__"],
    ["cli"],
    ["recipes"],
    ["report"],
    ["trainers"],
    ["rollouts"],
    ["probes"],
    ["routing"],
    ["models"],
    ["tasks"],
    ["record"],
    ["monitors"],
    ["optim"],
    ["losses"],
    ["batch", "errors", "schema"],
]
ROOMS = {room for floor in FLOORS for room in floor}
BELOW = {room: set(chain(*FLOORS[height + 1 :])) for height, floor in enumerate(FLOORS) for room in floor}
BELOW |= {room: set(FLOORS[-1]) for room in FLOORS[-1]}
BELOW["report"] = {"batch", "errors", "monitors", "record", "schema"}  # reads run folders only

# Rooms that keep to few foreign packages; the others may import any declared dependency.
FOREIGN = {
    "batch": {"jaxtyping", "torch"},
    "errors": set(),
    "losses": {"jaxtyping", "torch", "triton"},
    "monitors": {"numpy"},
    "optim": {"jaxtyping", "torch"},
    "report": {"matplotlib", "numpy", "rich", "textual"},
    "schema": set(),
}
# Packages that others bring, and pin for themselves: triton comes with torch for CUDA.
BROUGHT = {"triton"}
# Packages with one place only, as patterns of paths below rlstab/.
PLACES = {
    "trl": ["trainers/*"],
    "vllm": ["rollouts/vllm*.py", "rollouts/_vllm*.py"],
    "ray": ["rollouts/ray*.py", "rollouts/_ray*.py"],
    "textual": ["report/_textual*.py"],
    "triton": ["losses/_streamed_triton.py"],
}


class Import(NamedTuple):
    """One imported name: `module` in full, and the name taken from it, if any."""

    path: Path
    line: int
    module: str
    name: str | None

    @property
    def room(self) -> str:
        return self.path.relative_to(PACKAGE).parts[0].removesuffix(".py")

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        what = self.module if self.name is None else f"{self.module}.{self.name}"
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {what}"


def read_imports(path: Path, source: str) -> Iterator[Import]:
    """Every import of a source text, wherever in it: at the top, in a function, under TYPE_CHECKING."""
    package = ["rlstab", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(path, node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (Import(path, node.lineno, module, alias.name) for alias in node.names)


def all_imports() -> list[Import]:
    return [found for path in sorted(PACKAGE.rglob("*.py")) for found in read_imports(path, path.read_text())]


def imported_room(found: Import) -> str | None:
    """The room of rlstab that an import reaches; None for foreign packages and for rlstab itself."""
    if found.top != "rlstab":
        return None
    parts = [*found.module.split("."), *([found.name] if found.name else [])][1:]
    return parts[0] if parts and parts[0] in ROOMS else None


def looks_up(found: Import) -> bool:
    """Does the import reach a room that is not below its own?"""
    target = imported_room(found)
    return target not in (None, found.room) and found.room != "__init__" and target not in BELOW[found.room]


def out_of_place(found: Import) -> bool:
    """Does the import bring a foreign package to a room that does without?"""
    if found.top == "rlstab" or found.top in sys.stdlib_module_names:
        return False
    path = found.path.relative_to(PACKAGE).as_posix()
    if found.top in PLACES and not any(fnmatch(path, pattern) for pattern in PLACES[found.top]):
        return True
    return found.top not in FOREIGN.get(found.room, {found.top})


def takes_the_trainer(found: Import) -> bool:
    """Does the import take the training loop of transformers outside `trainers`?"""
    taken = (found.name or "").startswith(("Trainer", "TrainingArguments", "Seq2SeqTrain"))
    loop = found.module.startswith(("transformers.trainer", "transformers.training_args"))
    return found.top == "transformers" and (taken or loop) and found.room != "trainers"


def reaches_inside(found: Import) -> bool:
    """Does the import take a private module of another room?"""
    target = imported_room(found)
    if target is None or target == found.room:
        return False
    parts = [*found.module.split("."), *([found.name] if found.name else [])][2:]
    return any(part.startswith("_") and not part.startswith("__") for part in parts)


IMPORTS = all_imports()


def test_every_room_has_a_floor() -> None:
    entries = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert entries - {"__init__", "__pycache__"} <= ROOMS


def test_rooms_import_only_rooms_below() -> None:
    assert [str(found) for found in IMPORTS if looks_up(found)] == []


def test_foreign_packages_stay_in_their_place() -> None:
    assert [str(found) for found in IMPORTS if out_of_place(found)] == []


def test_only_trainers_take_the_training_loop() -> None:
    assert [str(found) for found in IMPORTS if takes_the_trainer(found)] == []


def test_private_modules_stay_in_their_room() -> None:
    assert [str(found) for found in IMPORTS if reaches_inside(found)] == []


@pytest.mark.parametrize(
    ("path", "source", "breaks"),
    [
        ("losses/_a.py", "from rlstab.trainers import StableGRPOTrainer", looks_up),
        ("losses/_a.py", "from rlstab import record", looks_up),
        ("losses/_a.py", "def f():\n    from ..tasks import Task", looks_up),
        ("batch.py", "import rlstab.losses", looks_up),
        ("report/_a.py", "from rlstab.losses import Objective", looks_up),
        ("losses/_a.py", "import numpy as np", out_of_place),
        ("recipes/_a.py", "import trl", out_of_place),
        ("rollouts/_pool.py", "from vllm import LLM", out_of_place),
        ("trainers/_a.py", "import ray", out_of_place),
        ("recipes/_a.py", "from transformers import TrainerCallback", takes_the_trainer),
        ("recipes/_a.py", "import transformers.trainer_utils", takes_the_trainer),
        ("trainers/_a.py", "from rlstab.losses._ratio import TokenRatio", reaches_inside),
        ("trainers/_a.py", "from rlstab.losses import _ratio", reaches_inside),
    ],
)
def test_a_breach_is_seen(path: str, source: str, breaks: Callable[[Import], bool]) -> None:
    (found,) = read_imports(PACKAGE / path, source)
    assert breaks(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("trainers/_a.py", "from rlstab.losses import Objective"),
        ("trainers/_a.py", "from trl import GRPOTrainer"),
        ("trainers/_a.py", "from transformers import TrainerCallback"),
        ("losses/_a.py", "from ._ratio import TokenRatio"),
        ("losses/_a.py", "from rlstab.batch import TokenBatch"),
        ("batch.py", "from rlstab.errors import ShapeError"),
        ("rollouts/_vllm_engine.py", "import vllm"),
        ("report/_a.py", "from rlstab.record import read_run"),
        ("models/_a.py", "from transformers import AutoModelForCausalLM"),
    ],
)
def test_a_proper_import_passes(path: str, source: str) -> None:
    (found,) = read_imports(PACKAGE / path, source)
    assert not any(rule(found) for rule in (looks_up, out_of_place, takes_the_trainer, reaches_inside))


def test_foreign_packages_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    lines = project["dependencies"] + [line for extra in optional if extra != "dev" for line in optional[extra]]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    origin = packages_distributions()

    def declared_name(top: str) -> bool:
        return bool({canonicalize_name(name) for name in origin.get(top, [top])} & declared)

    foreign = {found.top for found in IMPORTS} - sys.stdlib_module_names - {"rlstab"} - BROUGHT
    assert {top for top in foreign if not declared_name(top)} == set()
