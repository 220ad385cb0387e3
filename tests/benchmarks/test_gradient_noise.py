"""The benchmark of gradient noise runs, its two forms agree in the mean, and it writes figures and a plot."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from running import output_of


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where figures and plot of a short run are."""
    folder = tmp_path_factory.mktemp("benchmark")
    files: list[str | Path] = ["--json", folder / "figures.json", "--plot", folder / "plot.png"]
    sizes = ["--batches", "5", "--seeds", "1", "--updates", "5", "--warm-up", "20"]
    assert "updates to 25% of the start" in output_of("benchmarks/gradient_noise.py", *files, *sizes)
    return folder


def test_the_exact_gradient_varies_less_around_the_same_mean(output: Path) -> None:
    figures: dict[str, Any] = json.loads((output / "figures.json").read_text())
    assert set(figures["noise"]) == {"reverse KL", "JSD", "forward KL"}
    for rows in figures["noise"].values():
        assert len(rows) == 5
        for row in rows:
            assert row["ratio"] == pytest.approx(row["sampled"] / row["exact"])
            assert row["bias in standard errors"] < 2
        assert sorted(row["ratio"] for row in rows)[2] > 1.2


def test_every_descent_begins_at_the_same_distance(output: Path) -> None:
    found: dict[str, Any] = json.loads((output / "figures.json").read_text())["descent"]
    for name in ("reverse KL", "forward KL"):
        curves = [found[f"{name}, {form}"]["curves"][0] for form in ("sampled", "exact")]
        assert [len(curve) for curve in curves] == [2, 2]
        assert curves[0][0] == pytest.approx(curves[1][0], rel=0.5)
        assert min(curves[1]) < curves[1][0]


def test_the_plot_has_a_picture_in_it(output: Path) -> None:
    with Image.open(output / "plot.png") as image:
        assert image.width > 1000
        colours = image.convert("RGB").resize((64, 32)).getcolors(64 * 32)
    assert len(colours or []) > 20
