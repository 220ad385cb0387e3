"""Exact divergences inside the trainer: against dense logits; with adapters, images, half precision, and at +inf."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import config, gradient_distance, tool_rollout
from peft import PromptTuningConfig
from small_runs import (
    TOKENIZER,
    assert_same_weights,
    lora,
    run_folder,
    tiny_adapted,
    tiny_policy,
    trainer_of,
    weights,
)
from tiny_vlm import image_prompts, tiny_processor, tiny_vlm
from torch import Tensor, nn
from transformers import PhiConfig, PhiForCausalLM, Qwen2ForCausalLM

from rlstab.losses import (
    ClippedSurrogate,
    EntropyBonus,
    ForwardKL,
    JensenShannon,
    Objective,
    ReverseKL,
)
from rlstab.models import isolated_rng
from rlstab.trainers import Signals, StableGRPOTrainer
from rlstab.trainers._batches import LOSS_MASK
from rlstab.trainers._skip import drop_gradients, skip_update

TWICE = {"num_iterations": 2, "gradient_accumulation_steps": 2}
TEMPERATURE = 0.7
KEYS = {"reverse_kl() from initial", "jensen_shannon() from initial"}


def exact(**changes: Any) -> Objective:
    """A surrogate, two divergences from one reference, and the entropy."""
    return Objective(
        policy=ClippedSurrogate(),
        near=0.2 * ReverseKL(form="exact"),
        even=0.1 * JensenShannon(form="exact"),
        entropy=EntropyBonus(coef=0.01),
        **changes,
    )


def first_batch(trainer: Any) -> dict[str, Any]:
    """What the first micro-batch of a run is made of."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    inputs: dict[str, Any] = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return inputs


def moved(trainer: Any, by: float = 0.05) -> Any:
    """The trainer, its trainable weights moved off the start."""
    with torch.no_grad(), isolated_rng(5):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn_like(parameter)
    return trainer


def log_probs(model: Any, inputs: Mapping[str, Any], extra: Mapping[str, Any]) -> Tensor:
    """Of every token at every completion position, by the model's own logits, in float64."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    logits = model(ids, attention_mask=mask, **extra).logits[:, -inputs["completion_ids"].size(1) - 1 : -1]
    logp: Tensor = (logits.double() / TEMPERATURE).log_softmax(-1)
    return logp


def by_enumeration(model: Any, initial: Any, inputs: Mapping[str, Any], **extra: Any) -> dict[str, Tensor]:
    """What the pass should give, with gradient by autograd."""
    logp = log_probs(model, inputs, extra)
    with torch.no_grad():
        ref = log_probs(initial, inputs, extra)
    p, q = logp.exp(), ref.exp()
    middle = ((p + q) / 2).log()
    values = {
        "logp": logp.gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1),
        "entropy": -(p * logp).sum(-1),
        "reverse_kl() from initial": (p * (logp - ref)).sum(-1),
        "jensen_shannon() from initial": (p * (logp - middle) + q * (ref - middle)).sum(-1) / 2,
    }
    mask = inputs["completion_mask"].bool()
    if "tool_mask" in inputs:
        mask &= inputs["tool_mask"].bool()
    return {name: torch.where(mask, value, 0.0) for name, value in values.items()}


def gradients(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of every trainable parameter in a sum that tells the values apart."""
    model.zero_grad()
    torch.stack(
        [(place + 1) * values[name].double().sum() for place, name in enumerate(sorted(values))]
    ).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_dense(trainer: Any, initial: Any, inputs: dict[str, Any], **extra: Any) -> None:
    """The pass of a micro-batch equals enumeration; parameters hold their gradients in between."""
    logps, vocab, aux_loss = trainer._pass(trainer.model, inputs, aux_loss=False)
    ours = {"logp": logps, **vocab}
    assert vocab.keys() == KEYS | {"entropy"}
    assert aux_loss is None
    found = gradients(trainer.model, ours)
    theirs = by_enumeration(trainer.model, initial.eval(), inputs, **extra)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].double(), value, rtol=1e-4, atol=1e-6, msg=name)
    assert gradient_distance(found, gradients(trainer.model, theirs)) <= 1e-5
    assert float(theirs["reverse_kl() from initial"].detach().sum()) > 0.01


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("policy", ["dense", "new adapter", "own adapter", "adapter with a head", "prompt"])
def test_values_and_gradients_are_those_of_dense_logits(policy: str, checkpointing: bool, tmp_path: Path) -> None:
    settings = {"temperature": TEMPERATURE, "gradient_checkpointing": checkpointing}
    extra: dict[str, Any] = {}
    if policy == "own adapter":
        extra["model"] = tiny_adapted()
    elif policy == "prompt":
        extra["peft_config"] = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    elif policy != "dense":
        adapter = lora()
        adapter.modules_to_save = ["lm_head"] if policy == "adapter with a head" else None
        extra["peft_config"] = adapter
    if policy == "adapter with a head":
        extra["model"] = untied()
    trainer = moved(
        trainer_of(tmp_path, exact(), signals=None, settings=settings, **extra), by=0.5 if policy == "prompt" else 0.05
    )
    initial = {"own adapter": tiny_adapted, "adapter with a head": untied}.get(policy, tiny_policy)()
    assert_dense(trainer, initial, first_batch(trainer))


