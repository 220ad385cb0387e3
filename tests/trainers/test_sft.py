"""Supervised training: the host's losses equal the host's own, and imitation terms see demonstrations as rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from equality import Trace, gradient_distance, run
from peft import PromptTuningConfig, TaskType
from small_runs import TOKENIZER, assert_same_weights, lora, tiny_adapted, tiny_policy, weights, without_times
from test_exact_training import phi
from torch import Tensor
from transformers import TrainerCallback
from trl import SFTTrainer

from rlstab.batch import TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses import (
    CHORD,
    DFT,
    PSFT,
    SFT,
    ClippedSurrogate,
    EntropyBonus,
    EntropySFT,
    ImportanceSFT,
    Linear,
    Loss,
    Objective,
    PolicyShaping,
    ReverseKL,
    Term,
    TrSFT,
    ZLoss,
    presets,
)
from rlstab.models import tiny_moe
from rlstab.monitors import Level, RollBack, Rule
from rlstab.trainers import Guard, SFTConfig, TrustRegionSFTTrainer, watch

PAIRS = {
    "prompt": [f"{i * 7919 % 1000}=" for i in range(32)],
    "completion": ["".join(sorted(str(i * 7919 % 1000))) + "+" * (i % 4) for i in range(32)],
}
TEXTS = {"text": [p + c for p, c in zip(PAIRS["prompt"], PAIRS["completion"], strict=True)]}


def settings(output: Path, **changes: Any) -> SFTConfig:
    """A small, deterministic run on the CPU."""
    values: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "max_steps": 3,
        "max_grad_norm": 0.0,
        "max_length": None,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    }
    return SFTConfig(**{**values, **changes})


def sft(
    output: Path,
    objective: Objective | Term | None = None,
    *,
    host: bool = False,
    data: Mapping[str, list[str]] = PAIRS,
    model: Any = None,
    extra: Mapping[str, Any] | None = None,
    ours: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """The host's trainer, or the drop-in."""
    given: dict[str, Any] = {
        "args": settings(output, **changes),
        "train_dataset": Dataset.from_dict(dict(data)),
        "processing_class": TOKENIZER,
        **(extra or {}),
    }
    policy = model if model is not None else tiny_policy()
    return (
        SFTTrainer(policy, **given)
        if host
        else TrustRegionSFTTrainer(policy, objective=objective, **given, **(ours or {}))
    )


FLAT: dict[str, Any] = {"padding_free": True}
PACKED: dict[str, Any] = {"packing": True, "max_length": 24}
CASES: dict[str, dict[str, Any]] = {
    "completions only": {"gradient_accumulation_steps": 3},
    "texts": {"data": TEXTS},
    "dft": {"loss_type": "dft"},
    "padding-free": FLAT,
    "padding-free texts, padded to a multiple": {**FLAT, "data": TEXTS, "pad_to_multiple_of": 16},
    "packed": PACKED,
    "wrapped": {**PACKED, "packing_strategy": "wrapped"},
    "checkpointed": {"gradient_checkpointing": True},
    "lora": {"peft": True, "loss_type": "dft"},
    "mixture of experts": {"moe": True},
}


@pytest.mark.parametrize("case", CASES)
def test_the_hosts_losses_equal_the_host(case: str, tmp_path: Path) -> None:
    changes = dict(CASES[case])
    peft, moe, loss_type = changes.pop("peft", False), changes.pop("moe", False), changes.get("loss_type", "nll")
    extra: dict[str, Any] = {"eval_dataset": Dataset.from_dict(dict(changes.get("data", PAIRS))).select(range(6))}
    if peft:
        extra["peft_config"] = lora()
    changes |= {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 6}
    traces: list[Trace] = []
    for objective in (None, presets.sft() if loss_type == "nll" else presets.dft()):
        own = {**changes, "loss_type": "nll"} if objective else changes
        model = tiny_moe(TOKENIZER, seed=1) if moe else None
        traces.append(run(sft(tmp_path, objective, extra=extra, model=model, **own)))
    model = tiny_moe(TOKENIZER, seed=1) if moe else None
    hosts = run(sft(tmp_path, host=True, extra=extra, model=model, **changes))
    assert len(hosts.gradients) == 3
    rounding = 1e-5 if "padding-free" in case or case == "packed" else 0.0  # sums go by demonstration there
    for trace in traces:
        assert trace.losses == pytest.approx(hosts.losses, rel=rounding, abs=0)
        for mine, theirs in zip(trace.gradients, hosts.gradients, strict=True):
            assert gradient_distance(mine, theirs) <= 1e-6
        for line, expected in zip(trace.logs, hosts.logs, strict=True):
            known = {key: float(value) for key, value in without_times(line).items() if key in expected}
            numbers = {key: float(value) for key, value in without_times(expected).items()}
            assert known == pytest.approx(numbers, rel=rounding or 1e-12)


