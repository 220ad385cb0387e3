"""Rollouts that are sampled while the trainer computes: how old they are, and that a run stays the run it is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import prompts
from small_runs import (
    TOKENIZER,
    Watched,
    assert_same_weights,
    run_folder,
    tiny_policy,
    trainer_of,
    weights,
    without_times,
)
from torch import Tensor
from transformers import TrainerCallback

from rlstab.errors import ConfigError, EngineError
from rlstab.losses import Objective, TruncatedIS
from rlstab.rollouts import (
    Engine,
    Health,
    OverlappedRollouts,
    Request,
    Rollout,
    Sampling,
    TransformersEngine,
    WeightSource,
)

# Four generations an epoch.
SETTINGS = {"max_steps": 7, "num_iterations": 1, "learning_rate": 1e-3}


def copying(model: Any, tokenizer: Any) -> TransformersEngine:
    return TransformersEngine(model, tokenizer, share=False)


def overlapped(staleness: int) -> Any:
    return lambda model, tokenizer: OverlappedRollouts(copying(model, tokenizer), staleness=staleness)


def corrected() -> Watched:
    return Watched(low=0.2, high=0.28, weights=(TruncatedIS(max=2.0),))


def made(output: Path, engine: Any, term: Watched | None = None, **extra: Any) -> Any:
    settings = {**SETTINGS, **extra.pop("settings", {})}
    objective = Objective(policy=term or corrected())
    data = prompts(extra.pop("rows", 8))
    return trainer_of(output, objective, model=tiny_policy(), data=data, settings=settings, engine=engine, **extra)


def log(trainer: Any) -> list[dict[str, str]]:
    return [without_times(row) for row in trainer.state.log_history]


def lags(term: Watched) -> list[set[int]]:
    """How many updates old the tokens of each step were."""
    return [
        {step - int(version) for version in batch.part("weight_versions")[batch.loss_mask].unique()}
        for step, batch in enumerate(term.seen)
    ]


def test_without_staleness_it_is_the_engine_alone(tmp_path: Path) -> None:
    alone = made(tmp_path / "alone", copying)
    alone.train()
    wrapped = made(tmp_path / "wrapped", overlapped(0))
    wrapped.train()
    assert_same_weights(weights(wrapped), weights(alone))
    assert log(wrapped) == log(alone)


def test_tokens_are_as_old_as_allowed_and_say_so(tmp_path: Path) -> None:
    term = corrected()
    trainer = made(tmp_path / "once", overlapped(1), term)
    trainer.train()
    # The first generation of an epoch is not known before it begins.
    assert lags(term) == [{0}, {1}, {1}, {1}, {0}, {1}, {1}]
    for batch in term.seen:
        assert torch.equal(batch.part("weight_versions") >= 0, batch.mask)
    again = made(tmp_path / "again", overlapped(1))
    again.train()
    assert_same_weights(weights(again), weights(trainer))
    ratios = [row["mismatch/k3"] for row in trainer.state.log_history if "mismatch/k3" in row]
    assert [ratio > 1e-7 for ratio in ratios] == [False, True, True, True, False, True, True]


def test_several_generations_ahead(tmp_path: Path) -> None:
    """Each lasts two updates, of two micro-steps each; which weights draw the second one ahead is the clock's."""
    term = corrected()
    settings = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4}
    trainer = made(tmp_path, overlapped(4), term, settings=settings, rows=32)
    trainer.train()
    starts = [batch.part("weight_versions")[batch.loss_mask] for batch in term.seen[::4]]
    behind = [2 * generation - int(versions.min()) for generation, versions in enumerate(starts)]
    assert len(behind) == 4
    assert behind[:2] == [0, 2]
    assert all(0 < versions <= 4 for versions in behind[1:])


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = made(tmp_path / "whole", overlapped(1), settings=saving)
    whole.train()
    for stop in (2, 4):  # with a generation ahead, and between epochs
        checkpoint = tmp_path / "whole" / f"checkpoint-{stop}"
        term = corrected()
        resumed = made(tmp_path / f"resumed-{stop}", overlapped(1), term, settings=saving)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        first = term.seen[0]
        assert set((stop - first.part("weight_versions")[first.loss_mask]).tolist()) == {1 if stop == 2 else 0}
        assert_same_weights(weights(resumed), weights(whole))
        assert log(resumed) == log(whole)


