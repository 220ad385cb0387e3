"""Distillation: the host's divergences equal the host's own, and the others are what enumeration says."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import Trace, gradient_distance, prompts, run
from small_runs import TOKENIZER, assert_same_weights, lora, weights
from test_exact_training import phi
from tiny_vlm import image_prompts, tiny_processor, tiny_vlm
from torch import Tensor
from trl import DistillationTrainer

from rlstab.errors import ConfigError
from rlstab.losses import (
    AlphaDivergence,
    CauchySchwarz,
    ClippedSurrogate,
    EntropyBonus,
    ForwardKL,
    GeneralizedJSD,
    Hellinger,
    JensenShannon,
    Linear,
    Objective,
    ReverseKL,
    SkewJSD,
    Term,
)
from rlstab.models import tiny_causal_lm
from rlstab.trainers import DistillationConfig, StableDistillationTrainer

TEMPERATURE = 0.8


def student(seed: int = 1) -> Any:
    return tiny_causal_lm(TOKENIZER, seed=seed, hidden=32, layers=2, heads=2)


def teacher() -> Any:
    """Wider than the student, and sure of itself."""
    model = tiny_causal_lm(TOKENIZER, seed=2, hidden=48, layers=1, heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


def settings(output: Path, **changes: Any) -> DistillationConfig:
    """A small, deterministic run on the CPU."""
    values: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": 6,
        "per_device_eval_batch_size": 6,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 8,
        "learning_rate": 5e-3,
        "max_steps": 3,
        "max_grad_norm": 0.0,
        "temperature": TEMPERATURE,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    }
    return DistillationConfig(**{**values, **changes})


def distil(output: Path, objective: Objective | Term | None = None, *, host: bool = False, **changes: Any) -> Any:
    """The host's trainer, or the drop-in."""
    extra: dict[str, Any] = {
        "model": changes.pop("model", None) or student(),
        "teacher_model": changes.pop("teacher_model", None) or teacher(),
        "train_dataset": prompts(),
        "processing_class": TOKENIZER,
        **changes.pop("extra", {}),
    }
    extra["args"] = settings(output, **changes)
    return DistillationTrainer(**extra) if host else StableDistillationTrainer(objective=objective, **extra)


def assert_same(ours: Trace, theirs: Trace) -> None:
    """As far as two orders of summation agree."""
    assert len(theirs.losses) == 6
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    for mine, hosts in zip(ours.gradients, theirs.gradients, strict=True):
        assert gradient_distance(mine, hosts) <= 1e-5
    for key in ("loss", "entropy", "grad_norm", "eval_loss", "eval_entropy"):
        logged = [[row[key] for row in trace.logs if key in row] for trace in (ours, theirs)]
        assert logged[0] == pytest.approx(logged[1], rel=1e-4)


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_the_hosts_divergences_equal_the_host(beta: float, peft: bool, tmp_path: Path) -> None:
    extra: dict[str, Any] = {"eval_dataset": prompts(6)}
    if peft:
        extra["peft_config"] = lora()
    evaluate: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 3}
    traces = [run(distil(tmp_path, host=host, beta=beta, extra=extra, **evaluate)) for host in (False, True)]
    assert "eval_loss" in traces[1].logs[-2]
    assert_same(*traces)


def test_named_divergences_are_those_of_the_host(tmp_path: Path) -> None:
    skewed = 0.21 * SkewJSD(alpha=0.3, form="exact", reference="teacher")
    assert_same(run(distil(tmp_path, skewed)), run(distil(tmp_path, host=True, beta=0.3)))


def first_batch(trainer: Any) -> dict[str, Any]:
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    inputs: dict[str, Any] = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return inputs


