"""The embedded engine: models of every cache, streams of their own, and a trainer that is left as it was."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from scoring import trainer_logprobs
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlstab.errors import ConfigError, EngineError, WeightSyncError
from rlstab.models import tiny_causal_lm, tiny_moe
from rlstab.rollouts import ModelWeights, Request, Rollout, Sampling, TransformersEngine
from rlstab.rollouts import _continuous as continuous

REQUESTS = [
    Request(prompt_ids=[3 + (7 * i + j) % 13 for j in range(1 + (5 * i) % 15)], max_new_tokens=1 + (37 * i) % 60)
    for i in range(12)
]
SAMPLING = Sampling(max_new_tokens=60, seed=1)

SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama() -> PreTrainedModel:
    """Fewer heads for keys than for queries; a head of its own."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=False))


def mistral() -> PreTrainedModel:
    """A sliding window shorter than the sequences."""
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=6))


def gemma3() -> PreTrainedModel:
    """Sliding and full attention, in turn."""
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=6, layer_types=kinds)
    return transformers.Gemma3ForCausalLM(config)


def gpt2() -> PreTrainedModel:
    """Learned positions."""
    config = transformers.GPT2Config(
        vocab_size=16, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def mixtral() -> PreTrainedModel:
    """A mixture of experts whose trainer asks for the load-balancing loss."""
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True)
    return transformers.MixtralForCausalLM(config)