@dataclass(frozen=True, kw_only=True)
class WatchedPSFT(PSFT):
    """PSFT that keeps every batch it is shown."""

    seen: list[TokenBatch] = field(default_factory=list, repr=False, compare=False)

    def loss(self, batch: TokenBatch) -> Loss:
        """The loss, unchanged."""
        self.seen.append(batch)
        return super().loss(batch)


def of_rows() -> Objective:
    """Terms whose weights, means and references are those of whole demonstrations."""
    return Objective(
        importance=ImportanceSFT(tau=1.0).mean("sequence"),
        entropy=EntropySFT().mean("sequence"),
        proximal=PSFT(high=0.05).mean("token"),
        anchor=ReverseKL(form="exact", rows="demonstration", coef=0.1).mean("sequence"),
        partition=ZLoss(rows="demonstration", coef=1e-2).mean("token"),
    )


def test_rows_are_demonstrations_however_they_are_laid_out(tmp_path: Path) -> None:
    layouts: list[dict[str, Any]] = [
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        {},
        FLAT,
        {**FLAT, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "pad_to_multiple_of": 16},
    ]
    traces = [run(sft(tmp_path, of_rows(), ours={"snapshot_every": 4}, **layout)) for layout in layouts]
    whole = traces[0]
    assert len(whole.gradients) == 3
    for trace in traces[1:]:
        steps = torch.tensor(trace.losses).view(3, -1).sum(-1)
        torch.testing.assert_close(steps, torch.tensor(whole.losses), rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(trace.gradients, whole.gradients, strict=True):
            assert gradient_distance(mine, theirs) <= 1e-4


@pytest.mark.parametrize("adapter", [False, True])
def test_old_is_the_policy_of_the_last_snapshot(adapter: bool, tmp_path: Path) -> None:
    term = WatchedPSFT(high=0.1)
    model = tiny_adapted() if adapter else None
    trainer = sft(
        tmp_path, term, model=model, ours={"snapshot_every": 2}, gradient_accumulation_steps=1, shuffle_dataset=False
    )
    start = weights(trainer)
    trainer.train()
    ended = weights(trainer)
    assert [("old" in batch.logps) for batch in term.seen] == [False, True, False]
    later = term.seen[1]
    assert (later.logp("old") - later.logp("policy")).abs().max() > 1e-3
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name in start:
                parameter.copy_(start[name])
    samples = list(trainer.get_train_dataloader())[1]
    trainer._prepare_inputs(samples)
    scores = trainer.model(**samples, use_cache=False, fused_lm_head=True).log_probs
    torch.testing.assert_close(later.logp("old"), scores.detach())
    assert any(not torch.equal(start[name], ended[name]) for name in start)


def enumerated(trainer: Any, inputs: Mapping[str, Tensor], initial: Any) -> Tensor:
    """ASFT with an entropy bonus and a z-loss, from logits in float64."""
    call = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    logits = trainer.model(**call).logits[:, :-1].double()
    with torch.no_grad():
        reference = initial(**call).logits[:, :-1].double().log_softmax(-1)
    logp, labels = logits.log_softmax(-1), inputs["labels"][:, 1:]
    scored = labels != -100
    own = logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    kl = (reference.exp() * (reference - logp)).sum(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    total = -own.detach().exp() * own + 0.1 * kl - 0.01 * entropy + 1e-3 * logits.logsumexp(-1).square()
    loss: Tensor = (total * scored).sum() / scored.sum()
    return loss


@pytest.mark.parametrize("adapter", [False, True])
def test_anchored_sft_is_what_enumeration_says(adapter: bool, tmp_path: Path) -> None:
    objective = presets.asft() + Objective(
        entropy=EntropyBonus(coef=0.01, rows="demonstration"), z=ZLoss(coef=1e-3, rows="demonstration")
    )
    trainer = sft(tmp_path, objective, model=tiny_adapted() if adapter else None)
    initial = tiny_adapted() if adapter else tiny_policy()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    expected = enumerated(trainer, inputs, initial)
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = []
    for value in (loss, expected):
        trainer.model.zero_grad()
        value.backward()
        gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})
    assert gradient_distance(*gradients) <= 1e-5
    assert trainer._metrics["train"]["mean_token_accuracy"]