def untied() -> Any:
    """The tiny policy with a head of its own."""
    tied = tiny_policy()
    configuration = type(tied.config)(**{**tied.config.to_dict(), "tie_word_embeddings": False})
    with isolated_rng(1):
        model = Qwen2ForCausalLM(configuration)
    model.generation_config = tied.generation_config
    return model


def test_adapters_share_the_head_and_others_do_not(tmp_path: Path) -> None:
    """A head that both have is read once for both, which is told by its weight being one tensor."""

    def one_weight(**extra: Any) -> bool:
        trainer = trainer_of(tmp_path, exact(), signals=None, **extra)
        with trainer._references.use("initial", trainer.model, trainer.accelerator) as reference:
            base = reference.get_base_model() if "peft_config" in extra else reference
            head = base.get_output_embeddings().weight
        policy = trainer.model.get_base_model() if "peft_config" in extra else trainer.model
        return head is policy.get_output_embeddings().weight

    assert one_weight(peft_config=lora())
    assert not one_weight()


def test_tokens_of_tools_are_not_scored(tmp_path: Path) -> None:
    trainer = moved(
        trainer_of(tmp_path, exact(), signals=None, settings={"temperature": TEMPERATURE}, rollout_func=tool_rollout)
    )
    inputs = first_batch(trainer)
    assert not inputs["tool_mask"].all()
    assert_dense(trainer, tiny_policy(), inputs)


def length_reward(completions: list[Any], **_: Any) -> list[float]:
    """Longer is better."""
    return [float(len(completion[0]["content"])) for completion in completions]


def vlm_trainer(output: Path, **extra: Any) -> Any:
    """A trainer of the tiny multimodal policy."""
    processor = tiny_processor()
    settings = extra.pop("settings", {})
    return StableGRPOTrainer(
        tiny_vlm(processor),
        length_reward,
        config(output, **settings),
        objective=exact(),
        train_dataset=image_prompts(),
        processing_class=processor,
        **extra,
    )


def test_images_are_scored_as_the_model_scores_them(tmp_path: Path) -> None:
    trainer = moved(vlm_trainer(tmp_path, signals=None, settings={"temperature": TEMPERATURE}))
    inputs = first_batch(trainer)
    start = tiny_vlm(tiny_processor())
    assert_dense(trainer, start, inputs, pixel_values=inputs["pixel_values"])
    blank = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
    with torch.no_grad():
        seen, blind = (trainer._pass(trainer.model, given, aux_loss=False)[0] for given in (inputs, blank))
    assert not torch.allclose(seen, blind, atol=1e-3)


def test_a_run_with_images_watches_its_drift(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "folder")
    signals = Signals(drift_every=1, drift_positions=10_000)
    trainer = vlm_trainer(tmp_path, signals=signals, run=folder, settings={"max_steps": 3, **TWICE})
    trainer.train()
    rows = [row.values for row in folder.metrics().rows]
    assert rows[0]["drift/initial/kl"] == 0.0
    # All positions of one micro-batch of two: near the divergence of both.
    for row in rows[1:]:
        assert row["drift/initial/kl"] == pytest.approx(row["objective/near/value"], rel=0.3)
        assert row["objective/near/value"] > 1e-4
    prompt: Any = folder.rollouts().rows[0].fields["prompt"]
    assert [part["type"] for part in prompt[0]["content"]] == ["image", "text"]


class Passes:
    """How often the backbone of a model runs, with and without gradient."""

    def __init__(self, model: Any) -> None:
        self.with_gradient = self.without = 0
        model.base_model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.with_gradient += 1
        else:
            self.without += 1


