"""The guard: snapshots are exact, going back is in place and bounded, and a run that was hurt recovers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from loops import Loop
from small_runs import TOKENIZER, assert_same_weights, run_folder, tiny_policy, trainer_of, weights
from torch import Tensor
from transformers import TrainerCallback
from watched_hosts import host

from rlstab.errors import ConfigError
from rlstab.losses import ClippedSurrogate, EntropyBonus, Linear, Objective, ReverseKL
from rlstab.monitors import Fall, Level, RollBack, Rule, Scale, SkipStep, Stop, default_rules
from rlstab.record import RunFolder
from rlstab.rollouts import TransformersEngine
from rlstab.trainers import Guard, Reset, Watch, watch
from rlstab.trainers._guard import restore, take
from rlstab.trainers._watch_table import LEVELS
from rlstab.trainers._weights import Copies

BAD_LOSS = Rule(
    signal="step/loss",
    detector=Level(above=4.0, steps=1),
    severity="critical",
    action=RollBack(remedy=None),
    cause="numerics",
)


@pytest.mark.parametrize(
    "loop",
    [
        Loop,
        lambda: Loop(torch.optim.SGD, momentum=0.9),
        lambda: Loop(torch.optim.Adam, amsgrad=True),
        lambda: Loop(torch.optim.AdamW, fused=True),
    ],
    ids=["adamw", "sgd", "amsgrad", "fused"],
)
@pytest.mark.parametrize("before", [0, 3])
def test_what_follows_a_restore_is_what_followed_the_snapshot(loop: Callable[[], Loop], before: int) -> None:
    run = loop()
    run.run(before)
    snapshot = take(before, Copies(run.model, run.optimizer), run.optimizer, run.scheduler, {})
    tensors = {name: tensor.data_ptr() for name, tensor in run.model.named_parameters()}
    expected = run.run(4)
    after = run.state()
    run.run(2)
    for _ in range(2):  # a snapshot is not used up
        restore(snapshot, Copies(run.model, run.optimizer), run.optimizer, run.scheduler)
        assert run.run(4) == expected
        assert_same_weights(run.state(), after)
    assert {name: tensor.data_ptr() for name, tensor in run.model.named_parameters()} == tensors


def test_frozen_weights_are_not_copied() -> None:
    run = Loop()
    snapshot = take(0, Copies(run.model, run.optimizer), run.optimizer, run.scheduler, {})
    assert "weights/0.bias" not in snapshot.tensors
    assert {"weights/0.weight", "weights/1.running_mean"} <= snapshot.tensors.keys()


# ---------------------------------------------------------------------- trainers


class Hurt(TrainerCallback):
    """Adds noise to the weights after some steps, as a spike would that nothing stopped."""

    def __init__(self, *steps: int, size: float = 1.0) -> None:
        self.steps, self.size = steps, size

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 in self.steps:
            generator = torch.Generator().manual_seed(0)
            for parameter in kwargs["model"].parameters():
                parameter.data += self.size * torch.randn(parameter.shape, generator=generator)


def events(run: RunFolder, kind: str) -> list[Mapping[str, Any]]:
    return [{"step": event.step, **event.fields} for event in run.events().rows if event.kind == kind]


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_a_hurt_run_recovers_under_the_guard(tmp_path: Path) -> None:
    """The same fault in the same run: alone, guarded, and the run that was never hurt."""
    ends = {}
    for name in ("healthy", "alone", "guarded"):
        trainer = host("SFT", tmp_path / name, max_steps=24, lr_scheduler_type="constant")
        run = run_folder(tmp_path / f"run-{name}")
        if name != "healthy":
            trainer.add_callback(Hurt(10))
        if name == "guarded":
            watch(trainer, [BAD_LOSS], guard=Guard(every=3), run=run)
        trainer.train()
        ends[name] = sum(losses(trainer)[-3:]) / 3
        assert trainer.state.global_step == 24
    assert ends["healthy"] < 2.5
    assert ends["alone"] > 4
    assert ends["guarded"] < ends["healthy"] + 0.1
    (back,) = events(run, "rolled_back")
    assert (back["step"], back["to"]) == (11, 9)


def test_the_data_goes_forward(tmp_path: Path) -> None:
    """Going back at once to the snapshot before loses the update and not its place in the data."""
    trainer = host("SFT", tmp_path / "a", max_steps=4, lr_scheduler_type="constant")
    seen: list[Tensor] = []
    trainer.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].clone()), with_kwargs=True)
    trainer.add_callback(Hurt(2))
    watch(trainer, [BAD_LOSS], guard=Guard(every=1))
    trainer.train()
    assert len(seen) == 4
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_rollbacks_are_bounded_and_then_the_run_stops(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    trainer = host("SFT", tmp_path, max_steps=12, lr_scheduler_type="constant")
    rule = Rule(signal="step/loss", detector=Level(above=-1.0, steps=1), action=RollBack(), cause="numerics")
    watch(trainer, [rule], guard=Guard(most=2, settle=0), run=run)
    start = weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 3
    backs = events(run, "rolled_back")
    assert [(back["step"], back["products"]["learning_rate"]) for back in backs] == [(1, 0.5), (2, 0.25), (3, 0.25)]
    (stopped,) = events(run, "stopped")
    assert "after 2 rollbacks (Guard.most)" in stopped["reason"]
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(5e-3 / 4)
    assert_same_weights(weights(trainer), start)  # what is saved at the end is a healthy policy
    assert (tmp_path / "checkpoint-3").is_dir()


def test_a_run_that_went_back_settles_before_it_may_go_back_again(tmp_path: Path) -> None:
    """The request is heard late and not lost; of two that are due at once only the first is of weights that exist."""
    run = run_folder(tmp_path / "run")
    trainer = host("SFT", tmp_path, max_steps=6, lr_scheduler_type="constant")
    rule = Rule(signal="step/loss", detector=Level(above=-1.0, steps=1), action=RollBack(), cause="numerics")
    watch(trainer, [rule, replace(rule, cause="x")], guard=Guard(settle=3), run=run)
    trainer.train()
    assert [back["step"] for back in events(run, "rolled_back")] == [1, 5]


@pytest.mark.parametrize(("bound", "kept"), [(-1.0, [0, 1, 2]), (1e9, [0, 1, 2, 3, 4])])
def test_snapshots_are_taken_only_while_healthy(bound: float, kept: list[int], tmp_path: Path) -> None:
    """A warning from the first step on does not keep them from being taken; a rule that stops does."""
    trainer = host("SFT", tmp_path, max_steps=4)
    rules = [
        Rule(signal="step/loss", detector=Level(above=-1.0, steps=1), cause="numerics"),
        Rule(signal="step/loss", detector=Level(above=bound), action=Stop(save=False), cause="numerics"),
    ]
    watcher = watch(trainer, rules, guard=Guard(every=1, keep=10))
    trainer.train()
    assert watcher._keeper.ring.steps == kept


def test_rollouts_in_use_are_dropped(tmp_path: Path) -> None:
    """Four steps per generation: after going back at the second one the rest of the generation is not trained on."""
    generations = {}
    for name in ("plain", "guarded"):
        trainer = host("GRPO", tmp_path / name, max_steps=4, steps_per_generation=4)
        steps: list[int] = []
        generate = trainer._generate_and_score_completions

        def counted(inputs: Any, of: Any = generate, at: list[int] = steps, owner: Any = trainer) -> Any:
            at.append(owner.state.global_step)
            return of(inputs)

        trainer._generate_and_score_completions = counted
        if name == "guarded":
            rule = Rule(signal="policy/entropy", detector=Level(above=0.0, steps=2), action=RollBack(), cause="x")
            watch(trainer, [rule], guard=Guard(most=1))
        trainer.train()
        generations[name] = steps
    assert generations["plain"] == [0]
    assert generations["guarded"][:2] == [0, 2]


def test_controllers_and_coefficients_go_back(tmp_path: Path) -> None:
    objective = Objective(
        policy=ClippedSurrogate(),
        entropy=EntropyBonus(coef=Linear(start=0.01, end=0.05, steps=4)),
        extra=EntropyBonus(),
    )
    trainer = trainer_of(tmp_path, objective, settings={"max_steps": 3, "lr_scheduler_type": "constant"})
    remedy = Scale(target="coefficient/extra", factor=2.0)
    rule = Rule(signal="step/loss", detector=Level(above=-1e9, steps=3), action=RollBack(remedy=remedy), cause="x")
    watch(trainer, [rule], guard=Guard(every=2))
    trainer.train()
    fresh = Linear(start=0.01, end=0.05, steps=4)
    assert trainer.objective.state_dict()["entropy"] == fresh.state_dict()
    assert float(trainer.objective.terms["extra"].coefficient) == 2.0


def test_a_policy_that_was_evaluated_is_kept_and_gone_back_to(tmp_path: Path) -> None:
    """A held-out score is of the policy after the step, so that the snapshot with the best one is good itself."""
    trainer, scores = host("SFT", tmp_path, max_steps=14), {2: 0.5, 5: 0.9, 9: 0.2, 11: 0.2}
    fallen = Fall(window=2, noise=0.0, share=0.5)
    rule = Rule(signal="eval/reward", detector=fallen, action=RollBack(stop=True), cause="x")
    watcher = watch(trainer, [rule], guard=Guard(every=4), run=(run := run_folder(tmp_path / "run")))
    kept: dict[int, list[int]] = {}

    class Exam(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kept[state.global_step] = watcher._keeper.ring.steps
            if state.global_step in scores:
                watcher.show(state.global_step, {"eval/reward": scores[state.global_step]})

    trainer.add_callback(Exam())
    trainer.train()
    assert kept[6] == [0, 2, 4, 5]
    assert kept[11] == [4, 5, 8, 9]
    assert [(back["step"], back["to"]) for back in events(run, "rolled_back")] == [(12, 5)]
    assert trainer.state.global_step == 12  # stopped there, with what it went back to
    assert (tmp_path / "checkpoint-12").is_dir()


class References(TrainerCallback):
    """Keeps what the references of a run are after each step."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.after: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        held = self._trainer._references.state_dict(self._trainer.accelerator)
        self.after[state.global_step] = {name: tensor.clone() for name, tensor in held.items()}


