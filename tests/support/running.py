"""Scripts of the repository, run as they are in the process of the tests, which has imported what they need."""

import contextlib
import io
import runpy
import sys
from pathlib import Path

import pytest

__all__ = ["ROOT", "output_of"]

ROOT = Path(__file__).resolve().parents[2]


def output_of(script: str, *arguments: str | Path) -> str:
    """What `python SCRIPT ARGUMENTS` prints, from the root of the repository."""
    file, text = ROOT / script, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        patch.chdir(ROOT)
        patch.syspath_prepend(file.parent)
        patch.setattr(sys, "argv", [str(file), *map(str, arguments)])
        runpy.run_path(str(file), run_name="__main__")
    return text.getvalue()
