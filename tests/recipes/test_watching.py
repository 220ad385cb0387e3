"""How a recipe has its run watched: alarms by its own rules, and a way back under its guard."""

from pathlib import Path

import pytest
from rich.console import Console

from rlstab.errors import RecipeError
from rlstab.monitors import Level, RollBack, Rule
from rlstab.recipes import Recipe, TinyModel, Watching, read_recipe, run_recipe
from rlstab.tasks import SortDigits
from rlstab.trainers import Guard

TEXT = """
model: {class_path: TinyModel, init_args: {hidden: 32, heads: 2}}
task: {class_path: SortDigits, init_args: {digits: 2}}
engine: Transformers
watch:
  guard: {every: 1}
  rules:
  - signal: completions/mean_length
    detector: {class_path: Level, init_args: {above: 0.5, steps: 3}}
    severity: critical
    action: {class_path: RollBack, init_args: {remedy: null}}
trainer:
  max_steps: 4
  per_device_train_batch_size: 8
  num_generations: 4
  max_completion_length: 4
  gradient_checkpointing: false
  bf16: false
  dataloader_pin_memory: false
evaluation: {prompts: 4, samples: 1, ks: [1]}
threads: 1
"""
SIGNAL = "completions/mean_length"


def read(folder: Path, *overrides: tuple[str, str]) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(TEXT)
    return read_recipe(file, [("output", str(folder / "run")), *overrides]).recipe


def test_rules_are_data_of_a_recipe(tmp_path: Path) -> None:
    watching = read(tmp_path).watch
    back = Rule(signal=SIGNAL, detector=Level(above=0.5, steps=3), severity="critical", action=RollBack(remedy=None))
    assert watching == Watching(rules=[back], guard=Guard(every=1))
    assert Recipe(model=TinyModel(), task=SortDigits(digits=2)).watch == Watching()
    assert read(tmp_path, ("watch", "null")).watch is None


def test_a_rule_of_a_recipe_takes_its_run_back(tmp_path: Path) -> None:
    read(tmp_path)
    resolved = read_recipe(tmp_path / "recipe.yaml", [("output", str(tmp_path / "run"))])
    events = run_recipe(resolved, console=Console(quiet=True)).folder.events()
    (alarm,) = [event for event in events.of("alarm") if event.fields["change"] == "opened"]
    assert (alarm.step, alarm.fields["severity"]) == (3, "critical")
    assert [(event.step, event.fields["to"]) for event in events.of("rolled_back")] == [(3, 0)]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("watch.guard", "null", f"Watch.rules: that of {SIGNAL} rolls back, and there is no guard: pass guard=Guard()"),
        ("watch.every", "0", "watch: Watch.every: expected at least 1, got 0"),
        (
            "watch.rules.0.action",
            "{class_path: Notify, init_args: {webhook: 'https://hooks.example/secret'}}",
            "watch.rules: the address of a webhook would stand in the run folder; set webhook_variable",
        ),
        ("watch.budget", "0", "watch: Monitor.budget: expected false alarms per 1000 steps > 0, got 0.0"),
        ("watch.budget", ".inf", "watch: Monitor.budget: expected false alarms per 1000 steps > 0, got inf"),
        ("watch.gurad", "1", "watch.gurad: Watching has no argument 'gurad'"),
        (
            "watch.rules.0.detector",
            "Lvel",
            "watch.rules.0.detector: no Detector is called 'Lvel'; did you mean 'Level'",
        ),
        ("watch.rules.0.severity", "bad", "watch.rules.0.severity: expected one of 'note', 'warning', 'critical'"),
    ],
)
def test_what_cannot_be_watched_is_one_line(key: str, value: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, (key, value))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