@pytest.mark.parametrize("folder", [None, "disk"])
def test_no_reference_of_the_future_stays_behind(folder: str | None, tmp_path: Path) -> None:
    """The anchor moves at step 4, `moving` and `previous(2)` at every step; then the run goes back to step 2."""
    names = ("anchor", "previous(2)", "moving")
    terms = {f"to_{place}": ReverseKL(reference=name) for place, name in enumerate(names)}
    objective = Objective({"policy": ClippedSurrogate(), **terms})
    settings = {"max_steps": 6, "sync_ref_model": True, "ref_model_sync_steps": 1, "learning_rate": 2e-2}
    trainer = trainer_of(tmp_path / "run", objective, settings=settings, reset=Reset(every=3))
    rule = Rule(signal="step/loss", detector=Level(above=-1e9, steps=5), action=RollBack(remedy=None), cause="x")
    guard = Guard(every=2, keep=2, folder=tmp_path / folder if folder else None)
    watch(trainer, [rule], guard=guard, run=(run := run_folder(tmp_path / "events")))
    trainer.add_callback(references := References(trainer))
    trainer.train()
    (back,) = events(run, "rolled_back")
    assert (back["step"], back["to"]) == (5, 2)
    then, later, now = (references.after[step] for step in (2, 4, 5))
    assert_same_weights(now, then)
    for name in ("anchor/", "previous/0/", "moving/"):
        assert any(not torch.equal(later[key], then[key]) for key in then if key.startswith(name)), name


