"""What training does around a router: checkpointing, padding, adapters, half precision, decoding from a cache."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from families import CONFIGS, EXPERTS, TOP_K, family
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlstab.errors import ConfigError, RoutingError, ShapeError
from rlstab.models import tiny_causal_lm, tiny_moe, tiny_tokenizer
from rlstab.routing import Routers, Routes, compact

IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])


@pytest.fixture
def model() -> PreTrainedModel:
    return family("qwen3_moe")


def recorded(model: nn.Module, ids: Tensor, **others: Any) -> tuple[Tensor, Routes]:
    with torch.no_grad(), Routers(model).recording() as own:
        logits = model(ids, **others).logits
    return logits, own.routes(rows=len(ids))


def foreign(routes: Routes) -> Routes:
    return Routes(experts=(routes.experts + 3) % EXPERTS, valid=routes.valid)


def gradients(model: nn.Module, routes: Routes) -> dict[str, Tensor]:
    model.zero_grad()
    with Routers(model).replaying(routes):
        model(IDS).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_runs_the_same_experts_again(model: PreTrainedModel, reentrant: bool) -> None:
    routes = foreign(recorded(model, IDS)[1])
    plain = gradients(model, routes)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again = gradients(model, routes)
    assert plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_on_any_side(model: PreTrainedModel, side: str) -> None:
    before, after = {"left": (2, 0), "right": (0, 3), "both": (1, 2)}[side]
    logits, own = recorded(model, IDS[:1])
    mask = torch.ones(1, 5)
    padded = {
        "input_ids": nn.functional.pad(IDS[:1], (before, after)),
        "attention_mask": nn.functional.pad(mask, (before, after)).long(),
    }
    position_ids = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    rows = own.rows(mask)
    last_missing = [row.select(slice(0, 4)) for row in rows]
    for travelled, known in ((rows, 5), (last_missing, 4)):
        routes = Routes.padded(travelled, padded["attention_mask"])
        assert int(routes.valid.sum()) == known
        assert routes.valid[0, before : before + known].all()
        with torch.no_grad(), Routers(model).replaying(routes):
            again = model(**padded, position_ids=position_ids).logits
        torch.testing.assert_close(again[:, before : before + 5], logits, rtol=1e-4, atol=1e-5)


def test_rows_of_a_padded_batch_come_back_as_they_were(model: PreTrainedModel) -> None:
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad(), Routers(model).recording(logprobs=True) as own:
        model(IDS, attention_mask=mask)
    routes = own.routes(rows=2)
    rows = routes.rows(mask)
    assert [len(row.valid) for row in rows] == [3, 5]
    again = Routes.padded(rows, mask)
    kept = mask.bool()
    assert again.logprobs is not None
    assert routes.logprobs is not None
    assert torch.equal(again.valid, kept)
    assert torch.equal(again.experts[kept], routes.experts[kept])
    assert torch.equal(again.logprobs[kept], routes.logprobs[kept])


ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "router": {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
    "whole router": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
}


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_adapters(model: PreTrainedModel, adapters: str) -> None:
    from peft import LoraConfig, get_peft_model

    logits, own = recorded(model, IDS)
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=True, **ADAPTERS[adapters]))
    routers = Routers(adapted)
    assert routers.layers == (0, 1)
    again, same = recorded(adapted, IDS)
    torch.testing.assert_close(again, logits)
    assert torch.equal(same.experts, own.experts)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.3)
    native = recorded(adapted, IDS)[1]
    if "router" in adapters:
        assert not torch.equal(native.experts, own.experts)
    found = gradients(adapted, own)
    with torch.no_grad(), routers.replaying(own) as replayed:
        adapted(IDS)
    assert torch.equal(replayed.routes(rows=2).experts, own.experts)
    trained = [name for name in found if found[name].abs().sum() > 0]
    wanted = {"attention": "q_proj", "experts": "experts", "router": "gate", "whole router": "gate"}[adapters]
    assert any(wanted in name for name in trained)


def test_half_precision_runs_the_experts_of_single_precision(model: PreTrainedModel) -> None:
    _, single = recorded(model, IDS)
    nn.Module.to(model, torch.bfloat16)
    _, half = recorded(model, IDS)
    changed = foreign(single)
    with torch.no_grad(), Routers(model).replaying(changed) as replayed:
        logits = model(IDS).logits
    assert logits.dtype == torch.bfloat16
    assert torch.equal(replayed.routes(rows=2).experts, changed.experts)
    assert half.experts.dtype == torch.uint8


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_from_a_cache_records_what_a_whole_forward_does(name: str) -> None:
    model = family(name)
    _, whole = recorded(model, IDS)
    parts, cache = [], None
    with torch.no_grad(), Routers(model).recording() as own:
        for chunk in IDS.split([2, 1, 1, 1], dim=1):
            cache = model(chunk, past_key_values=cache, use_cache=True).past_key_values
            parts.append(own.routes(rows=2).experts)
    assert torch.equal(torch.cat(parts, dim=1), whole.experts)


def test_generate_of_transformers_under_recording(model: PreTrainedModel) -> None:
    with torch.no_grad(), Routers(model).recording() as own:
        cast(Any, model).generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert own.routes(rows=2).experts.shape == (2, 1, 2, TOP_K)


def test_the_model_is_as_before_afterwards(model: PreTrainedModel) -> None:
    logits, own = recorded(model, IDS)
    with torch.no_grad(), Routers(model).replaying(foreign(own)):
        model(IDS)
    assert torch.equal(model(IDS).logits, logits)
    assert [name for name, m in model.named_modules() if m._forward_pre_hooks or m._forward_hooks] == []


def test_an_error_inside_the_model_goes_on_and_leaves_nothing_behind(model: PreTrainedModel) -> None:
    gate = model.get_submodule("model.layers.1.mlp.gate")
    vars(gate)["hidden_dim"] = 16
    with pytest.raises(RuntimeError, match="mat1 and mat2"), Routers(model).recording():
        model(IDS)
    vars(gate)["hidden_dim"] = 32
    logits, own = recorded(model, IDS)
    assert logits.isfinite().all()
    assert own.valid.all()


class TwoChoices(nn.Module):
    """A router that chooses twice, and one that never does."""

    def __init__(self, choices: int) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.choices = 4, 2, choices
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, hidden: Tensor) -> Tensor:
        scores = hidden @ self.weight.T
        for _ in range(self.choices):
            torch.topk(scores, self.top_k)
        return scores


@pytest.mark.parametrize("choices", [0, 2])
def test_a_router_without_exactly_one_choice_is_named(choices: int) -> None:
    block = nn.ModuleDict({"router": TwoChoices(choices), "experts": nn.Linear(8, 8)})
    message = rf"router: expected one top-2 over 4 experts per call, got {choices}"
    with Routers(block).recording(), pytest.raises(RoutingError, match=message):
        block.get_submodule("router")(torch.randn(3, 8))


def test_a_block_that_hides_its_router_is_named(model: PreTrainedModel) -> None:
    _, own = recorded(model, IDS)
    block = model.get_submodule("model.layers.1.mlp")
    vars(block)["forward"] = lambda hidden: hidden  # what a kernel for the whole block does
    message = r"model\.layers\.1\.mlp\.gate: expected a call in the forward, got none"
    with pytest.raises(RoutingError, match=message), Routers(model).replaying(own):
        model(IDS)
    with Routers(model).recording() as again:
        model(IDS)
    with pytest.raises(RoutingError, match=r"layers\.1\.mlp\.gate: expected a call"):
        again.routes(rows=2)


def test_dense_models_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Qwen2ForCausalLM: expected a mixture of experts, .* got a model without"):
        Routers(tiny_causal_lm(tiny_tokenizer("01")))


def test_routers_of_different_sizes_are_refused() -> None:
    block = nn.ModuleList([nn.ModuleDict({"gate": TwoChoices(1), "experts": nn.Identity()}) for _ in range(2)])
    vars(block.get_submodule("1.gate"))["num_experts"] = 8
    with pytest.raises(ConfigError, match=r"one number of experts and one top-k, got \{'0\.gate': \(4, 2\), '1\.gate'"):
        Routers(block)


def wrong_routes() -> dict[str, tuple[Tensor, str]]:
    good = torch.tensor([[[0, 1], [2, 3]]], dtype=torch.uint8)
    return {
        "layers": (good[:, :1], r"expected \[\*, 2 sparse layers, 2 experts per token\], got \[1, 1, 2\]"),
        "top-k": (good[..., :1], r"expected \[\*, 2 sparse layers, 2 experts per token\], got \[1, 2, 1\]"),
        "experts": (good + 5, r"expected expert ids below 8, got 8: they are of another model"),
        "negative": (good.int() - 1, r"expected expert ids from 0 on, got -1"),
        "unwritten": (good * 0, r"got the same one twice: the engine has not written all of the array"),
    }


@pytest.mark.parametrize("wrong", wrong_routes())
def test_routes_of_another_model_are_refused(model: PreTrainedModel, wrong: str) -> None:
    experts, message = wrong_routes()[wrong]
    with pytest.raises(ShapeError, match=message):
        Routers(model).accept(experts)


def test_routes_for_other_tokens_are_refused(model: PreTrainedModel) -> None:
    _, own = recorded(model, IDS)
    message = r"gate: expected routes for the 5 tokens of the forward, .* got 10"
    with pytest.raises(ShapeError, match=message), Routers(model).replaying(own):
        model(IDS[:1])


def test_truncated_rows_are_refused(model: PreTrainedModel) -> None:
    rows = recorded(model, IDS)[1].rows(torch.ones(2, 5))
    with pytest.raises(ShapeError, match=r"routes of row 1: expected 4 tokens \(prompt .*\) or 5, got 3"):
        Routes.padded([rows[0], rows[1].select(slice(0, 3))], torch.ones(2, 5))


@pytest.mark.wrong_shapes
def test_routes_check_their_tensors() -> None:
    ids, valid = torch.zeros(2, 1, 2, dtype=torch.uint8), torch.ones(2, dtype=torch.bool)
    with pytest.raises(ShapeError, match=r"experts are torch\.int64; expected torch\.uint8, or torch\.int16"):
        Routes(experts=ids.long(), valid=valid)
    with pytest.raises(ShapeError, match=r"experts \[2, 1, 2\] and valid \[1\]; expected"):
        Routes(experts=ids, valid=valid[:1])
    with pytest.raises(ShapeError, match=r"logprobs \[2, 1, 1\]; expected one per expert, \[2, 1, 2\]"):
        Routes(experts=ids, valid=valid, logprobs=torch.zeros(2, 1, 1))


def test_a_million_tokens_take_less_than_400_megabytes() -> None:
    tokens, layers, top_k = 1000, 48, 8
    generator = torch.Generator().manual_seed(0)
    for experts, width in ((256, 1), (257, 2)):
        ids = compact(torch.randint(experts, (tokens, layers, top_k), generator=generator), experts)
        routes = Routes(experts=ids, valid=torch.ones(tokens, dtype=torch.bool))
        assert routes.nbytes == tokens * (layers * top_k * width + 1)
        assert routes.given(0).max() == experts - 1
    assert 1000 * tokens * (layers * top_k + 1) <= 400e6


def test_many_experts_keep_their_ids() -> None:
    tokenizer = tiny_tokenizer("01")
    model = tiny_moe(tokenizer, experts=300, experts_per_token=290)
    _, own = recorded(model, torch.tensor([[3, 4]]))
    assert own.experts.dtype == torch.int16
    assert int(own.experts.max()) > 255


def test_no_family_is_named_in_the_room() -> None:
    import rlstab.routing

    names = ("qwen", "mixtral", "deepseek", "olmoe", "gptoss", "glm", "granite", "ernie")
    code = "".join(path.read_text() for path in Path(rlstab.routing.__file__).parent.glob("*.py")).lower()
    assert [name for name in names if name in code] == []