@pytest.mark.parametrize("flat", [False, True])
def test_demonstrations_without_a_token_are_counted_and_do_nothing(flat: bool, tmp_path: Path) -> None:
    ids = [[5, 6, 7, 8], [5, 6, 7], [6, 7, 8]]
    labels = [[-100, -100, 7, 8], [-100] * 3, [-100] * 3]
    data = Dataset.from_dict({"input_ids": ids, "labels": labels})
    layout: dict[str, Any] = FLAT if flat else {}
    trainer = sft(
        tmp_path,
        Objective(a=ImportanceSFT().mean("sequence"), b=EntropySFT().mean("token"), c=PSFT().mean("sequence")),
        extra={"train_dataset": data},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        max_steps=1,
        **layout,
    )
    trace = run(trainer)
    assert sorted(map(abs, trace.losses))[:2] == [0.0, 0.0]
    assert all(gradient.isfinite().all() for gradient in trace.gradients[0].values())
    assert trace.logs[0]["demonstrations/empty"] == pytest.approx(2 / 3)  # the host logs means of micro-batches


def test_resuming_follows_the_same_trajectory(tmp_path: Path) -> None:
    def objective() -> Objective:
        return Objective(p=PSFT(high=0.02, coef=Linear(start=1.0, end=0.1, steps=5)), c=CHORD(coef=0.5))

    shared: dict[str, Any] = {"max_steps": 5, "save_steps": 3, "ours": {"snapshot_every": 4}}
    whole = sft(tmp_path / "a", objective(), save_strategy="steps", **shared)
    whole.train()
    resumed = sft(tmp_path / "b", objective(), **shared)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert_same_weights(weights(resumed), weights(whole))
    other = sft(tmp_path / "c", SFT(), **shared)
    with pytest.raises(ConfigError, match="controllers"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))


def test_going_back_takes_the_earlier_policy_and_the_coefficients_along(tmp_path: Path) -> None:
    objective = Objective(p=PSFT(high=0.02, coef=Linear(start=1.0, end=0.1, steps=5)), c=CHORD(coef=0.5))
    trainer = sft(tmp_path, objective, ours={"snapshot_every": 2}, max_steps=4)
    start, untouched = weights(trainer), objective.state_dict()
    moved: list[tuple[dict[str, Tensor], dict[str, Any]]] = []

    class Look(TrainerCallback):
        """What there is to undo, before the step that goes back ends."""

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                old = trainer._snapshots["old"].state_dict()
                moved.append(({name: kept.clone() for name, kept in old.items()}, objective.state_dict()))

    back = Rule(signal="step/loss", detector=Level(above=-1e9, steps=4), action=RollBack(remedy=None), cause="numerics")
    watch(trainer, [back], guard=Guard(checkpoints=False))
    trainer.add_callback(Look())
    trainer.train()
    assert_same_weights(weights(trainer), start)
    kept = trainer._snapshots["old"].state_dict()
    assert all(torch.equal(kept[str(i)], weight) for i, weight in enumerate(start.values()))
    assert objective.state_dict() == untouched
    ((old, coefficients),) = moved
    assert coefficients != untouched
    assert any(not torch.equal(old[name], weight) for name, weight in kept.items())


def test_a_snapshot_at_every_step_leaves_the_clip_inert(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rlstab"):
        sft(tmp_path, presets.psft(), ours={"snapshot_every": 1})
    assert "imitation: the clip of PSFT is inert" in caplog.text
    assert "snapshot_every > 1" in caplog.text


def test_an_infinite_anchor_costs_the_update(tmp_path: Path) -> None:
    trainer = sft(tmp_path, presets.asft(), model=phi(), max_steps=1)
    with torch.no_grad():
        trainer.model.lm_head.bias[5] = -torch.inf  # which the start does not exclude
    before = weights(trainer)
    with pytest.warns(RuntimeWarning, match="objective term 'anchor'"):
        trainer.train()
    assert_same_weights(weights(trainer), before)


@pytest.mark.parametrize(
    ("objective", "changes", "words"),
    [
        (ClippedSurrogate(), {}, ["rows that supervised training does not have", "rows='demonstration'"]),
        (PolicyShaping(), {}, ["advantages", "supervised training does not supply"]),
        (ImportanceSFT(reference="moving"), {}, ["'moving'", "'old' or 'initial'"]),
        (ReverseKL(form="exact", reference="moving", rows="demonstration"), {}, ["does not supply"]),
        (DFT(), {"loss_type": "dft"}, ["args.loss_type='dft'", "DFT()"]),
        (TrSFT(), {"label_smoothing_factor": 0.1}, ["label_smoothing_factor=0.1", "leave it at 0"]),
        (TrSFT(), {"extra": {"compute_loss_func": lambda *_: None}}, ["compute_loss_func", "term of your own"]),
        (presets.sft, {}, ["expected an Objective", "presets.trsft()"]),
        (PSFT(), {"ours": {"snapshot_every": 0}}, ["snapshot_every", "at least 1"]),
        (
            SFT(),
            {"extra": {"peft_config": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)}},
            ["prompt learning", "LoRA"],
        ),
    ],
)
def test_what_supervised_training_cannot_honour_is_refused(
    objective: Any, changes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        sft(tmp_path, objective, **changes)
    message = str(refused.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message
