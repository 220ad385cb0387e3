"""Worked examples of detectors, probes and optimizers (`moe_monitors_optim.json`), and which of them are claimed."""

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "vectors" / "moe_monitors_optim.json"
WHOLE: dict[str, Any] = json.loads(FILE.read_text())

CLAIMED = {
    "detectors": "tests/monitors/test_charts.py",
    "mismatch": "tests/monitors/test_mismatch_vectors.py",
    "attention_entropy": "tests/probes/test_attention.py",
    "spectral_alignment": "tests/probes/test_spectral.py",
    "zclip": "tests/optim/test_zclip.py",
    "stable_spam": "tests/optim/test_spam.py",
    "spam": "tests/optim/test_spam.py",
}


def vector(name: str) -> dict[str, Any]:
    """The worked example of one area."""
    found: dict[str, Any] = WHOLE[name]
    return found