def test_a_resumed_guard_remembers_how_often_it_went_back(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    rule = Rule(signal="step/loss", detector=Level(above=-1.0, steps=1), action=RollBack(), cause="numerics")

    def trained(resume: str | None, steps: int) -> Any:
        trainer = host("SFT", tmp_path, max_steps=steps, **saving)
        watch(trainer, [rule], guard=Guard(most=2, settle=0))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trained(None, 2)
    resumed = trained(str(tmp_path / "checkpoint-2"), 8)
    assert resumed.state.global_step == 3
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(5e-3 / 4)


@pytest.mark.parametrize("name", ["every", "keep", "most"])
def test_bad_numbers_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"Guard\.{name}: expected at least 1, got 0"):
        Guard(**dict[str, Any]({name: 0}))


def test_what_deepspeed_does_not_allow_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attached whole, before anything is trained; as a callback, which knows no trainer, before the first step."""
    trainer = host("SFT", tmp_path)
    vars(trainer)["is_deepspeed_enabled"] = True
    skipping = [rule for rule in default_rules(act=True) if isinstance(rule.action, SkipStep)]
    with pytest.raises(ConfigError, match=r"SkipStep: the rule of step/loss leaves steps out, .* use RollBack or Stop"):
        watch(trainer, skipping)
    by_default = watch(trainer, guard=Guard()).monitor.rules
    assert len(by_default) == len(default_rules())
    assert by_default[0] == replace(skipping[0], action=RollBack())
    for state in (PartialState, AcceleratorState):
        monkeypatch.setitem(state._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    given = {"model": trainer.model, "optimizer": None, "lr_scheduler": None}
    cases = (
        (Watch(skipping), "SkipStep: the rule of"),
        (Watch([BAD_LOSS], guard=Guard()), r"rlstab\.watch\(trainer, guard"),
    )
    for callback, message in cases:
        with pytest.raises(ConfigError, match=message):
            callback.on_train_begin(trainer.args, trainer.state, trainer.control, **given)


def test_a_moving_reference_in_parts_is_refused(tmp_path: Path) -> None:
    """It would stay where it is, and the policy that went back would be pulled to what it was taken from."""
    objective = Objective(policy=ClippedSurrogate(), drift=ReverseKL(reference="moving"))
    trainer = trainer_of(tmp_path, objective, settings={"sync_ref_model": True})
    vars(trainer)["is_fsdp_enabled"] = True
    with pytest.raises(ConfigError, match=r"the reference 'moving' .* use ZeRO-2 or DDP, or compare with 'initial'"):
        watch(trainer, guard=Guard())
    watch(trainer)


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("where", ["memory", "disk", "nowhere"])
def test_a_resumed_run_goes_back_as_the_whole_one_did(level: str, where: str, tmp_path: Path) -> None:
    """The second rollback goes further back than the checkpoint, to where only its ring leads."""

    def trained(name: str, resume: str | None) -> tuple[Any, RunFolder]:
        trainer = host(
            "SFT", tmp_path / name, max_steps=12, lr_scheduler_type="constant", save_strategy="steps", save_steps=6
        )
        trainer.add_callback(Hurt(7, 9))
        run = run_folder(tmp_path / f"run-{name}")
        folder = tmp_path / f"ring-{name}" if where == "disk" else None
        guard = Guard(every=3, folder=folder, checkpoints=where != "nowhere", settle=0)
        rule = replace(BAD_LOSS, signal="step/loss" if level == "attached" else "train/loss")
        if level == "attached":
            watch(trainer, [rule], guard=guard, run=run)
        else:
            trainer.add_callback(Watch([rule], guard=guard, run=run))
        trainer.train(resume_from_checkpoint=resume)
        return trainer, run

    whole, its_run = trained("whole", None)
    checkpoint = tmp_path / "whole/checkpoint-6"
    if level == "callback":  # which looks for the checkpoint where its own trainer writes them
        checkpoint = Path(copytree(checkpoint, tmp_path / "resumed/checkpoint-6"))
    resumed, run = trained("resumed", str(checkpoint))
    backs = [(event["step"], event["to"]) for event in events(its_run, "rolled_back")]
    assert backs[0][1] == 6
    assert backs[1][1] == 3
    assert [(event["step"], event["to"]) for event in events(run, "rolled_back")] == (
        backs if where != "nowhere" else [backs[0], (backs[1][0], 6)]
    )
    if where != "nowhere":
        assert_same_weights(weights(resumed), weights(whole))


def test_after_a_rollback_the_engine_forgets_and_gets_the_restored_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, run = tiny_policy(), run_folder(tmp_path / "run")
    engine = TransformersEngine(policy, TOKENIZER, share=False)
    dropped: list[int] = []
    settings = {"max_steps": 4, "num_iterations": 1, "steps_per_generation": 2}
    trainer = trainer_of(
        tmp_path, Objective(policy=ClippedSurrogate()), model=policy, engine=engine, settings=settings, run=run
    )
    monkeypatch.setattr(engine, "drop", lambda: dropped.append(trainer.state.global_step))
    rule = Rule(signal="policy/entropy", detector=Level(above=0.0, steps=1), action=RollBack(), cause="x")
    watch(trainer, [rule], guard=Guard(most=1))
    trainer.train()
    assert dropped == [1]
    assert [event["step"] for event in events(run, "rolled_back")] == [1]
    synced = [event.fields["version"] for event in run.events().of("weight_sync")]
    assert synced[:2] == [0, 1]  # a generation takes two steps: without the rollback the second sync were at 2
    assert all(float(str(event.fields["mean_abs"])) < 1e-5 for event in run.events().of("weight_sync"))
