"""The page is one valid, inert, self-contained document, whatever the run holds."""

import base64
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlstab.errors import RecordError
from rlstab.record import RunFolder
from rlstab.report import write_report

VOID = {"meta", "img", "source", "br"}


class Document(HTMLParser):
    """Elements, attributes and text of a page; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def document(folder: RunFolder) -> Document:
    return Document(write_report(folder).read_text("utf-8"))


def test_full_run(full_run: RunFolder) -> None:
    file = write_report(full_run)
    assert file == full_run.path / "report.html"
    page = Document(file.read_text("utf-8"))
    for expected in (
        "pass@1 on held-out prompts rose from 45.3 % to 92.7 %",
        "not clear",
        "503912=",
        "after, step 100 · reward 1",
        "reached: 57",
        "hub_token: <redacted>",
        "mean(ρ − 1 − Δ), estimates KL(sampler‖trainer)",
        "unit nats/token · lower is better",
        "a metric of the user's own · last 1",
    ):
        assert expected in page.text, expected
    assert "What is missing" not in page.text
    assert page.seen.count("picture") == 4


def test_page_is_self_contained_and_inert(full_run: RunFolder) -> None:
    text = write_report(full_run).read_text("utf-8")
    page = Document(text)
    assert not {"script", "link", "iframe", "object", "form", "a"} & set(page.seen)
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "href"]
    sources = [value for _, name, value in page.attributes if name in ("src", "srcset")]
    assert len(sources) == 8
    for source in sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            image.verify()
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes
    assert not re.search(r"url\(|@import", text)


def test_empty_run_says_what_is_missing(empty_run: RunFolder) -> None:
    page = document(empty_run)
    assert "Whether training helped cannot be said" in page.text
    assert "Plots: no step of training was logged." in page.text
    assert "img" not in page.seen
    assert "seed: 0" in page.text


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&lt;"
    folder = RunFolder.create(tmp_path / "<b>run", config_text=f"name: |\n  {evil}\n")
    folder.append_metrics(1, {evil: 1.0, "train/reward": 0.5})
    folder.append_event(evil, step=1, **{evil: {evil: [evil]}})
    folder.append_event("signal_skipped", signal="drift/initial/kl", reason=evil)
    folder.append_rollouts(1, [{"prompt": evil, "completion": evil, "reward": 1.0, "phase": evil}])
    page = document(folder)
    assert "script" not in page.seen
    assert "b" not in page.seen
    assert page.text.count("<script>alert(1)</script>") >= 8


def test_samples_pair_prompts_and_shorten(empty_run: RunFolder) -> None:
    empty_run.append_rollouts(1, [{"prompt": "only first", "completion": "x"}, {"prompt": "both", "completion": "was"}])
    chat = [{"role": "user", "content": "hé"}]
    last: list[dict[str, object]] = [
        {"prompt": "both", "completion": "y" * 3000},
        {"prompt": chat, "completion": chat, "reward": None},
    ]
    empty_run.append_rollouts(9, last)
    text = document(empty_run).text
    assert re.search(r"promptboth.*step 1was.*step 9yyy", text)
    assert text.index("promptboth") < text.index("promptonly first")
    assert "y" * 2000 + "… [1000 more characters]" in text
    assert '[{"role": "user", "content": "hé"}]' in text


def test_completions_of_the_evaluations_come_before_those_of_training(full_run: RunFolder) -> None:
    full_run.append_rollouts(100, [{"prompt": "503912=", "completion": "trained", "rewards": {"exact": 0.5}}])
    assert "trained" not in document(full_run).text


def test_completions_of_training_show_each_reward(empty_run: RunFolder) -> None:
    empty_run.append_rollouts(
        1, [{"prompt": "p", "completion": "c", "rewards": {"exact": 0.5, "format": 1, "x": None}}]
    )
    assert "completion, step 1 · exact 0.5 · format 1c" in document(empty_run).text


def test_one_recorded_step_is_shown_once(empty_run: RunFolder) -> None:
    empty_run.append_rollouts(4, [{"prompt": "p", "completion": "c", "reward": 0.5}])
    assert document(empty_run).text.count("completion, step 4 · reward 0.5") == 1


def test_many_events_are_cut_to_the_last(empty_run: RunFolder) -> None:
    for index in range(230):
        empty_run.append_event("note", number=index)
    text = document(empty_run).text
    assert "The last 200 of 230." in text
    assert "number: 29," not in text
    assert "number: 30" in text
    assert "number: 229" in text


def test_values_that_are_not_finite_are_shown(empty_run: RunFolder) -> None:
    empty_run.append_metrics(1, {"train/reward": float("nan"), "train/grad_norm": float("inf")})
    empty_run.append_event("evaluation", step=0, phase="before", values={"eval/kl": float("nan")})
    text = document(empty_run).text
    assert "last inf" in text
    assert "last nan" in text


def test_unwritable_report_is_reported(empty_run: RunFolder) -> None:
    empty_run.report.mkdir()
    with pytest.raises(RecordError, match=r"cannot write .*report\.html: Is a directory"):
        write_report(empty_run)


def test_report_needs_neither_torch_nor_trl() -> None:
    script = (
        "import sys, rlstab.report; print([name for name in ('torch', 'trl', 'transformers') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"


@pytest.fixture(scope="module")
def screenshot(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, bool], np.ndarray]:
    """Open a page in a browser, offline, and return what it looks like."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium or google-chrome")
    target = tmp_path_factory.mktemp("browser")

    def take(page: Path, dark: bool) -> np.ndarray:
        image = target / "page.png"
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--window-size=500,1600",
        ]
        command += [
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--user-data-dir={target / 'profile'}",
        ]
        subprocess.run([*command, f"--screenshot={image}", page.as_uri()], check=True, capture_output=True, timeout=120)
        with Image.open(image) as opened:
            return np.asarray(opened.convert("RGB"), dtype=float)

    return take


@pytest.mark.slow
def test_page_follows_light_and_dark(full_run: RunFolder, screenshot: Callable[[Path, bool], np.ndarray]) -> None:
    page = write_report(full_run).resolve()
    light, dark = screenshot(page, False), screenshot(page, True)
    assert light.shape == dark.shape
    assert light.mean() > 200
    assert dark.mean() < 60
    plots = slice(1000, 1600)
    assert light[plots].std() > 10
    assert dark[plots].std() > 10
