"""Heads of many families: streamed inside the forward, they give what the materialised logits give."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import (
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    GraniteMoeConfig,
    NanoChatConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from rlstab.batch import ExactDivergence
from rlstab.errors import ConfigError
from rlstab.losses import ForwardKL, JensenShannon, ReverseKL
from rlstab.models import language_head
from rlstab.trainers._exact_pass import Statistics, Streaming, completion_labels

VOCABULARY, WIDTH = 23, 16
PROMPT, COMPLETION = 4, 6
SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": 32}
END: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3, tied": lambda: Qwen3Config(**SIZE, tie_word_embeddings=True),
    "qwen3, untied": lambda: Qwen3Config(**SIZE, tie_word_embeddings=False),
    "gemma2": lambda: Gemma2Config(**SIZE, final_logit_softcapping=1.5),
    "gemma3": lambda: Gemma3TextConfig(**SIZE, final_logit_softcapping=2.0),
    "gemma3, no soft-cap": lambda: Gemma3TextConfig(**SIZE),
    "nanochat": lambda: NanoChatConfig(**SIZE, final_logit_softcapping=3.0),
    "granite": lambda: GraniteConfig(**SIZE, logits_scaling=3.0),
    "granite moe": lambda: GraniteMoeConfig(**SIZE, logits_scaling=0.5, num_local_experts=2),
    "cohere": lambda: CohereConfig(**_without("head_dim"), logit_scale=0.3),
    "cohere2": lambda: Cohere2Config(**SIZE, logit_scale=4.0),
    "phi, bias": lambda: PhiConfig(**_without("head_dim")),
    "gpt2": lambda: GPT2Config(**GPT2, **END),
}
TEMPERATURE = 0.7
DIVERGENCES = tuple(ExactDivergence(generator, "initial") for generator in (ReverseKL(), ForwardKL(), JensenShannon()))


def _without(*names: str) -> dict[str, Any]:
    return {key: value for key, value in SIZE.items() if key not in names}


def drawn(make: Callable[[], Any], seed: int) -> Any:
    """A model of the family in float64, with large weights: soft-caps bend, biases matter."""
    torch.manual_seed(seed)
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.dim() > 1 else 0.2))
    return model


def pair(family: str) -> tuple[Any, Any]:
    """A policy, and a reference of other weights."""

    def make() -> Any:
        return AutoModelForCausalLM.from_config(FAMILIES[family](), experts_implementation="eager")

    return drawn(make, 0), drawn(make, 1)


def micro_batch(rows: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Padded prompts and completions, as the host keeps them; as a model takes them; and what is in the loss."""
    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(3, VOCABULARY, (rows, PROMPT), generator=generator)
    completion = torch.randint(3, VOCABULARY, (rows, COMPLETION), generator=generator)
    prompt_mask, mask = torch.ones_like(prompt), torch.ones_like(completion)
    prompt_mask[0, :2] = 0
    mask[1, 3:] = 0
    scored = mask.bool()
    scored[2, 1] = False  # a tool's
    inputs = {"prompt_ids": prompt, "completion_ids": completion}
    call = {
        "input_ids": torch.cat([prompt, completion], dim=1),
        "attention_mask": torch.cat([prompt_mask, mask], dim=1),
    }
    return inputs, call, scored


def streamed(policy: Any, reference: Any, call: dict[str, Any], labels: Tensor) -> dict[str, Tensor]:
    """By hidden states and heads."""
    streaming = Streaming(TEMPERATURE)
    for model in (policy, reference):
        streaming.attach(model)
    states = {"initial": streaming.states(reference, Accelerator(cpu=True), call, labels)}
    found: dict[str, Tensor] = policy(within=Statistics(streaming, DIVERGENCES, states), labels=labels, **call)
    return {name: value[:, -COMPLETION:] for name, value in found.items()}


