"""The live view: what it shows, at 80 × 24, without drawing what has not changed, whatever a run holds."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlstab.cli import main
from rlstab.record import Run, RunFolder
from rlstab.report._live_view import QUIET, Source, View, bars, view

WriteSeries = Callable[[RunFolder, dict[str, list[float]]], RunFolder]

needs_textual = pytest.mark.skipif(find_spec("textual") is None, reason="needs textual (the extra watch)")


def test_a_view_of_a_full_run(full_run: RunFolder) -> None:
    shown = view(Run.of(full_run), now=0.0)
    assert shown.title == "sort-digits · step 100 · finished"
    assert shown.state == "healthy"
    names = [row.name for row in shown.rows]
    assert names == ["reward", "drift (KL)", "mismatch k3", "entropy", "grad norm"]
    reward = full_run.metrics().series("train/reward").values
    assert shown.rows[0].value == f"{reward[-1]:.4g}"
    assert len(shown.rows[0].bars) == 24
    assert shown.events[-1].split() == ["100", "finished"]
    assert shown.samples[-1].split() == ["100", "662219=", "→", "122669", "1.0"]


def test_a_run_that_goes_on_a_quiet_one_and_one_without_a_step(empty_run: RunFolder, run_of: WriteSeries) -> None:
    assert view(Run.of(empty_run), now=0.0).title == "empty · step – · waiting for the first step"
    run = Run.of(run_of(empty_run, {"train/reward": [0.5]}))
    last = run.times[-1]
    assert view(run, now=last + QUIET / 2).title.endswith("running")
    assert view(run, now=last + 5 * 60).title.endswith("quiet for 5 min")


def test_a_cause_stands_at_the_top(empty_run: RunFolder, run_of: WriteSeries) -> None:
    run_of(empty_run, {"train/reward": [0.5] * 12, "train/loss": [0.1] * 11 + [float("nan")]})
    shown = view(Run.of(empty_run), now=0.0)
    assert shown.state == "collapsed"
    assert shown.cause.startswith("A number became NaN or infinite: at step 12 these were not finite: train/loss")


def test_nothing_that_a_run_holds_moves_the_cursor(empty_run: RunFolder) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07\r\n\tx\u202e"
    empty_run.append_event("alarm", step=1, message=evil)
    empty_run.append_event("note", step=1, a=evil)
    empty_run.append_rollouts(1, [{"prompt": evil, "completion": [{"role": evil}], "reward": 1.0}])
    shown = view(Run.of(empty_run), now=0.0)
    assert all(line.isprintable() for line in (*shown.events, *shown.samples))


@pytest.mark.parametrize(
    ("values", "drawn"),
    [([], ""), ([1.0], "▁"), ([2.0, 2.0], "▁▁"), ([0.0, float("inf"), 7.0], "▁×█"), ([float("nan")], "×")],
)
def test_bars(values: list[float], drawn: str) -> None:
    assert bars(np.array(values), 8) == drawn


def test_a_long_course_is_drawn_in_few_characters() -> None:
    assert len(bars(np.linspace(0.0, 1.0, 10_000), 30)) == 30
    assert bars(np.array([1e308, -1e308, np.inf]), 9) == "█▁×"


def test_a_folder_is_read_when_it_has_grown(empty_run: RunFolder) -> None:
    source = Source(empty_run)
    assert source.latest(force=True) is not None
    assert source.latest() is None
    empty_run.append_metrics(1, {"train/reward": 0.5})
    os.utime(empty_run.path / "metrics.jsonl", (1, 1))
    source._rest_until = 0.0
    found = source.latest()
    assert found is not None
    assert found.last_step == 1


def test_without_textual_the_remedy_is_named(full_run: RunFolder) -> None:
    code = (
        "import sys; sys.modules['textual'] = None\n"
        "from importlib import util; util.find_spec = lambda name: None\n"
        "from rlstab.cli import main; print(main(['watch', sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(full_run.path)], capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"
    assert "pip install 'rlstab[watch]'" in done.stderr


def test_watch_wants_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path / "gone")]) == 2
    assert "no run folder at" in capsys.readouterr().err


def on_screen(folder: RunFolder, act: Callable[[Any, Any], Any], size: tuple[int, int] = (80, 24)) -> list[str]:
    """The lines of the screen after something was done, and how often it was drawn, as the app counts."""
    from rlstab.report._textual_app import LiveView

    async def run() -> list[str]:
        app = LiveView(folder)
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await act(app, pilot)
            await pilot.pause()
            strips = app.screen._compositor.render_strips()
            return ["".join(segment.text for segment in strip) for strip in strips]

    return asyncio.run(run())


async def nothing(app: Any, pilot: Any) -> None:
    pass


@needs_textual
@pytest.mark.parametrize("size", [(80, 24), (60, 16), (200, 60)])
def test_it_fits_the_terminal(full_run: RunFolder, size: tuple[int, int]) -> None:
    lines = on_screen(full_run, nothing, size)
    assert len(lines) == size[1]
    assert {len(line) for line in lines} == {size[0]}
    text = "\n".join(lines)
    for expected in ("sort-digits · step 100 · finished", "healthy", "reward", "mismatch k3", "quit"):
        assert expected in text, expected
    if size[1] >= 24:
        assert "finished" in text.split("events")[1]
        assert "→" in text.split("samples")[1]


@needs_textual
def test_it_follows_a_run_and_draws_only_what_is_new(empty_run: RunFolder, run_of: WriteSeries) -> None:
    drawn: list[str] = []

    async def act(app: Any, pilot: Any) -> None:
        draw = app._draw

        def counted(now: View) -> None:
            drawn.append(now.title)
            draw(now)

        app._draw = counted
        for _ in range(5):
            app.look()
        run_of(empty_run, {"train/reward": [0.25, 0.75]})
        app._source._rest_until = 0.0
        app.look()
        app.look()
        await pilot.press("space")
        empty_run.append_metrics(3, {"train/reward": 0.5})
        app._source._rest_until = 0.0
        app.look()

    lines = on_screen(empty_run, act)
    assert len(drawn) == 1
    assert "step 2 · running" in lines[0]
    assert any("events (paused)" in line for line in lines)


@needs_textual
def test_q_ends_it(full_run: RunFolder) -> None:
    ended: list[bool] = []

    async def act(app: Any, pilot: Any) -> None:
        await pilot.press("q")
        await pilot.pause()
        ended.append(app._exit)

    on_screen(full_run, act)
    assert ended == [True]
