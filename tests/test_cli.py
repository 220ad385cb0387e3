"""The command line: fast help, what it lists, exit codes, and one line for each mistake."""

import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from rlstab import __version__, losses
from rlstab.cli import main
from rlstab.losses import presets
from rlstab.recipes import Recipe
from rlstab.record import RunFolder

RECIPE = "model: TinyModel\ntask: SortDigits\ntrainer: {max_steps: 1, bf16: false}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def fresh(words: list[str], absent: list[str]) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which then says which modules it has imported of those in `absent`."""
    code = (
        "import sys; from rlstab.cli import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as stop: code = stop.code\n"
        f"print('imported:', [name for name in {absent} if name in sys.modules], code)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "100"},
    )


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"], []])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    done = fresh(words, ["torch", "transformers", "trl", "matplotlib"])
    assert done.stdout.endswith("imported: [] 0\n")
    assert done.stderr == ""


def test_methods_needs_no_trainer() -> None:
    assert fresh(["methods"], ["trl", "vllm", "transformers"]).stdout.endswith("imported: [] 0\n")


def output(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def exits(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_names_the_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    text = exits(["--help"], capsys)
    assert re.findall(r"^    (\w+) ", text, re.MULTILINE) == [
        "train",
        "report",
        "diagnose",
        "watch",
        "check",
        "serve",
        "buffer",
        "methods",
    ]
    assert exits(["--version"], capsys) == f"rlstab {__version__}\n"


def test_help_of_train_names_every_key_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(exits(["train", "--help"], capsys).split())
    words = set(re.findall(r"\w+", text.partition("keys of a recipe are")[2]))
    assert {field.name for field in fields(Recipe)} <= words


def test_the_keys_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(["train", "--list-keys"], capsys)
    for key in ("--model", "--objective", "--evaluation.samples", "--trainer.learning_rate", "--seed"):
        assert f"{key} " in text
    assert "--trainer.output_dir" not in text


def test_methods_lists_every_part_and_preset_with_its_paper(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(["methods"], capsys).splitlines()
    listed = [match[1] for line in lines if (match := re.match(r" (\w+) ", line))]
    bases = (losses.Part, losses.Controller)
    public = [vars(losses)[name] for name in losses.__all__ if name != "Part"]
    parts = [p.__name__ for p in public if inspect.isclass(p) and issubclass(p, bases) and not inspect.isabstract(p)]
    steady = ["SPAM", "SkipSpikes", "StableSPAM", "ZClip", "sigma_reparametrize"]
    assert sorted(listed) == sorted([*parts, *presets.__all__, *steady])
    text = " ".join(" ".join(lines).split())
    assert "https://arxiv.org/abs/2402.03300" in text
    assert "(stabilises: " in text
    assert text.index("presets") < text.index("surrogates") < text.index("divergences") < text.index("other reg")


def test_a_report_is_written_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder.create(tmp_path / "run", config_text="seed: 0")
    for step in (1, 2):
        folder.append_metrics(step, {"train/reward": 0.25 * step})
    text = output(["report", str(folder.path)], capsys)
    assert "before → after" in text
    assert f"report: {folder.report}" in text
    assert folder.report.is_file()
    assert (folder.plots / "reward.png").is_file()


MISTAKES = {
    "": "rlstab train: no recipe given",
    "--resume": "rlstab train: no recipe given",
    "{recipe} other.yaml": "unrecognized arguments: other.yaml",
    "{recipe}.yml": "no such file; did you mean",
    "{recipe} --sed 1": "sed: a recipe has no such key (value 1); did you mean 'seed'?",
    "{recipe} --seed": "--seed has no value: pass --seed=VALUE",
    "{recipe} --seed --resume": "--seed has no value: pass --seed=VALUE",
    "{recipe} --resum": "--resum has no value: pass --resum=VALUE for a key of the recipe (flags: --help, --list-keys",
    "{recipe} --seed=x": "seed: expected an integer, got 'x'",
    "{recipe} --trainer.bf6 true": "trainer.bf6: GRPOConfig has no argument 'bf6' (value True); did you mean 'bf16'? "
    "Nearest of ",
    "{recipe} --trainer.max_step 3": "; `rlstab train --list-keys` lists them",
    "{recipe} --objective.terms.kl=KLCow": "objective.terms.kl: no Term is called 'KLCow'; did you mean 'KLCov'?",
    "{recipe} --resume": "output: null does not say which run to resume",
    "{recipe} --resume --output={folder}/nothing": "no run folder at {folder}/nothing",
    "{recipe} --output={recipe}": "{recipe} is a file, expected a folder or a free path",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"recipe": recipe, "folder": tmp_path}
    assert main(["train", *words.format(**names).split()]) == 2
    shown = capsys.readouterr()
    assert MISTAKES[words].format(**names) in shown.err
    assert shown.err.startswith("rlstab: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def shaky(completions: list[str], **_: object) -> list[float]:
    """A reward that raises."""
    raise KeyError("gone")


def test_a_reward_that_raises_is_one_line(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = f"{{class_path: FunctionReward, init_args: {{function: {__name__}.shaky}}}}"
    small = ["model.hidden=16", "model.layers=1", "prompts=8", "evaluation={prompts: 1, samples: 1, ks: [1]}"]
    changes = [*small, f"rewards={{mine: {part}}}", "threads=1", f"output={tmp_path / 'run'}"]
    assert main(["train", str(recipe), *[f"--{change}" for change in changes]]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlstab: ")]
    assert re.fullmatch(r"rlstab: mine: KeyError: 'gone'; completion 0 is '.*'", line)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "invalid choice: 'trian'"),
        (["report"], "required: report.runs"),
        (["report", "nowhere"], "there is no nowhere; expected a run folder"),
        (["methods", "grpo"], "unrecognized arguments: grpo"),
    ],
)
def test_mistakes_in_the_command(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err
