"""Gradient stabilisers in a run of TRL's trainer: unclipped gradients, skipped steps, checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import trainer_of, weights
from transformers import TrainerCallback

from rlstab.errors import ConfigError
from rlstab.losses import presets
from rlstab.optim import Chain, Decision, GradientStabiliser, SkipSpikes, ZClip
from rlstab.trainers import SteadyGradients

UNCLIPPED = {"max_grad_norm": 0.0, "max_steps": 3, "learning_rate": 1e-2}


class Noting(GradientStabiliser):
    """Leaves out the steps that it is told, and notes the norms that it sees."""

    def __init__(self, *skipped: int) -> None:
        self.skipped = skipped
        self.norms: list[float] = []

    def decide(self, norm: float) -> Decision:
        self.norms.append(norm)
        return Decision(norm=norm, skip=len(self.norms) in self.skipped, reason="as told")

    def state_dict(self) -> dict[str, Any]:
        return {"norms": self.norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms = list(state["norms"])


class Weights(TrainerCallback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append(torch.cat([p.detach().flatten().clone() for p in kwargs["model"].parameters()]))


def trained(path: Path, callback: SteadyGradients | None, **settings: Any) -> tuple[Any, list[torch.Tensor]]:
    trainer, noted = trainer_of(path, presets.dapo(), settings={**UNCLIPPED, **settings}), Weights()
    for one in (callback, noted):
        if one is not None:
            trainer.add_callback(one)
    trainer.train()
    return trainer, noted.found


def test_a_step_that_is_left_out_leaves_the_weights(tmp_path: Path) -> None:
    stabiliser = Noting(2)
    callback = SteadyGradients(stabiliser)
    _, found = trained(tmp_path, callback)
    assert len(stabiliser.norms) == 3
    assert all(math.isfinite(norm) and norm > 0 for norm in stabiliser.norms)
    assert torch.equal(found[1], found[0])
    assert not torch.equal(found[2], found[1])
    assert (callback.skipped, callback.scaled) == (1, 0)


def test_a_limit_is_that_of_the_hosts_own_clip(tmp_path: Path) -> None:
    """A fixed limit here and `max_grad_norm` there are the same run."""
    callback = SteadyGradients(ZClip(max_norm=0.05))
    _, ours = trained(tmp_path / "ours", callback)
    _, host = trained(tmp_path / "host", None, max_grad_norm=0.05)
    assert callback.scaled == 3
    torch.testing.assert_close(ours[-1], host[-1])


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def stabiliser() -> Chain:
        return Chain([SkipSpikes(least=2), ZClip(warmup=2)])

    whole = SteadyGradients(stabiliser())
    trainer, _ = trained(tmp_path, whole, save_steps=2, save_strategy="steps")
    resumed = SteadyGradients(stabiliser())
    again = trainer_of(tmp_path, presets.dapo(), settings={**UNCLIPPED, "save_steps": 2, "save_strategy": "steps"})
    again.add_callback(resumed)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state() == whole.state()
    torch.testing.assert_close(weights(again), weights(trainer))


def test_a_checkpoint_without_its_state_is_refused(tmp_path: Path) -> None:
    settings = {**UNCLIPPED, "max_steps": 1, "save_steps": 1, "save_strategy": "steps"}
    trainer_of(tmp_path, presets.dapo(), settings=settings).train()
    again = trainer_of(tmp_path, presets.dapo(), settings=settings)
    again.add_callback(SteadyGradients(ZClip()))
    with pytest.raises(ConfigError, match="checkpoint of step 1 holds no state of SteadyGradients"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_what_comes_between_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, presets.dapo(), settings={**UNCLIPPED, "max_grad_norm": 1.0})
    trainer.add_callback(SteadyGradients(ZClip()))
    with pytest.raises(ConfigError, match=r"args\.max_grad_norm=1\.0 clips gradients before .* set max_grad_norm=0\.0"):
        trainer.train()
    with pytest.raises(ConfigError, match=r"SteadyGradients\.stabiliser: expected ZClip\(\)"):
        SteadyGradients(0.5)  # type: ignore[arg-type]
