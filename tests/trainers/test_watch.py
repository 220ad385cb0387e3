"""The watch on every trainer: what it sees, that it changes nothing, what it says, and how it is resumed."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import assert_same_weights, run_folder, tiny_policy, trainer_of, weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import TrainerCallback
from watched_hosts import host

import rlstab
from rlstab.errors import ConfigError, SchemaError
from rlstab.losses import ClippedSurrogate, JensenShannon, Objective
from rlstab.monitors import Diagnosis, Level, Monitor, NonFinite, Notify, RollBack, Rule, Scale, SkipStep, Stop
from rlstab.probes import Activations, Attention, SpectralAlignment
from rlstab.record import RunFolder, diagnosis_of
from rlstab.trainers import Guard, LossCall, Observer, Watch, _watch, watch
from rlstab.trainers._births import trace
from rlstab.trainers._watch_table import LEVELS, SIGNALS, TRAINERS

ALWAYS = Level(above=-1e9, steps=1)


class Listening(Monitor):
    """A monitor that keeps what it is shown, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, dict[str, float]] = {}

    def observe(self, step: int, values: Mapping[str, float]) -> Any:
        self.seen.setdefault(step, {}).update(values)
        return super().observe(step, values)


def probes() -> list[Any]:
    return [Activations(), Attention(), SpectralAlignment()]


def watched(trainer: Any, level: str, **arguments: Any) -> Watch:
    """A watch at one of the two levels."""
    if level == "attached":
        return watch(trainer, **arguments)
    callback = Watch(**arguments)
    trainer.add_callback(callback)
    return callback


