"""Plots show what was recorded, whatever it is, and leave out what was not."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from rlstab.errors import RecordError
from rlstab.record import Run, RunFolder
from rlstab.report import write_plots
from rlstab.report._plots import PLOTS, smooth
from rlstab.report._style import DARK, LIGHT, spread

WriteSeries = Callable[[RunFolder, dict[str, list[float]]], RunFolder]


def draw(folder: RunFolder, name: str) -> Figure:
    figure = next(plot for plot in PLOTS if plot.name == name).draw(Run.of(folder), LIGHT)
    figure.draw_without_rendering()
    return figure


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def ticks(figure: Figure) -> list[str]:
    return [tick.get_text() for tick in figure.axes[0].get_yticklabels()]


def line(figure: Figure, index: int) -> tuple[list[float], list[float]]:
    x, y = figure.axes[0].lines[index].get_data()
    return list(np.asarray(x, dtype=float)), list(np.asarray(y, dtype=float))


def test_full_run_has_all_plots(full_run: RunFolder) -> None:
    files = write_plots(full_run)
    names = ["reward", "kl_drift", "mismatch", "mismatch_by_probability", "entropy"]
    assert [file.stem for file in files] == names
    for file in files:
        assert file.parent == full_run.path / "plots"
        with Image.open(file) as image:
            assert image.size == (1152, 640)
            assert np.asarray(image.convert("RGB")).std() > 10


def test_only_what_was_logged_is_drawn(empty_run: RunFolder, run_of: WriteSeries) -> None:
    assert write_plots(empty_run) == []
    run_of(empty_run, {"train/entropy": [1.0, 0.9]})
    assert [file.name for file in write_plots(empty_run)] == ["entropy.png"]


def test_unwritable_plot_is_reported(full_run: RunFolder) -> None:
    (full_run.plots / "reward.png").mkdir()
    with pytest.raises(RecordError, match=r"cannot write .*reward\.png: Is a directory"):
        write_plots(full_run)


def test_reward_shows_values_their_mean_and_the_evaluations(full_run: RunFolder) -> None:
    figure = draw(full_run, "reward")
    steps, values = full_run.metrics().series("train/reward")
    assert line(figure, 0) == (steps.tolist(), values.tolist())
    assert line(figure, 1)[1] == pytest.approx(smooth(values, 5).tolist())
    assert line(figure, 2) == ([0, 100], [0.453, 0.927])
    assert {"training", "held-out ± 2 s.e.", "resumed"} <= set(texts(figure))
    assert figure.axes[0].get_ylabel() == "reward"
    assert figure.axes[0].get_xlabel() == "optimizer step (thick: mean over 5 values)"


def test_evaluations_during_training_are_shown_too(empty_run: RunFolder, run_of: WriteSeries) -> None:
    run_of(empty_run, {"train/reward": [0.1, 0.2, 0.3], "eval/reward": [0.15]})
    empty_run.append_event("evaluation", step=3, phase="after", values={"eval/reward": 0.4})
    figure = draw(empty_run, "reward")
    assert line(figure, 1) == ([1, 3], [0.15, 0.4])
    assert "held-out" in texts(figure)


def test_drift_band_is_two_standard_errors(empty_run: RunFolder) -> None:
    empty_run.append_metrics(10, {"drift/initial/kl": 1.0, "drift/initial/kl_se": 0.25})
    empty_run.append_metrics(20, {"drift/initial/kl": 2.0, "drift/initial/kl_se": 1.5, "drift/moving/kl": 0.5})
    figure = draw(empty_run, "kl_drift")
    corners = figure.axes[0].collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in np.asarray(corners).tolist()} == {(10, 0.5), (10, 1.5), (20, 0), (20, 5)}
    assert line(figure, 0) == ([10, 20], [1, 2])
    assert line(figure, 1) == ([20], [0.5])
    assert {"to the start", "to moving"} <= set(texts(figure))
    assert figure.axes[0].get_ylabel() == "KL, nats/token"


def test_mismatch_has_a_log_axis_on_which_zero_has_a_place(empty_run: RunFolder, run_of: WriteSeries) -> None:
    run_of(empty_run, {"mismatch/k3": [0.0, 2e-5, 3e-3], "mismatch/k1": [-1e-4, 0.0, 1e-3]})
    figure = draw(empty_run, "mismatch")
    assert figure.axes[0].get_yscale() == "log"
    assert line(figure, 0)[1] == pytest.approx([1e-4, 1e-6, 1e-3])
    assert line(figure, 1)[1] == pytest.approx([1e-6, 2e-5, 3e-3])
    assert ticks(figure)[figure.axes[0].get_yticks().tolist().index(pytest.approx(1e-6))] == "0"


def test_mismatch_without_zeros_has_no_zero_on_its_axis(empty_run: RunFolder, run_of: WriteSeries) -> None:
    run_of(empty_run, {"mismatch/k3": [2e-5, 3e-3]})
    assert "0" not in ticks(draw(empty_run, "mismatch"))


def test_exact_agreement_is_said(empty_run: RunFolder, run_of: WriteSeries) -> None:
    run_of(empty_run, {"mismatch/k3": [0.0, 0.0]})
    assert "no difference at any step" in texts(draw(empty_run, "mismatch"))


@pytest.mark.parametrize("name", [plot.name for plot in PLOTS if plot.name != "mismatch_by_probability"])
@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [0.0],
        [float("nan")],
        [float("inf"), float("-inf"), float("nan")],
        [float("nan"), 1.0, float("inf"), 2.0],
        [1e-310, 1.0],
        [1e308, 1.0, -1e308],
        [1e-3] * 700,
    ],
)
def test_any_values_can_be_drawn(empty_run: RunFolder, run_of: WriteSeries, name: str, values: list[float]) -> None:
    plot = next(plot for plot in PLOTS if plot.name == name)
    run_of(empty_run, dict.fromkeys(plot.keys, values))
    shown = texts(draw(empty_run, name))
    assert ("not a number" in "".join(shown)) == bool(np.isnan(values).any())
    assert ("infinite" in "".join(shown)) == bool((np.abs(values) > 1e200).any())


@pytest.mark.parametrize("values", [[0.0], [1e-310, 1.0], [math.inf, 1.0], [math.inf, math.nan]])
def test_buckets_can_be_drawn_from_any_values(empty_run: RunFolder, run_of: WriteSeries, values: list[float]) -> None:
    place = "mismatch/bucket/0.5-1"
    run_of(empty_run, {f"{place}/share": [1.0] * len(values), f"{place}/mean_abs": values, f"{place}/k3": values})
    none = "no finite difference at any step" in texts(draw(empty_run, "mismatch_by_probability"))
    assert none == (not np.isfinite(values).any())


def test_palettes_change_colours_only(full_run: RunFolder) -> None:
    plot, run = PLOTS[0], Run.of(full_run)
    light, dark = plot.draw(run, LIGHT), plot.draw(run, DARK)
    assert light.get_facecolor() != dark.get_facecolor()
    assert line(light, 1) == line(dark, 1)
    assert texts(light) == texts(dark)


def test_smoothing_leaves_out_what_is_not_finite() -> None:
    values = np.array([1.0, np.inf, 3.0, np.nan, np.nan, np.nan, 5.0])
    assert smooth(values, 1).tolist()[:1] == [1.0]
    assert np.array_equal(smooth(values, 3), [1, 2, 3, 3, np.nan, 5, 5], equal_nan=True)
    assert smooth(np.ones(3), 10).tolist() == [1, 1, 1]


@given(st.lists(st.floats(0, 1), max_size=6).map(sorted))
def test_labels_never_overlap_and_keep_their_order(heights: list[float]) -> None:
    moved = spread(heights, 0.1)
    assert len(moved) == len(heights)
    assert all(after - before >= 0.1 - 1e-9 for before, after in pairwise(moved))
    if all(after - before >= 0.1 for before, after in pairwise(heights)):
        assert moved == pytest.approx(heights)
    if heights:
        assert np.mean(moved) == pytest.approx(np.mean(heights))