def bloom() -> PreTrainedModel:
    """No positions at all: biases instead, computed from the mask. Runs in whole batches."""
    config = transformers.BloomConfig(
        vocab_size=16, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return transformers.BloomForCausalLM(config)


def qwen3_next() -> PreTrainedModel:
    """Linear attention, whose state is no list of keys and values. Runs in whole batches."""
    config = transformers.Qwen3NextConfig(
        **SIZES,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    )
    return transformers.Qwen3NextForCausalLM(config)


ZOO: list[Callable[[], PreTrainedModel]] = [llama, mistral, gemma3, gpt2, mixtral, bloom, qwen3_next]


def peaked(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    model.eval()
    return model


def tokens(rollouts: list[Rollout]) -> list[list[int]]:
    return [rollout.token_ids.tolist() for rollout in rollouts]


def assert_trainers(model: PreTrainedModel, rollouts: list[Rollout], *, atol: float = 1e-5) -> None:
    for rollout in rollouts:
        torch.testing.assert_close(rollout.logprobs, trainer_logprobs(model, rollout), rtol=0, atol=atol)


@pytest.fixture
def dense(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return peaked(tiny_causal_lm(tokenizer))


@pytest.mark.parametrize("make", ZOO)
def test_models_of_every_cache_give_the_trainers_log_probs(
    make: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    model = peaked(make())
    rollouts = TransformersEngine(model, tokenizer, slots=3).generate(REQUESTS, SAMPLING)
    assert_trainers(model, rollouts)
    assert tokens(rollouts) == tokens(TransformersEngine(model, tokenizer).generate(REQUESTS, SAMPLING))


@pytest.mark.parametrize("make", [llama, qwen3_next])
def test_a_request_does_not_depend_on_its_neighbours(
    make: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = peaked(make())
    seeded = [dataclasses.replace(request, seed=place) for place, request in enumerate(REQUESTS)]
    engine = TransformersEngine(model, tokenizer)
    together = engine.generate(seeded, SAMPLING)
    alone = [rollout for request in reversed(seeded) for rollout in engine.generate([request], SAMPLING)]
    assert tokens(together) == tokens(alone)[::-1]


def test_requests_with_one_prompt_draw_different_completions(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    rollouts = TransformersEngine(dense, tokenizer).generate([Request(prompt_ids=[4, 5])] * 8, SAMPLING)
    assert len({tuple(completion) for completion in tokens(rollouts)}) == 8


def test_without_a_seed_the_global_generator_decides(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = TransformersEngine(dense, tokenizer)
    sampling = dataclasses.replace(SAMPLING, seed=None)
    state = torch.get_rng_state()
    first, second = (tokens(engine.generate(REQUESTS, sampling)) for _ in range(2))
    torch.set_rng_state(state)
    assert tokens(engine.generate(REQUESTS, sampling)) == first != second
    state = torch.get_rng_state()
    engine.generate(REQUESTS, SAMPLING)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_prompt_that_requests_share_is_read_once(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    shapes: list[tuple[int, ...]] = []
    dense.get_input_embeddings().register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    requests = [Request(prompt_ids=prompt) for prompt in ([4, 5, 6], [7, 8, 9]) for _ in range(8)]
    rollouts = TransformersEngine(dense, tokenizer).generate(requests, Sampling(max_new_tokens=2, stop_ids=()))
    assert shapes == [(2, 3), (16, 1)]
    assert_trainers(dense, rollouts)


@pytest.mark.parametrize("prefill_tokens", [1, 20, 50])
def test_prompts_are_read_in_pieces_of_bounded_size(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prefill_tokens: int
) -> None:
    shapes: list[tuple[int, ...]] = []
    dense.get_input_embeddings().register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    sampling = dataclasses.replace(SAMPLING, max_new_tokens=1)
    engine = TransformersEngine(dense, tokenizer, prefill_tokens=prefill_tokens)
    rollouts = engine.generate(REQUESTS, sampling)
    assert all(rows * width <= prefill_tokens or rows == 1 for rows, width in shapes)
    assert_trainers(dense, rollouts)


def test_finished_rows_are_not_computed_on(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Rows of 1 to 64 tokens: at most one row in `IDLE_SHARE` of those computed is one that had finished."""
    rows: list[int] = []
    dense.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: rows.append(args[0].shape[0] if args[0].shape[1] == 1 else 0)
    )
    requests = [Request(prompt_ids=[4, 5, 6], max_new_tokens=1 + i) for i in range(64)]
    TransformersEngine(dense, tokenizer).generate(requests, Sampling(max_new_tokens=64, stop_ids=()))
    needed = sum(range(64))
    assert needed <= sum(rows) <= needed * continuous.IDLE_SHARE / (continuous.IDLE_SHARE - 1)


def test_rows_of_similar_length_share_a_forward_where_padding_is_cheaper() -> None:
    lengths = [10, 300, 12, 310, 11]
    assert continuous._groups(lengths, 20) == [0, 1, 0, 1, 0]
    assert continuous._groups(lengths, 10**6) == [0] * 5
    assert continuous._groups(lengths, 0) == [0, 3, 2, 4, 1]


def test_a_long_row_does_not_pad_those_that_join_it(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One completion of 200 tokens among 400 of 10, 40 at once: a shared batch would pay for 200 columns of each."""
    monkeypatch.setattr(continuous, "FORWARD", 100)
    masks: list[int] = []
    hook = dense.model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"].numel()), with_kwargs=True
    )
    requests = [Request(prompt_ids=[4, 5, 6], max_new_tokens=10 if place else 200) for place in range(401)]
    engine = TransformersEngine(dense, tokenizer, slots=40)
    rollouts = engine.generate(requests, Sampling(max_new_tokens=200, stop_ids=()))
    needed = sum((3 + tokens) * tokens // 2 for tokens in [200, *[10] * 400])
    hook.remove()
    assert sum(masks) < 1.5 * needed
    assert_trainers(dense, rollouts)


def test_no_more_rows_than_slots(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    rows: list[int] = []
    dense.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    TransformersEngine(dense, tokenizer, slots=5).generate(REQUESTS * 3, SAMPLING)
    assert max(rows) == 5


def test_the_modes_of_all_modules_are_restored(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    dense.gradient_checkpointing_enable()
    dense.train()
    frozen = next(module for module in dense.modules() if isinstance(module, nn.Linear))
    frozen.eval()
    before = [module.training for module in dense.modules()]
    rollouts = TransformersEngine(dense, tokenizer).generate(REQUESTS, SAMPLING)
    assert [module.training for module in dense.modules()] == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in dense.parameters())
    dense.eval()
    assert_trainers(dense, rollouts)


def test_dropout_is_off_while_sampling(tokenizer: PreTrainedTokenizerFast) -> None:
    model = peaked(tiny_causal_lm(tokenizer))
    model.config.attention_dropout = 0.5
    for module in model.modules():
        if "attention_dropout" in vars(module):
            module.attention_dropout = 0.5  # type: ignore[assignment]
    model.train()
    rollouts = TransformersEngine(model, tokenizer).generate(REQUESTS, SAMPLING)
    model.eval()
    assert_trainers(model, rollouts)


def test_training_goes_on_after_sampling(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(dense, tokenizer)
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    for _ in range(2):
        rollouts = engine.generate(REQUESTS, SAMPLING)
        assert_trainers(dense, rollouts)
        batch = rollouts[1].token_ids[None]
        dense(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


def test_a_copy_is_stale_until_it_is_synced(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(dense, tokenizer, share=False)
    before = engine.generate(REQUESTS, SAMPLING)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.mul_(1.05)
    assert engine.generate(REQUESTS, SAMPLING)[1].logprobs.equal(before[1].logprobs)
    engine.sync_weights(ModelWeights(dense), 1)
    assert_trainers(dense, engine.generate(REQUESTS, SAMPLING))


def test_a_copy_in_another_precision(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = TransformersEngine(dense, tokenizer, share=False, dtype=torch.bfloat16)
    rollouts = engine.generate(REQUESTS, SAMPLING)
    difference = max(float((r.logprobs - trainer_logprobs(dense, r)).abs().max()) for r in rollouts)
    assert 1e-4 < difference < 0.5
    assert dense.dtype == torch.float32


@pytest.mark.parametrize("make", [tiny_causal_lm, tiny_moe])
def test_making_a_copy_leaves_the_global_random_state(
    make: Callable[[PreTrainedTokenizerFast], PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make(tokenizer)
    state = torch.get_rng_state()
    TransformersEngine(model, tokenizer, share=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_of_another_model_are_refused(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    other = tiny_causal_lm(tokenizer, layers=1)
    with pytest.raises(WeightSyncError, match=r"shares its model.*share=False"):
        TransformersEngine(dense, tokenizer).sync_weights(ModelWeights(other), 1)
    copying = TransformersEngine(dense, tokenizer, share=False)
    with pytest.raises(WeightSyncError, match=r"model.layers.1.* in the engine and none in the source"):
        copying.sync_weights(ModelWeights(other), 1)
    assert copying.weight_version == 0
    assert_trainers(dense, copying.generate(REQUESTS, SAMPLING))


def adapted(model: PreTrainedModel) -> PeftModel:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], modules_to_save=["norm"])
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    wrapped.eval()
    return wrapped


def test_adapters_are_sampled_with(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    policy: Any = adapted(dense)
    engine = TransformersEngine(policy, tokenizer)
    rollouts = engine.generate(REQUESTS, SAMPLING)
    assert_trainers(policy, rollouts)
    with policy.disable_adapter():
        difference = max(float((r.logprobs - trainer_logprobs(policy, r)).abs().max()) for r in rollouts)
    assert difference > 0.01


def test_adapters_are_merged_into_a_copy_and_the_base_is_bit_identical(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    policy: Any = adapted(dense)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    engine = TransformersEngine(policy, tokenizer, share=False)
    assert_trainers(policy, engine.generate(REQUESTS, SAMPLING))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1.0)
                before[name] = parameter.clone()
    engine.sync_weights(ModelWeights(policy), 1)
    assert_trainers(policy, engine.generate(REQUESTS, SAMPLING))
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())


def test_the_tensors_of_a_source_are_named_as_in_a_checkpoint(dense: PreTrainedModel) -> None:
    plain = dict(ModelWeights(dense).named_tensors())
    assert plain.keys() == dense.state_dict().keys() >= {"lm_head.weight", "model.embed_tokens.weight"}
    assert not any(tensor.requires_grad for tensor in plain.values())
    assert dict(ModelWeights(adapted(dense)).named_tensors()).keys() == plain.keys()


def test_diverged_weights_are_an_error(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with torch.no_grad():
        cast(nn.Embedding, dense.get_input_embeddings()).weight[5] = torch.nan
    with pytest.raises(EngineError, match="logits are not finite"):
        TransformersEngine(dense, tokenizer).generate([Request(prompt_ids=[5])], SAMPLING)


@pytest.mark.parametrize("setting", [{"slots": 0}, {"prefill_tokens": 0}, {"dtype": torch.bfloat16}])
def test_settings_that_cannot_be_honoured(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, setting: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"TransformersEngine: {next(iter(setting))}"):
        TransformersEngine(dense, tokenizer, **setting)


def test_an_encoder_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    config = transformers.T5Config(vocab_size=16, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ConfigError, match="has an encoder"):
        TransformersEngine(transformers.T5ForConditionalGeneration(config), tokenizer)