@pytest.fixture(scope="module", params=TRAINERS)
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A kind of trainer, and its run without a watch."""
    kind: str = request.param
    trainer = host(kind, tmp_path_factory.mktemp(kind), sampler=kind.endswith("GRPO"))
    trainer.train()
    return kind, trainer


@pytest.mark.parametrize("level", LEVELS)
def test_the_trajectory_is_identical_and_the_table_is_true(alone: tuple[str, Any], level: str, tmp_path: Path) -> None:
    kind, other = alone
    trainer = host(kind, tmp_path, sampler=kind.endswith("GRPO"))
    watcher = watched(trainer, level, probes=probes())
    watcher.monitor = listening = Listening()
    trainer.train()
    assert_same_weights(weights(trainer), weights(other))
    assert [row["loss"] for row in trainer.state.log_history[:-1]] == [
        row["loss"] for row in other.state.log_history[:-1]
    ]
    everywhere = {key for row in listening.seen.values() for key in row}
    for key in {row.key for row in SIGNALS if not row.apart}:
        rows = [row for row in SIGNALS if row.key == key and kind in row.trainers]
        expected = any(row.attached if level == "attached" else row.callback for row in rows)
        found = any(seen.startswith(key) if key.endswith(("/", "@")) else seen == key for seen in everywhere)
        assert found == expected, f"{key} of {kind} at {level}"


def test_detached_leaves_the_trainer_as_it_was(tmp_path: Path) -> None:
    trainer = host("GRPO", tmp_path)
    before, callbacks = set(vars(trainer)), list(trainer.callback_handler.callbacks)
    watcher = watch(trainer, probes=probes())
    assert set(vars(trainer)) != before
    watcher.detach()
    assert set(vars(trainer)) == before
    assert trainer.callback_handler.callbacks == callbacks
    assert not trainer.model._forward_hooks


class Waits(TorchFunctionMode):
    """Counts what would wait for the device, by the module of ours that asks for it."""

    WAITING = (Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.cpu, torch.unique)

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        caller = sys._getframe(1).f_globals["__name__"]
        if func in self.WAITING and caller.startswith("rlstab."):
            self.counted.append(caller)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "reads"), [("GRPO", "_measure"), ("StableGRPO", "_log")])
def test_a_step_waits_once_for_the_device(kind: str, reads: str, tmp_path: Path) -> None:
    """Between turns what the watch measures leaves the device at one place, with what the trainer measures itself."""
    trainer, by_step = host(kind, tmp_path, sampler=True, max_steps=4), dict[int, list[str]]()

    class PerStep(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            waits.counted = by_step.setdefault(state.global_step + 1, [])

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            waits.counted = []

    trainer.add_callback(PerStep())
    watch(trainer, probes=probes())
    with Waits() as waits:
        trainer.train()
    generation = {"rlstab.trainers._batches"}  # which looks once for tokens without a log-prob
    for step in (2, 3, 4):
        assert set(by_step[step]) - generation == {f"rlstab.trainers.{reads}"}


# ---------------------------------------------------------------------- not a number


class Poison:
    """Makes a module give infinity at one training forward with gradient."""

    def __init__(self, module: nn.Module, at: int) -> None:
        self.count, self.at = 0, at
        module.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        self.count += torch.is_grad_enabled()
        return output * torch.inf if self.count == self.at else output


def events(run: RunFolder, kind: str) -> list[Mapping[str, Any]]:
    return [{"step": event.step, **event.fields} for event in run.events().rows if event.kind == kind]


def test_a_number_that_is_not_finite_is_seen_traced_and_left_out(tmp_path: Path) -> None:
    """The host logs a finite loss for such a step, and goes on with weights that are not numbers."""
    trainer = host("SFT", tmp_path, max_steps=4)
    Poison(trainer.model.model.layers[1].mlp, at=2)
    run = run_folder(tmp_path / "run")
    rules = [
        Rule(signal=key, detector=NonFinite(), severity="critical", action=SkipStep(), cause="numerics")
        for key in ("step/loss", "train/grad_norm")
    ]
    watcher = watch(trainer, rules, run=run)
    trainer.train()
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    assert all(row["loss"] == row["loss"] for row in trainer.state.log_history[:-1])
    assert [(alarm.step, alarm.cause, alarm.severity) for alarm in watcher.alarms] == [(2, "numerics", "critical")]
    (birth,) = events(run, "not_finite")
    assert (birth["step"], birth["where"]) == (2, "forward")
    assert birth["names"] == ["model.layers.1.mlp (Qwen2MLP)"]
    assert [event["step"] for event in events(run, "step_skipped")] == [2]
    assert run.metrics().rows[1].values["step/bad_gradients"] > 0


def test_skipping_leaves_weights_and_moments_alone(tmp_path: Path) -> None:
    trainer = host("Trainer", tmp_path, max_steps=2)
    rule = Rule(signal="step/loss", detector=ALWAYS, action=SkipStep(), cause="numerics")
    before = weights(trainer)
    watch(trainer, [rule])
    trainer.train()
    assert_same_weights(weights(trainer), before)
    assert not trainer.optimizer.state


def test_a_step_that_the_trainer_left_out_is_no_surprise(tmp_path: Path) -> None:
    """The gradients are gone before the watch looks; it goes on."""
    trainer = host("GRPO", tmp_path)
    step = trainer.training_step

    def without(*args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = step(*args, **kwargs)
        trainer.model.zero_grad(set_to_none=True)
        return loss

    trainer.training_step = without
    watcher = watch(trainer)
    watcher.monitor = listening = Listening()
    trainer.train()
    assert "step/bad_gradients" not in listening.seen[2]
    assert "step/loss" in listening.seen[2]


def test_a_step_that_is_over_is_not_said_to_be_left_out(tmp_path: Path) -> None:
    """As a callback the gradient norm comes with the host's log line, after the update."""
    trainer, run = host("SFT", tmp_path), run_folder(tmp_path / "run")
    rule = Rule(signal="train/grad_norm", detector=ALWAYS, action=SkipStep(), cause="optimisation")
    before = weights(trainer)
    trainer.add_callback(Watch([rule], run=run))
    trainer.train()
    assert len(events(run, "alarm")) == 1
    assert events(run, "step_skipped") == []
    assert not all(torch.equal(before[name], value) for name, value in weights(trainer).items())


@pytest.mark.parametrize("where", ["weights", "gradient", "nowhere"])
def test_births_elsewhere(where: str) -> None:
    model = tiny_policy()
    if where == "weights":
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    gradients = {"a": torch.tensor(1.0), "b": torch.tensor(torch.nan if where == "gradient" else 1.0)}
    birth = trace(model, ((), {"input_ids": torch.tensor([[5, 6]])}), gradients)
    expected = {"weights": ("weights", ("model.layers.0.mlp.up_proj.weight",)), "gradient": ("gradient", ("b",))}
    assert birth == expected.get(where)


# ---------------------------------------------------------------------- what it says


