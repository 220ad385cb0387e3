"""However a step is split over micro-batches, the gradient that reaches the optimizer is the same."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from equality import Trace, Tracer, gradient_distance
from small_runs import Watched, joined, run_folder, texts, trainer_of
from torch import Tensor

from rlstab.losses import (
    ConflictWeight,
    EntropyBonus,
    GroupNorm,
    JensenShannon,
    KLCov,
    Mean,
    Objective,
    ReverseKL,
    TopEntropy,
)

ROWS = 16
SPLITS = {"16x1": (16, 1), "8x2": (8, 2), "2x8": (2, 8)}


def every_phase(over: Literal["step", "micro_batch"], *, exact: bool = False) -> Objective:
    """Parts of all three phases and all kinds of means."""
    mean = Mean(over=over)
    return Objective(
        policy=Watched(weights=(ConflictWeight(),), mean=mean),
        covariance=0.5 * KLCov(fraction=0.1, over=over, mean=mean),
        drift=0.1 * JensenShannon(reference="initial", mean=Mean(unit="sequence", over=over)),
        anchor=0.1 * ReverseKL(reference="initial", form="exact" if exact else "sampled", mean=Mean(unit=8, over=over)),
        calm=0.01 * EntropyBonus(weights=(TopEntropy(fraction=0.3, over=over),), mean=mean),
        advantage=GroupNorm(),
    )


def alike(completions: list[str], **_: Any) -> list[float]:
    """Rewards that set completions with the same beginning apart."""
    return [float(len(text)) for text in completions]


def two_steps(tmp_path: Path, split: str, objective: Objective, **settings: Any) -> tuple[Trace, Any]:
    """The gradients of two updates on one generation, and what the surrogate saw."""
    rows, accumulation = SPLITS[split]
    trainer = trainer_of(
        tmp_path / split,
        objective,
        run=run_folder(tmp_path / f"folder-{split}"),
        reward=alike,
        settings={
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": accumulation,
            "num_iterations": 2,
            "max_steps": 2,
            # Adam's first update is a sign: it would make a whole step of the rounding of a gradient that is near 0.
            "optim": "sgd",
            "learning_rate": 1.0,
            "temperature": 0.5,
            **settings,
        },
    )
    trace = Trace()
    trainer.add_callback(Tracer(trace))
    trainer.train()
    policy: Any = objective.terms["policy"]
    return trace, (policy.seen, trainer)


def assert_same_generation(ours: Any, theirs: Any) -> None:
    """The same completions, in the same order, with the same advantages, in micro-batches of other sizes."""
    for column in ("advantages", "rewards", "group"):
        a, b = (joined(seen[: len(seen) // 2], column) for seen in (ours, theirs))
        assert torch.equal(a, b)
    assert [t for batch in ours for t in texts(batch)] == [t for batch in theirs for t in texts(batch)]
    assert len(ours) != len(theirs)


@pytest.mark.parametrize("exact", [False, True])
def test_the_gradient_of_a_step_does_not_depend_on_its_split(exact: bool, tmp_path: Path) -> None:
    whole, (seen, trainer) = two_steps(tmp_path, "16x1", every_phase("step", exact=exact))
    logged = trainer.state.log_history
    # Every part acts: conflicts are found, tokens are chosen, and the policy has left where it was.
    assert 0.0 < logged[1]["objective/policy/conflict_weight/conflict"] < 1.0
    assert logged[1]["objective/covariance/loss"] > 0.0
    assert logged[1]["objective/drift/loss"] > 0.0
    assert logged[1]["objective/anchor/loss"] != 0.0
    for split in ("8x2", "2x8"):
        parted, (others, other) = two_steps(tmp_path, split, every_phase("step", exact=exact))
        assert_same_generation(seen, others)
        for step in (0, 1):
            assert gradient_distance(parted.gradients[step], whole.gradients[step]) <= 1e-6
            for key, value in logged[step].items():
                if key.startswith(("objective/", "policy/")):
                    assert other.state.log_history[step][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_the_form_over_micro_batches_does_depend_on_it(tmp_path: Path) -> None:
    """Otherwise the test above would prove nothing."""
    whole, (seen, _) = two_steps(tmp_path, "16x1", every_phase("micro_batch"))
    parted, (others, _) = two_steps(tmp_path, "2x8", every_phase("micro_batch"))
    assert_same_generation(seen, others)
    assert gradient_distance(parted.gradients[1], whole.gradients[1]) > 1e-3


@pytest.mark.parametrize("unit", ["token", "sequence", 8])
def test_a_step_within_a_larger_generation(unit: Any, tmp_path: Path) -> None:
    """Two steps take the halves of one generation: each half counts its own tokens."""
    gradients: list[list[dict[str, Tensor]]] = []
    for split, (rows, accumulation) in {"16x1": (16, 1), "2x8": (2, 8)}.items():
        objective = Objective(policy=Watched(mean=Mean(unit=unit)), spread=KLCov(fraction=0.1))
        settings = {"steps_per_generation": 2 * accumulation, "num_iterations": 1}
        trace, (seen, _) = two_steps(tmp_path, split, objective, **settings)
        assert [batch.shape[0] for batch in seen] == [rows] * (32 // rows)
        halves = [sum(int(b.loss_mask.sum()) for b in part) for part in (seen[:accumulation], seen[accumulation:])]
        assert halves[0] != halves[1]
        gradients.append(trace.gradients)
    for ours, theirs in zip(*gradients, strict=True):
        assert gradient_distance(ours, theirs) <= 1e-6