def test_a_micro_batch_takes_one_pass_of_each_model(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, exact(), signals=None)
    inputs = first_batch(trainer)
    policy, initial = Passes(trainer.model), Passes(trainer._references._models["initial"])
    trainer._compute_loss(trainer.model, inputs).backward()
    assert (policy.with_gradient, policy.without) == (1, 0)
    assert (initial.with_gradient, initial.without) == (0, 1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_half_precision_the_first_update_has_ratios_of_one(checkpointing: bool, tmp_path: Path) -> None:
    """The old log-probs come from the same kind of pass, though from other micro-batches."""
    folder = run_folder(tmp_path / "folder")
    settings = {"bf16": True, "max_steps": 2, "gradient_checkpointing": checkpointing, **TWICE}
    trainer_of(tmp_path, exact(), signals=None, run=folder, settings=settings).train()
    first, second = (row.values["policy/ratio_max"] for row in folder.metrics().rows)
    assert first == pytest.approx(1.0, abs=1e-6)
    assert second > 1.01


def test_several_references_share_the_pass(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "folder")
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
    objective = exact(pull=0.1 * ForwardKL(form="exact", reference="moving"))
    trainer_of(tmp_path, objective, signals=None, run=folder, settings={"max_steps": 4, **moving, **TWICE}).train()
    rows = [row.values for row in folder.metrics().rows]
    assert [row["objective/near/value"] == 0.0 for row in rows] == [True, False, False, False]
    assert [row["objective/pull/value"] == 0.0 for row in rows] == [True, False, True, False]


def test_a_micro_batch_without_tokens_trains_on(tmp_path: Path) -> None:
    trainer = moved(trainer_of(tmp_path, exact(), signals=None))
    inputs = first_batch(trainer)
    inputs[LOSS_MASK] = torch.zeros_like(inputs[LOSS_MASK])
    logps, vocab, _ = trainer._pass(trainer.model, inputs, aux_loss=False)
    assert not any(value.any() for value in (logps, *vocab.values()))
    found = gradients(trainer.model, {"logp": logps, **vocab})
    assert found.keys() == {name for name, _ in trainer.model.named_parameters()}
    assert not any(gradient.any() for gradient in found.values())


# ---------------------------------------------------------------------- where there is no finite value


def phi() -> Any:
    """A model whose head has a bias, which can exclude tokens."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with isolated_rng(1):
        return PhiForCausalLM(PhiConfig(**dict[str, Any]({"vocab_size": len(TOKENIZER), **size, **special})))


def excluding_run(output: Path, **extra: Any) -> tuple[list[dict[str, float]], list[Any], Any]:
    """Three updates of one generation; at the second only, the reference gives one token no mass."""
    folder = run_folder(output / "folder")
    settings = {"max_steps": 3, "num_iterations": 3, "max_grad_norm": 1.0}
    trainer = trainer_of(output, exact(), model=phi(), signals=None, run=folder, settings=settings, **extra)
    bias = trainer._references._models["initial"].lm_head.bias
    compute, states = trainer._compute_loss, []

    def computed(model: Any, inputs: Any) -> Tensor:
        states.append(weights(trainer))
        with torch.no_grad():
            bias[5] = -math.inf if trainer.state.global_step == 1 else 0.0
        loss: Tensor = compute(model, inputs)
        return loss

    trainer._compute_loss = computed
    with pytest.warns(RuntimeWarning, match="objective term 'near': its exact value exceeds the range"):
        trainer.train()
    states.append(weights(trainer))
    return [dict(row.values) for row in folder.metrics().rows], states, folder


def test_a_step_without_finite_divergence_is_counted_named_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="rlstab"):
        rows, states, folder = excluding_run(tmp_path)
    assert [row["objective/near/overflow"] > 0 for row in rows] == [False, True, False]
    assert rows[1]["objective/near/value"] == math.inf
    assert math.isfinite(rows[1]["objective/even/value"])
    assert [row["objective/even/overflow"] for row in rows] == [0.0] * 3
    assert_same_weights(states[2], states[1])
    for before, after in ((0, 1), (2, 3)):
        assert any(not torch.equal(states[before][name], states[after][name]) for name in states[0])
    assert all(value.isfinite().all() for value in states[3].values())
    (event,) = folder.events().of("step_skipped")
    assert (event.step, event.fields["terms"]) == (2, ["near"])
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert said == ["step 2: its update is left out, because near is +inf at some tokens"]


def test_such_a_step_is_made_on_request(tmp_path: Path) -> None:
    _, states, folder = excluding_run(tmp_path, skip_overflow=False)
    assert any(not torch.equal(states[2][name], states[1][name]) for name in states[0])
    assert all(value.isfinite().all() for value in states[3].values())
    assert not folder.events().of("step_skipped")


def test_a_gradient_scaler_leaves_the_update_out_itself() -> None:
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    drop_gradients(model, scaled=True)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.weight, before)
    assert scaler.get_scale() == 4.0


def test_deepspeed_has_made_its_update_already(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, exact(), signals=None)
    trainer._compute_loss(trainer.model, first_batch(trainer)).backward()
    trainer.is_deepspeed_enabled = True
    with caplog.at_level(logging.WARNING, logger="rlstab"):
        assert not skip_update(trainer, ["near", "even"])
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())
    assert "near, even are +inf, but DeepSpeed has made its update already" in caplog.text
