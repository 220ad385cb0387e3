"""`rlstab diagnose` and `rlstab report` from the command line: exit codes, JSON, fixed recipes, pages."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlstab.cli import main
from rlstab.recipes import read_recipe
from rlstab.record import Run, RunFolder
from rlstab.report._live_view import view

RECORDED = Path(__file__).resolve().parents[1] / "monitors/recorded"
WriteSeries = Callable[[RunFolder, dict[str, list[float]]], RunFolder]


def folder_of(name: str, place: Path) -> RunFolder:
    """A recorded run as the folder that it was."""
    folder = RunFolder.create(place / name, config_text=(RECORDED / f"{name}.yaml").read_text())
    header, *lines = (RECORDED / f"{name}.csv").read_text().splitlines()
    for line in lines:
        row = dict(zip(header.split(","), line.split(","), strict=True))
        step = int(row.pop("step"))
        folder.append_metrics(step, {key: float(value) for key, value in row.items() if value})
    return folder


@pytest.mark.parametrize(("name", "code"), [("healthy", 0), ("truncated_sampling", 1), ("learning_rate", 2)])
def test_the_exit_code_says_how_the_run_is(name: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(RECORDED / f"{name}.csv")]) == code
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{name}: {('healthy', 'warning', 'collapsed')[code]}" in shown
    assert ("1. " in shown) == (code > 0)


def test_what_cannot_be_read_is_an_exit_code_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(tmp_path / "gone")]) == 3
    assert capsys.readouterr().err.startswith("rlstab: there is no ")
    (tmp_path / "config.yaml").write_text("seed: 0")
    (tmp_path / "metrics.jsonl").mkdir()
    assert main(["diagnose", str(tmp_path)]) == 3


def test_a_run_without_a_known_signal_is_not_called_healthy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunFolder.create(tmp_path / "run", config_text="seed: 0")
    assert main(["diagnose", str(tmp_path / "run")]) == 3
    assert "holds no signal that could be diagnosed: wait for the first step" in capsys.readouterr().err
    (tmp_path / "a.csv").write_text("it,score\n1,0.5\n")
    assert main(["diagnose", str(tmp_path / "a.csv")]) == 3
    assert "--columns '{train/reward: NAME}'" in capsys.readouterr().err


def test_what_a_run_says_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07\nhello"
    run = RunFolder.create(tmp_path / "run", config_text="seed: 0")
    for step in range(60):
        run.append_metrics(step, {"train/reward": 0.9 if step < 30 else 0.0, f"rewards/{evil}/mean": 1.0})
    run.append_event("alarm", step=3, message=evil)
    run.append_event(evil, step=4)
    assert main(["diagnose", str(run.path)]) == 2
    shown = capsys.readouterr().out
    assert "[2J]0;owned hello" in shown
    assert not set("\x1b\x07") & set(shown)
    assert "\x1b" not in str(view(Run.of(run), now=0.0))


def test_what_would_never_end_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder.create(tmp_path / "run", config_text="seed: 0")
    os.mkfifo(run.path / "metrics.jsonl")
    assert main(["diagnose", str(run.path)]) == 3
    assert "metrics.jsonl: it is no file" in capsys.readouterr().err


def test_json_holds_everything_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(RECORDED / "staleness.csv"), "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert (said["run"], said["source"], said["state"], said["exit_code"]) == ("staleness", "CSV", "collapsed", 2)
    assert said["claims"][0]["name"] == "staleness"
    assert said["claims"][0]["evidence"]
    assert {"since", "says"} == set(said["harm"][0])


def test_columns_name_what_a_table_calls_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text(
        "it,score\n" + "".join(f"{step},{0.9 if step < 30 else 0.0}\n" for step in range(60))
    )
    assert main(["diagnose", str(tmp_path / "a.csv"), "--columns", "{step: it, train/reward: score}"]) == 2
    assert "the mean reward of 10 steps fell from 0.9" in " ".join(capsys.readouterr().out.split())
    assert main(["diagnose", str(tmp_path / "a.csv"), "--columns", "{train/reward: gone}"]) == 3


@pytest.mark.parametrize(
    "name",
    [
        "staleness",
        "learning_rate",
        "gradient_spike",
        "entropy",
        "diversity",
        "saturated",
        "too_hard",
        "reference_drift",
    ],
)
def test_a_fixed_recipe_is_a_recipe(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, target = folder_of(name, tmp_path), tmp_path / "fixed.yaml"
    assert main(["diagnose", str(folder.path), "--fix", str(target)]) in (1, 2)
    assert "fixed.yaml: " in capsys.readouterr().err
    fixed = read_recipe(str(target)).recipe
    assert fixed.output != folder.path
    assert target.read_text() != folder.config_text()


def test_a_fix_never_overwrites_and_needs_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, target = folder_of("learning_rate", tmp_path), tmp_path / "fixed.yaml"
    target.write_text("mine")
    assert main(["diagnose", str(folder.path), "--fix", str(target)]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert main(["diagnose", str(RECORDED / "learning_rate.csv"), "--fix", str(tmp_path / "b.yaml")]) == 2
    assert "has no recipe to change" in capsys.readouterr().err
    healthy = folder_of("healthy", tmp_path)
    assert main(["diagnose", str(healthy.path), "--fix", str(tmp_path / "c.yaml")]) == 0
    assert "nothing to change" in capsys.readouterr().err
    assert not (tmp_path / "c.yaml").exists()


def test_report_compares_runs_of_any_origin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "both.html"
    words = [str(RECORDED / "healthy.csv"), str(RECORDED / "staleness.csv"), "--output", str(page)]
    assert main(["report", *words]) == 0
    assert f"report: {page}" in capsys.readouterr().out
    text = page.read_text("utf-8")
    assert "How the runs differ" in text
    assert text.count('<p class="state') == 2
