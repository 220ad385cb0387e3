"""Routes that come back with rollouts: those of a whole forward over prompt and completion."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlstab.errors import ConfigError
from rlstab.models import tiny_causal_lm, tiny_moe, tiny_tokenizer
from rlstab.rollouts import Request, Rollout, Sampling, TransformersEngine, load_rollouts, save_rollouts
from rlstab.routing import Routers, compact

PROMPTS = ["12=", "3+45=", "12=", "7=", "3+45=", "9+9+9="]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer("0123456789+=")


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    made = tiny_moe(tokenizer)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2.5)
    return made


def sampled(engine: TransformersEngine, tokenizer: PreTrainedTokenizerFast) -> list[Rollout]:
    requests = [
        Request(prompt_ids=tokenizer(prompt)["input_ids"], max_new_tokens=1 + 3 * (place % 3))
        for place, prompt in enumerate(PROMPTS)
    ]
    return engine.generate(requests, Sampling(max_new_tokens=9, seed=3))


def whole_forward(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    ids = torch.cat([rollout.prompt_ids, rollout.token_ids]).unsqueeze(0)
    with torch.no_grad(), Routers(model).recording() as own:
        model(ids)
    return own.routes(rows=1).experts[0, :-1]


@pytest.mark.parametrize("slots", [256, 2])
@pytest.mark.parametrize("by_rows", [True, False])
def test_routes_are_those_of_a_whole_forward(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, slots: int, by_rows: bool
) -> None:
    engine = TransformersEngine(model, tokenizer, slots=slots, prefill_tokens=12, routes=True)
    vars(engine)["_by_rows"] = by_rows  # as for models whose cache only they know
    rollouts = sampled(engine, tokenizer)
    assert {len(rollout.token_ids) for rollout in rollouts} >= {1, 4}
    for rollout in rollouts:
        assert rollout.routed_experts is not None
        assert rollout.routed_experts.dtype == torch.uint8
        assert rollout.routed_experts.shape == (len(rollout.prompt_ids) + len(rollout.token_ids) - 1, 2, 2)
        assert torch.equal(rollout.routed_experts, whole_forward(model, rollout))


def test_recording_changes_no_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with_routes, without = (
        sampled(TransformersEngine(model, tokenizer, routes=routes), tokenizer) for routes in (True, False)
    )
    for one, other in zip(with_routes, without, strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
        assert torch.equal(one.logprobs, other.logprobs)
        assert other.routed_experts is None


def test_an_engine_of_its_own_returns_its_own_routes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = TransformersEngine(model, tokenizer, share=False, routes=True)
    with torch.no_grad():
        for router in Routers(model).routers:
            router.modules[0].get_parameter("weight").neg_()
    for rollout in sampled(engine, tokenizer):
        assert rollout.routed_experts is not None
        assert not torch.equal(rollout.routed_experts, whole_forward(model, rollout))


def test_routes_of_an_adapted_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    rollouts = sampled(TransformersEngine(cast(Any, adapted), tokenizer, routes=True), tokenizer)
    assert all(torch.equal(r.routed_experts, whole_forward(adapted, r)) for r in rollouts)  # type: ignore[arg-type]


def test_routes_are_kept_in_files(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rollouts = sampled(TransformersEngine(model, tokenizer, routes=True), tokenizer)
    save_rollouts(tmp_path / "rollouts.safetensors", rollouts)
    assert load_rollouts(tmp_path / "rollouts.safetensors") == rollouts


def test_a_dense_model_has_no_routes_to_return(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"expected a mixture of experts, .* got a model without routers"):
        TransformersEngine(tiny_causal_lm(tokenizer), tokenizer, routes=True)


def test_compact_ids_keep_their_values() -> None:
    assert compact(torch.tensor([0, 255]), 256).tolist() == [0, 255]
    assert compact(torch.tensor([0, 256]), 257).tolist() == [0, 256]