def enumerated(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """Three divergences and the entropy, from logits in float64, averaged as the host does."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    models = (trainer.model, trainer.teacher_model)
    logits = [m(ids, attention_mask=mask).logits[:, inputs["prompt_ids"].size(1) - 1 : -1].double() for m in models]
    logp, ref = ((z / TEMPERATURE).log_softmax(-1) for z in logits)
    p, q = logp.exp(), ref.exp().detach()
    u = p / q
    hellinger = ((p.sqrt() - q.sqrt()) ** 2).sum(-1)
    alpha = (q * (u**0.8 - 0.8 * u - 0.2) / (0.2 * -0.8)).sum(-1)
    cauchy_schwarz = q.square().sum(-1).log() + p.square().sum(-1).log() - 2 * (p * q).sum(-1).log()
    entropy = -(p * logp).sum(-1)
    total = hellinger + 0.5 * alpha + 0.1 * cauchy_schwarz - 0.01 * entropy
    loss: Tensor = (total * inputs["completion_mask"]).sum() / inputs["num_items_in_batch"]
    return loss


def test_every_generator_will_do_and_several_at_once(tmp_path: Path) -> None:
    objective = Objective(
        near=Hellinger(form="exact", reference="teacher"),
        far=0.5 * AlphaDivergence(alpha=0.2, form="exact", reference="teacher"),
        overlap=0.1 * CauchySchwarz(reference="teacher"),
        entropy=EntropyBonus(coef=0.01),
    )
    trainer = distil(tmp_path, objective)
    inputs = first_batch(trainer)
    expected = enumerated(trainer, inputs)
    gradients = []
    loss = trainer.compute_loss(trainer.model, inputs)
    scale = float(Hellinger().f(torch.tensor([1.0]))) / (math.exp(0.5) - 1) ** 2  # of (sqrt(u) - 1)², at u = e
    assert scale == pytest.approx(1.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for value in (loss, expected):
        trainer.model.zero_grad()
        value.backward()
        gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})
    assert gradient_distance(*gradients) <= 1e-5
    logged = trainer._metrics["train"]
    assert {f"objective/{name}/loss" for name in ("near", "far", "overlap", "entropy")} <= logged.keys()


def test_tokens_of_tools_are_left_out(tmp_path: Path) -> None:
    trainer = distil(tmp_path, ReverseKL(form="exact", reference="teacher"))
    inputs = first_batch(trainer)
    tool_mask = torch.ones_like(inputs["completion_mask"])
    tool_mask[:, 1] = 0
    host = distil(tmp_path, host=True)
    host.model.train()
    ours, theirs = (
        [one.compute_loss(one.model, {**inputs, **extra}).item() for extra in ({}, {"tool_mask": tool_mask})]
        for one in (trainer, host)
    )
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[1] < ours[0]


def test_images_reach_student_and_teacher(tmp_path: Path) -> None:
    processor = tiny_processor()
    extra = {"train_dataset": image_prompts(), "processing_class": processor}
    traces = [
        run(
            distil(
                tmp_path,
                host=host,
                model=tiny_vlm(processor),
                teacher_model=tiny_vlm(processor, seed=2),
                extra=extra,
            )
        )
        for host in (False, True)
    ]
    assert_same(*traces)


@pytest.mark.parametrize("skip", [True, False])
def test_a_teacher_that_excludes_a_token_costs_the_update(
    skip: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, master = phi(), phi()
    with torch.no_grad():
        master.lm_head.bias[5] = -math.inf
    trainer = distil(
        tmp_path,
        Objective(pull=ReverseKL(form="exact", reference="teacher")),
        model=model,
        teacher_model=master,
        max_steps=1,
        max_grad_norm=1.0,
        extra={"skip_overflow": skip},
    )
    before = weights(trainer)
    with (
        pytest.warns(RuntimeWarning, match="objective term 'pull': its exact value exceeds the range"),
        caplog.at_level(logging.WARNING, logger="rlstab"),
    ):
        trainer.train()
    assert trainer.state.log_history[0]["objective/pull/overflow"] > 0
    assert ("pull is +inf" in caplog.text) == skip
    if skip:
        assert_same_weights(weights(trainer), before)
    assert all(value.isfinite().all() for value in weights(trainer).values())


@pytest.mark.parametrize(
    ("objective", "changes", "words"),
    [
        (ReverseKL(form="exact"), {}, ["'initial'", "reference='teacher'"]),
        (ReverseKL(reference="teacher"), {}, ["LogProbs", "form='exact'"]),
        (ClippedSurrogate(), {}, ["distillation does not supply"]),
        (ForwardKL(form="exact", reference="teacher"), {"beta": 0.5}, ["args.beta=0.5", "GeneralizedJSD"]),
        (
            JensenShannon(form="exact", reference="teacher", coef=Linear(start=1.0, end=0.0, steps=8)),
            {},
            ["controller", "expected a number"],
        ),
    ],
)
def test_what_distillation_cannot_honour_is_refused(
    objective: Term, changes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        distil(tmp_path, objective, **changes)
    message = str(refused.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


def test_the_hosts_mixture_is_the_family_member_of_the_same_beta(tmp_path: Path) -> None:
    (term,) = distil(tmp_path, beta=0.3).objective.terms.values()
    assert term == GeneralizedJSD(beta=0.3, form="exact", reference="teacher")