def dense(policy: Any, reference: Any, call: dict[str, Any], ids: Tensor, scored: Tensor) -> dict[str, Tensor]:
    """By the logits of the models themselves and autograd."""
    logp = (policy(**call).logits[:, PROMPT - 1 : -1] / TEMPERATURE).log_softmax(-1)
    with torch.no_grad():
        ref = (reference(**call).logits[:, PROMPT - 1 : -1] / TEMPERATURE).log_softmax(-1)
    p, q = logp.exp(), ref.exp()
    middle = ((p + q) / 2).log()
    values = {
        "logp": logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1),
        "entropy": -(p * logp).sum(-1),
        DIVERGENCES[0].key: (p * (logp - ref)).sum(-1),
        DIVERGENCES[1].key: (q * (ref - logp)).sum(-1),
        DIVERGENCES[2].key: (p * (logp - middle) + q * (ref - middle)).sum(-1) / 2,
    }
    return {name: torch.where(scored, value, 0.0) for name, value in values.items()}


def gradients(model: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every parameter, in a sum that tells values and tokens apart."""
    total = torch.zeros((), dtype=torch.float64)
    for weight, name in enumerate(sorted(values), start=1):
        tokens = torch.linspace(0.5, 1.5, values[name].numel()).reshape(values[name].shape)
        total = total + weight * (tokens * values[name]).sum()
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_agree(policy: Any, reference: Any, call: dict[str, Any], inputs: dict[str, Tensor], scored: Tensor) -> None:
    originals = copy.deepcopy(policy), copy.deepcopy(reference)
    theirs = dense(*originals, call, inputs["completion_ids"], scored)
    ours = streamed(policy, reference, call, completion_labels(inputs, scored))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-11, msg=name)
    expected, found = gradients(originals[0], theirs), gradients(policy, ours)
    assert found.keys() == expected.keys()
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-9 * norm, name


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_the_logits(family: str) -> None:
    inputs, call, scored = micro_batch()
    assert_agree(*pair(family), call, inputs, scored)


@pytest.mark.parametrize(
    ("family", "cap", "scale", "bias"),
    [
        ("qwen3, tied", None, 1.0, False),
        ("gemma2", 1.5, 1.0, False),
        ("granite", None, 1 / 3, False),
        ("cohere", None, 0.3, False),
        ("phi, bias", None, 1.0, True),
    ],
)
def test_a_head_is_read_off_the_model(family: str, cap: float | None, scale: float, bias: bool) -> None:
    model = pair(family)[0]
    head = language_head(model, temperature=TEMPERATURE)
    assert (head.soft_cap, head.logit_scale, head.temperature) == (cap, scale, TEMPERATURE)
    assert head.weight is model.get_output_embeddings().weight
    assert (head.bias is not None) == bias


def test_a_model_without_a_head_is_refused() -> None:
    backbone = pair("qwen3, tied")[0].model
    with pytest.raises(ConfigError, match="Qwen3Model has no output embedding: expected a causal language model"):
        language_head(backbone)


def qwen2_vl() -> Any:
    """A multimodal model that tells images by their grid."""
    text = {
        **_without("head_dim", "pad_token_id"),
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    text["rope_parameters"]["rope_theta"] = 10000.0
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2}
    vision |= {"patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 1}
    special: dict[str, Any] = {
        "image_token_id": 19,
        "video_token_id": 20,
        "vision_start_token_id": 21,
        "vision_end_token_id": 22,
    }
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **special))


def test_images_are_seen_by_policy_and_reference() -> None:
    inputs, call, scored = micro_batch()
    inputs["completion_ids"] %= 16  # text only
    inputs["completion_ids"] += 3
    inputs["prompt_ids"][:, 1:4] = torch.tensor([21, 19, 22])
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    images: dict[str, Any] = {
        "pixel_values": torch.randn(12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * 3),
        "mm_token_type_ids": (ids == 19).int(),
    }
    call |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}
    policy, reference = drawn(qwen2_vl, 0), drawn(qwen2_vl, 1)
    blank = {**call, "pixel_values": torch.zeros_like(images["pixel_values"])}
    with torch.no_grad():
        assert not torch.allclose(policy(**blank).logits, policy(**call).logits)
    assert_agree(policy, reference, call, inputs, scored)