def test_an_alarm_goes_to_the_folder_the_log_and_the_host(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = host("GRPO", tmp_path)
    run = run_folder(tmp_path / "run")
    readings: list[RunFolder] = []

    def reading(folder: RunFolder) -> Diagnosis:
        readings.append(folder)
        return diagnosis_of(folder)

    monkeypatch.setattr(_watch, "diagnosis_of", reading)
    rules = [
        Rule(signal="train/reward", detector=ALWAYS, severity="critical", cause="reward"),
        Rule(signal="step/loss", detector=ALWAYS, cause="numerics"),
    ]
    with caplog.at_level(logging.INFO, "rlstab"):
        watcher = watch(trainer, rules, run=run)
        trainer.train()
    assert [alarm.cause for alarm in watcher.alarms] == ["reward", "numerics"]
    assert readings == [run]
    event, other = events(run, "alarm")
    assert event["causes"] == other["causes"]
    assert (event["step"], event["cause"], event["change"]) == (1, "reward", "opened")
    assert event["message"] == str(watcher.alarms[0])
    (record,) = [record for record in caplog.records if "the reward falls" in record.getMessage()]
    assert record.levelno == logging.ERROR
    assert [row.step for row in run.metrics().rows] == [1, 2, 3]
    assert "step/loss" in trainer.state.log_history[0]
    assert trainer.state.log_history[0]["step/loss"] == pytest.approx(trainer.state.log_history[0]["loss"], abs=1e-4)


class Receiver(BaseHTTPRequestHandler):
    """Keeps what is posted to it."""

    bodies: list[dict[str, Any]]

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    bodies: list[dict[str, Any]] = []
    handler = type("Keeping", (Receiver,), {"bodies": bodies})
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", bodies
    server.shutdown()
    server.server_close()


def test_somebody_is_told(
    tmp_path: Path, webhook: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, bodies = webhook
    script = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read())"
    told = tmp_path / "told; no shell.json"
    action = Notify(command=(sys.executable, "-c", script, str(told)), webhook_variable="ALARMS")
    rules = [Rule(signal="step/loss", detector=ALWAYS, action=action, cause="numerics")]
    trainer = host("Trainer", tmp_path)
    with pytest.raises(ConfigError, match="expected the environment variable ALARMS to hold an http or https address"):
        watch(trainer, rules)
    monkeypatch.setenv("ALARMS", address)
    watch(trainer, rules)
    trainer.train()
    assert json.loads(told.read_text()) == bodies[0]
    assert bodies[0]["signal"] == "step/loss"
    assert len(bodies) == 1


def test_a_message_that_cannot_be_handed_on_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = host("Trainer", tmp_path)
    action = Notify(command=(str(tmp_path / "no such program"),))
    watch(trainer, [Rule(signal="step/loss", detector=ALWAYS, action=action, cause="numerics")])
    trainer.train()
    assert trainer.state.global_step == 3
    assert any("could not be handed on" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("level", LEVELS)
def test_held_out_scores_are_looked_at(level: str, tmp_path: Path) -> None:
    """Those of the host's evaluations, and those of one's own; the run folder holds the host's."""
    trainer, run = host("GRPO", tmp_path, max_steps=1), run_folder(tmp_path / "run")
    watcher = watched(trainer, level, run=run)
    watcher.monitor = listening = Listening()
    trainer.train()
    trainer.evaluate(trainer.train_dataset.select(range(8)))
    assert {key for key in listening.seen[1] if key.startswith("eval/")} == {"eval/reward", "eval/entropy"}
    assert run.metrics().series("eval/reward").values[0] == listening.seen[1]["eval/reward"]
    watcher.show(2, {"eval/pass@1": 0.5})
    assert listening.seen[2] == {"eval/pass@1": 0.5}
    with pytest.raises(SchemaError, match="eval/pass"):
        watcher.show(2, {"eval/passed": 0.5})


@pytest.mark.parametrize("level", LEVELS)
def test_a_run_is_stopped_with_a_checkpoint(level: str, tmp_path: Path) -> None:
    trainer = host("SFT", tmp_path, max_steps=5)
    rule = Rule(signal="step/bad_gradients", detector=Level(above=-1.0, steps=2), action=Stop(), cause="numerics")
    watched(trainer, level, rules=[rule])
    trainer.train()
    assert trainer.state.global_step == 2
    assert (tmp_path / "checkpoint-2").is_dir()


def test_the_learning_rate_and_a_coefficient_are_turned(tmp_path: Path) -> None:
    objective = Objective(policy=ClippedSurrogate(), drift=0.1 * JensenShannon(reference="initial"))
    run = run_folder(tmp_path / "run")
    trainer = trainer_of(tmp_path, objective, settings={"lr_scheduler_type": "constant", "max_steps": 3}, run=run)
    rules = [
        Rule(signal="step/loss", detector=ALWAYS, action=Scale(factor=0.5), cause="a"),
        Rule(signal="step/loss", detector=ALWAYS, action=Scale(target="coefficient/drift", factor=3.0), cause="b"),
    ]
    watch(trainer, rules)
    trainer.train()
    rates = [row.values["train/learning_rate"] for row in run.metrics().rows]
    assert rates == pytest.approx([5e-3, 2.5e-3, 2.5e-3])
    assert float(trainer.objective.terms["drift"].coefficient) == pytest.approx(0.3)
    assert [event["product"] for event in events(run, "scaled")] == [0.5, 3.0]


class Rows(Observer):
    """What an observer of one's own is shown."""

    def __init__(self) -> None:
        self.calls: list[LossCall] = []
        self.rollouts: list[Mapping[str, Any]] = []

    def on_rollout(self, rows: Any, output: Mapping[str, Any]) -> None:
        self.rollouts.append(output)

    def on_loss(self, call: LossCall) -> None:
        self.calls.append(call)

    def collect(self) -> dict[str, Tensor]:
        return {"step/loss": torch.tensor(7.0)}


def test_an_observer_is_shown_detached_tensors(tmp_path: Path) -> None:
    trainer, rows = host("GRPO", tmp_path, gradient_accumulation_steps=2), Rows()
    watch(trainer, observers=[rows])
    trainer.train()
    assert (len(rows.calls), len(rows.rollouts)) == (6, 3)
    call = rows.calls[0]
    assert not call.loss.requires_grad
    assert not any(tensor.requires_grad for tensor in call.outputs.values())
    width = call.inputs["prompt_ids"].shape[1] + call.inputs["completion_ids"].shape[1]
    assert call.outputs["log_probs"].shape == (8, width - 1)


def test_mismatch_on_the_host_is_that_of_the_drop_in(tmp_path: Path) -> None:
    """The same sampler, once behind TRL's trainer and once behind ours."""
    found = []
    for kind in ("GRPO", "StableGRPO"):
        trainer = host(kind, tmp_path / kind, sampler=True, max_steps=1)
        watcher = watch(trainer)
        watcher.monitor = listening = Listening()
        trainer.train()
        found.append({key: value for key, value in listening.seen[1].items() if key.startswith("mismatch/")})
    assert len(found[0]) == 25  # two of the five buckets hold tokens
    assert found[0] == pytest.approx(found[1], rel=1e-4, nan_ok=True)


# ---------------------------------------------------------------------- resume


def test_a_resumed_watch_goes_on_exactly(tmp_path: Path) -> None:
    def trained(output: Path, resume: str | None, steps: int) -> tuple[Watch, Any]:
        trainer = host(
            "SFT", output, max_steps=steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant"
        )
        rules = [
            Rule(signal="step/loss", detector=Level(above=-1.0, steps=3), cause="a"),
            Rule(signal="train/grad_norm", detector=Level(above=-1.0, steps=2), action=Scale(factor=0.5), cause="b"),
        ]
        watcher = watch(trainer, rules)
        trainer.train(resume_from_checkpoint=resume)
        return watcher, trainer

    whole, expected = trained(tmp_path / "whole", None, 4)
    trained(tmp_path / "parts", None, 2)
    second, resumed = trained(tmp_path / "parts", str(tmp_path / "parts/checkpoint-2"), 4)
    assert_same_weights(weights(resumed), weights(expected))
    assert resumed.optimizer.param_groups[0]["lr"] == expected.optimizer.param_groups[0]["lr"] == 2.5e-3
    assert second.monitor.state_dict() == whole.monitor.state_dict()
    assert [alarm.step for alarm in second.alarms] == [3]


def test_a_run_that_was_not_watched_is_resumed_under_a_watch(tmp_path: Path) -> None:
    unwatched = host("SFT", tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    unwatched.train()
    trainer = host("SFT", tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    watch(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "checkpoint-4").is_dir()


# ---------------------------------------------------------------------- refusals, imports


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    trainer = host("SFT", tmp_path)
    rule = Rule(signal="step/loss", detector=ALWAYS, action=RollBack())
    with pytest.raises(ConfigError, match="that of step/loss rolls back, and there is no guard"):
        Watch([rule])
    with pytest.raises(ConfigError, match=r"Watch\.every: expected at least 1, got 0"):
        Watch(every=0)
    scale = Rule(signal="step/loss", detector=ALWAYS, action=Scale(target="coefficient/drift"))
    with pytest.raises(ConfigError, match="this trainer has no objective"):
        watch(trainer, [scale])
    with pytest.raises(ConfigError, match=r"expected one of the terms \['clipped_surrogate'\]"):
        watch(trainer_of(tmp_path, ClippedSurrogate()), [scale])
    unwatched = host("SFT", tmp_path / "callback")
    unwatched.add_callback(Watch([scale]))
    with pytest.raises(ConfigError, match="this trainer has no objective"):
        unwatched.train()
    watch(trainer)
    with pytest.raises(ConfigError, match="watched already"):
        watch(trainer)
    trainer.args.restore_callback_states_from_checkpoint = True
    with pytest.raises(ConfigError, match="makes callbacks anew"):
        watch(trainer)


def test_rlstab_offers_the_watch() -> None:
    assert (rlstab.watch, rlstab.Watch, rlstab.Guard) == (watch, Watch, Guard)
    assert {"watch", "Watch", "Guard"} <= set(dir(rlstab))
    with pytest.raises(AttributeError, match="no attribute 'wach'"):
        _ = rlstab.wach