class At(TrainerCallback):
    """Does something at the end of one step."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()


def test_what_is_ahead_can_be_dropped(tmp_path: Path) -> None:
    """As a return to earlier weights does."""
    term = corrected()
    trainer = made(tmp_path, overlapped(1), term)
    trainer.add_callback(At(2, trainer._generation.engine.drop))
    trainer.train()
    assert lags(term) == [{0}, {1}, {0}, {1}, {0}, {1}, {1}]


def test_an_evaluation_samples_with_the_present_weights(tmp_path: Path) -> None:
    """And leaves to training what was sampled for it."""
    term = corrected()
    trainer = made(
        tmp_path,
        overlapped(1),
        term,
        settings={"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3},
        eval_dataset=prompts(2),
    )
    versions: list[Tensor] = []
    finish = trainer._generation.finish

    def noting(output: dict[str, Any]) -> list[Rollout]:
        rollouts: list[Rollout] = finish(output)
        if not trainer.model.training:
            versions.append(torch.cat([rollout.weight_versions for rollout in rollouts]))
        return rollouts

    trainer._generation.finish = noting
    trainer.train()
    assert [set(found.tolist()) for found in versions] == [{1}, {2}, {3}]
    trained = [batch for batch in term.seen if len(batch.mask) == 8 and batch.counts["step"].sequences == 8]
    assert len(trained) >= 3


def test_weights_that_are_loaded_between_steps_are_sent(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    trainer = made(tmp_path / "host", copying, settings={"max_steps": 1}, eval_dataset=prompts(2), run=run)
    trainer.train()
    trainer.evaluate()
    trainer.evaluate()
    trainer.model.load_state_dict(tiny_policy(seed=2).state_dict())
    trainer.evaluate()
    assert [event.fields["version"] for event in run.events().of("weight_sync")] == [0, 1, 1]


class Mortal(Engine):
    """Dies after some generations."""

    def __init__(self, engine: Engine, lives: int) -> None:
        self.engine, self.lives = engine, lives

    id = property(lambda self: self.engine.id)
    weight_version = property(lambda self: self.engine.weight_version)
    shares_weights = property(lambda self: self.engine.shares_weights)
    dtype = property(lambda self: self.engine.dtype)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        rollouts = self.engine.generate(requests, sampling)
        self.lives -= 1
        if self.lives < 0:
            raise EngineError("all engines are dead")
        return rollouts

    def score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        return self.engine.score(sequences)

    def sync_weights(self, source: WeightSource, version: int) -> None:
        self.engine.sync_weights(source, version)

    def health(self) -> Health:
        return self.engine.health()

    def close(self) -> None:
        self.engine.close()


@pytest.mark.parametrize("staleness", [0, 1])
def test_an_engine_that_gives_up_leaves_a_checkpoint(
    tmp_path: Path, staleness: int, caplog: pytest.LogCaptureFixture
) -> None:
    def mortal(lives: int) -> Any:
        return lambda model, tokenizer: OverlappedRollouts(
            Mortal(copying(model, tokenizer), lives), staleness=staleness
        )

    run = run_folder(tmp_path / "run")
    whole = made(tmp_path / "whole", mortal(100))
    whole.train()
    failing = made(tmp_path / "failing", mortal(4), run=run)  # one of them for the proof of the first sync
    with pytest.raises(EngineError, match="all engines are dead"):
        failing.train()
    (event,) = run.events().of("generation_failed")
    assert (event.fields["reason"], event.fields["checkpoint"]) == ("all engines are dead", True)
    assert f"a checkpoint of step {failing.state.global_step} was written" in caplog.text
    with pytest.raises(EngineError, match="all engines are dead"):
        made(tmp_path / "at once", mortal(0)).train()
    assert "no checkpoint of step 0 was written, as there was no update yet; go on from the last" in caplog.text
    resumed = made(tmp_path / "resumed", mortal(100))
    resumed.train(resume_from_checkpoint=str(tmp_path / "failing" / f"checkpoint-{failing.state.global_step}"))
    assert resumed.state.global_step == SETTINGS["max_steps"]
    if staleness == 0:  # otherwise what was ahead is sampled anew, by newer weights
        assert_same_weights(weights(resumed), weights(whole))


def test_what_cannot_overlap_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot sample while this process trains"):
        OverlappedRollouts(TransformersEngine(tiny_policy(), TOKENIZER))
    with pytest.raises(ConfigError, match="staleness -1; expected at least 0"):
        OverlappedRollouts(copying(tiny_policy(), TOKENIZER), staleness=-1)
    with pytest.raises(ConfigError, match=r"lasts 2 updates .* set staleness=2 or more"):
        made(tmp_path, overlapped(1), settings={"num_iterations": 2})
