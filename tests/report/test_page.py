"""The page is one valid, inert, self-contained document, whatever the run holds."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlstab.errors import ConfigError, RecordError
from rlstab.record import Run, RunFolder
from rlstab.report import show, write_page, write_report
from rlstab.report._compare import paired
from rlstab.report._curves import CURVES
from rlstab.report._run import known

WriteSeries = Callable[[RunFolder, dict[str, list[float]]], RunFolder]

VOID = {"meta", "br"}


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
        if not {"style", "script"} & set(self.open):
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
    assert page.seen.count("svg") == 9
    assert page.text.index("healthy") < page.text.index("pass@1 on held-out prompts")


def test_page_is_self_contained_and_its_policy_names_what_runs(full_run: RunFolder) -> None:
    text = write_report(full_run).read_text("utf-8")
    page = Document(text)
    assert page.seen.count("script") == page.seen.count("style") == 1
    assert not {"link", "iframe", "object", "form", "a", "img"} & set(page.seen)
    forbidden = ("href", "src", "srcset", "style", "xlink:href")
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name in forbidden]
    (policy,) = [value for tag, name, value in page.attributes if (tag, name) == ("meta", "content") and "src" in value]
    hashes = {kind: sha256(re.findall(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL)[0]) for kind in ("style", "script")}
    assert policy == (
        f"default-src 'none'; style-src '{hashes['style']}'; script-src '{hashes['script']}'; "
        "base-uri 'none'; form-action 'none'"
    )
    assert not re.search(r"url\(|@import|fetch|eval\(|innerHTML", text)


def sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_the_script_is_the_same_for_every_run(full_run: RunFolder, empty_run: RunFolder) -> None:
    scripts = {re.findall("<script>.*</script>", page_text(run), re.DOTALL)[0] for run in (full_run, empty_run)}
    assert len(scripts) == 1


def page_text(folder: RunFolder) -> str:
    return write_report(folder).read_text("utf-8")


def test_empty_run_says_what_is_missing(empty_run: RunFolder) -> None:
    page = document(empty_run)
    assert "Whether training helped cannot be said" in page.text
    assert "Plots: no step of training was logged." in page.text
    assert "svg" not in page.seen
    assert "seed: 0" in page.text


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&lt;"
    folder = RunFolder.create(tmp_path / "<i>run", config_text=f"name: |\n  {evil}\n")
    folder.append_metrics(1, {evil: 1.0, "train/reward": 0.5})
    folder.append_event(evil, step=1, **{evil: {evil: [evil]}})
    folder.append_event("signal_skipped", signal="drift/initial/kl", reason=evil)
    folder.append_rollouts(1, [{"prompt": evil, "completion": evil, "reward": 1.0, "phase": evil}])
    page = document(folder)
    assert page.seen.count("script") == 1
    assert "i" not in page.seen
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


def test_a_link_is_replaced_and_what_it_points_to_is_left_alone(empty_run: RunFolder, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.html"
    elsewhere.write_text("mine")
    empty_run.report.symlink_to(elsewhere)
    write_report(empty_run)
    assert elsewhere.read_text() == "mine"
    assert not empty_run.report.is_symlink()


def test_ten_thousand_steps_make_a_small_page_in_little_time(empty_run: RunFolder) -> None:
    rng = np.random.default_rng(0)
    keys = [signal.key for curves in CURVES for signal in map(known, dict(curves.signals)) if signal is not None]
    keys += [f"objective/{term}/{part}" for term in "abcdef" for part in ("loss", "weight", "clip")]
    with (empty_run.path / "metrics.jsonl").open("w") as file:
        for step in range(10_000):
            row = {"step": step, "time": 1.0 + step, "attempt": 0}
            file.write(json.dumps(row | dict(zip(keys, rng.random(len(keys)).tolist(), strict=True))) + "\n")
    for _ in range(300):
        empty_run.append_event("alarm", step=100, message="x" * 300)
    empty_run.append_rollouts(1, [{"prompt": str(index), "completion": "y" * 19_000} for index in range(64)])
    start = time.process_time()
    file_ = write_report(empty_run)
    assert time.process_time() - start < 3
    assert file_.stat().st_size < 5e6


def test_what_was_diagnosed_stands_first_and_is_marked(empty_run: RunFolder, run_of: WriteSeries) -> None:
    run_of(empty_run, {"train/reward": [0.5] * 20, "train/grad_norm": [1.0] * 19 + [float("nan")]})
    empty_run.append_event("alarm", step=12, message="step 12: <warning>", change="opened")
    empty_run.append_event("alarm", step=14, message="over", change="cleared")
    page = document(empty_run)
    assert page.text.index("collapsed: a number became nan or infinite") < page.text.index("What is the cause")
    for expected in ("born in the backward pass", "1 step 12 alarm", "2 step 20 A number became NaN", "not looked at"):
        assert expected.lower() in page.text.lower().replace("step 12 <warning>", "step 12 alarm"), expected
    marks = [value for tag, name, value in page.attributes if (tag, name) == ("g", "class") and "mark" in value]
    assert marks.count("mark alarm") == 2
    assert marks.count("mark cause") == 2


def test_several_runs_are_compared_step_by_step(tmp_path: Path, run_of: WriteSeries) -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=40)
    runs = []
    for name, gain in (("a", 0.0), ("b", 0.25)):
        folder = RunFolder.create(tmp_path / name, config_text="seed: 0")
        noise = 0.01 * rng.normal(size=40)
        runs.append(Run.of(run_of(folder, {"train/reward": (base + gain + noise).tolist()})))
    found = paired(runs[0], runs[1], "train/reward")
    assert found is not None
    assert found.mean == pytest.approx(0.25, abs=0.01)
    assert found.error < 0.01
    page = Document(write_page(runs, tmp_path / "both.html").read_text("utf-8"))
    assert "comparison of 2 runs with a" in page.text
    assert re.search(r"\+0\.2[45]\d* ± 0\.00", page.text)
    assert paired(runs[0], runs[1], "policy/entropy") is None


def test_a_page_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one run, got none"):
        write_page([], tmp_path / "a.html")


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(full_run: RunFolder) -> None:
    shown = show(full_run)
    frame = HTMLParser()
    sources: list[str] = []
    frame.handle_starttag = lambda tag, attrs: sources.append(dict(attrs)["srcdoc"] or "")  # type: ignore[method-assign]
    frame.feed(shown._repr_html_())
    assert sources == [shown.html]


class Browser:
    """Headless Chromium: what a page looks like, what its elements say, and what went wrong."""

    def __init__(self, command: str, place: Path) -> None:
        self._command = [command, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        self._command += [f"--user-data-dir={place / 'profile'}", "--enable-logging=stderr", "--v=0"]
        self._place = place

    def _run(self, *words: str) -> tuple[str, list[str]]:
        done = subprocess.run([*self._command, *words], check=True, capture_output=True, text=True, timeout=120)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    def look(self, page: Path, *, dark: bool, width: int = 500) -> tuple[np.ndarray, list[str]]:
        image = self._place / "page.png"
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        _, said = self._run(f"--window-size={width},1600", scheme, f"--screenshot={image}", page.as_uri())
        with Image.open(image) as opened:
            return np.asarray(opened.convert("RGB"), dtype=float), said

    def after(self, page: Path, script: str) -> tuple[str, list[str]]:
        """The document after a script of the test, which is let through the policy by its hash."""
        text = page.read_text("utf-8").replace("script-src ", f"script-src &#x27;{sha256(script)}&#x27; ")
        changed = self._place / "changed.html"
        changed.write_text(text.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
        return self._run("--dump-dom", changed.as_uri())


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    command = shutil.which("chromium") or shutil.which("google-chrome")
    if command is None:
        pytest.skip("needs chromium or google-chrome")
    return Browser(command, tmp_path_factory.mktemp("browser"))


@pytest.mark.slow
def test_page_follows_light_and_dark_without_a_complaint(full_run: RunFolder, browser: Browser) -> None:
    page = write_report(full_run).resolve()
    (light, said), (dark, also) = browser.look(page, dark=False), browser.look(page, dark=True)
    assert said == also == []
    assert light.shape == dark.shape
    assert light.mean() > 200
    assert dark.mean() < 60
    charts = slice(900, 1600)
    assert light[charts].std() > 10
    assert dark[charts].std() > 10


HOVER = """
const chart = document.querySelector("svg.chart"), box = chart.getBoundingClientRect();
const x = box.left + box.width * (58 + 0.5 * 570) / 640;
chart.dispatchEvent(new PointerEvent("pointermove", { clientX: x, clientY: box.top + 5 }));
"""


@pytest.mark.slow
def test_the_pointer_tells_values(full_run: RunFolder, browser: Browser) -> None:
    dom, said = browser.after(write_report(full_run).resolve(), HOVER)
    assert said == []
    reward = full_run.metrics().series("train/reward")
    shown = f"{reward.values[reward.steps.tolist().index(50)]:.4g}"
    legend = re.findall(r'<ul class="legend">.*?</ul>', dom, re.DOTALL)[0]
    assert f"<output>{shown}</output>" in legend
    assert re.search(r'class="at shown">step <output>50</output>', legend)


@pytest.mark.slow
def test_nothing_that_a_run_holds_is_run(tmp_path: Path, browser: Browser) -> None:
    evil = "</pre></svg><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    folder = RunFolder.create(tmp_path / "evil", config_text=json.dumps({"name": evil}))
    folder.append_metrics(1, {"train/reward": 1.0, f"objective/{evil.replace('/', '')}/loss": 1.0})
    folder.append_event("alarm", step=1, message=evil)
    folder.append_rollouts(1, [{"prompt": evil, "completion": evil}])
    dom, _ = browser.after(write_report(folder).resolve(), "document.body.dataset.title = document.title;")
    assert 'data-title="evil · rlstab"' in dom
