"""Replay in ten families: own routes change nothing, foreign routes are executed, gradients are the model's own."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import COMMON, CONFIGS, EXPERTS, GROUPS, LATENT, TOP_K, built, family
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.llama4 import Llama4TextConfig
from transformers.models.phimoe import PhimoeConfig

from rlstab.errors import RoutingError
from rlstab.routing import Routers, Routes

VECTOR: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "moe_monitors_optim.json").read_text())[
    "r3"
]
IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12], [13, 14, 3, 15, 3]])


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return family(request.param)


def trained(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of a loss of them in every parameter that has one."""
    model.zero_grad()
    logits: Tensor = model(IDS).logits
    logits.square().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@contextmanager
def executed(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The expert ids that reach the experts of each layer: read from what their block hands them."""
    seen: list[Tensor] = []

    def read(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        seen.extend(arg.detach().clone() for arg in args if not arg.is_floating_point())

    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    handles = [module.register_forward_pre_hook(read) for module in experts]
    yield seen
    for handle in handles:
        handle.remove()


def shifted(routes: Routes) -> Routes:
    """Other experts for every token: the next ones."""
    return Routes(experts=(routes.experts + 1) % EXPERTS, valid=routes.valid)


def own_routes_replayed(model: PreTrainedModel, routers: Routers) -> tuple[Routes, Tensor]:
    """A model's own routes and logits; replayed, these are the same bit by bit, and so is every gradient."""
    with routers.recording() as own:
        logits, gradients = trained(model)
    native = own.routes(rows=3)
    with routers.replaying(native):
        again, same = trained(model)
    assert torch.equal(again, logits)
    assert gradients.keys() == same.keys()
    assert [name for name in gradients if not torch.equal(gradients[name], same[name])] == []
    return native, logits


def test_own_routes_give_the_same_logits_and_gradients_bit_by_bit(model: PreTrainedModel) -> None:
    routes, _ = own_routes_replayed(model, Routers(model))
    assert routes.experts.shape == (3, 5, 2, TOP_K)
    assert routes.experts.dtype == torch.uint8


def test_foreign_routes_are_executed_and_train_the_router(model: PreTrainedModel) -> None:
    routers = Routers(model)
    with routers.recording() as own, executed(model) as natively:
        logits, gradients = trained(model)
    native = own.routes(rows=3)
    foreign = shifted(native)
    with routers.replaying(foreign) as replayed, executed(model) as seen:
        changed, moved = trained(model)
    for layer, (chosen, ran) in enumerate(zip(natively, seen, strict=True)):
        assert torch.equal(chosen, native.given(layer))
        assert torch.equal(ran, foreign.given(layer))
    assert torch.equal(replayed.routes(rows=3).experts, foreign.experts)
    assert not torch.allclose(changed, logits)
    for router in routers.routers:
        gradient = moved[f"{router.name}.weight"]
        assert gradient.abs().sum() > 0
        assert not torch.equal(gradient, gradients[f"{router.name}.weight"])


def test_tokens_without_a_route_choose_for_themselves(model: PreTrainedModel) -> None:
    routers = Routers(model)
    with torch.no_grad(), routers.recording() as own:
        logits = model(IDS).logits
    foreign = shifted(own.routes(rows=3))
    some = Routes(experts=foreign.experts, valid=torch.zeros(3, 5, dtype=torch.bool))
    with torch.no_grad(), routers.replaying(some):
        assert torch.equal(model(IDS).logits, logits)
    some.valid[1, 3:] = True
    with torch.no_grad(), routers.replaying(some) as replayed:
        mixed = model(IDS).logits
    torch.testing.assert_close(mixed[[0, 2]], logits[[0, 2]])  # rounding: experts see batches of other sizes
    torch.testing.assert_close(mixed[1, :3], logits[1, :3])
    assert not torch.allclose(mixed[1, 3:], logits[1, 3:])
    ran = replayed.routes(rows=3).experts
    assert torch.equal(ran[some.valid], foreign.experts[some.valid])
    assert torch.equal(ran[0], own.routes(rows=3).experts[0])


def test_log_probs_are_those_of_the_router_at_the_experts_asked_about(model: PreTrainedModel) -> None:
    routers = Routers(model)
    with torch.no_grad(), routers.recording(logprobs=True) as own:
        model(IDS)
    native = own.routes(rows=3)
    assert native.logprobs is not None
    assert native.logprobs.dtype == torch.float32
    every = torch.stack([torch.arange(start, start + 2) for start in range(0, EXPERTS, 2)])
    total = torch.zeros(3, 5, 2)
    for pair in every:
        asked = Routes(experts=pair.to(torch.uint8).expand(3, 5, 2, 2).contiguous(), valid=native.valid)
        with torch.no_grad(), routers.scoring(asked) as scored:
            model(IDS)
        found = scored.native(rows=3)
        assert found.logprobs is not None
        assert torch.equal(found.experts, native.experts)
        total += found.logprobs.exp().sum(-1)
        chosen = native.experts[..., 0] == pair[0]
        torch.testing.assert_close(found.logprobs[chosen][:, 0], native.logprobs[chosen][:, 0])
    if "sigmoid" in routers_rule(model):
        assert (total > 1.5).all()  # scores of experts that do not compete
    else:
        torch.testing.assert_close(total, torch.ones_like(total))


def routers_rule(model: PreTrainedModel) -> str:
    return "sigmoid" if model.config.model_type in ("deepseek_v3", "glm4_moe") else "softmax"


def test_groups_that_the_trainer_would_not_choose_keep_their_weight() -> None:
    """DeepSeek-V2 zeroes the scores outside the chosen groups; replayed experts are outside by right."""
    limited: dict[str, Any] = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1}
    model = built(DeepseekV2Config(**COMMON, **LATENT, **GROUPS, first_k_dense_replace=0, **limited))
    routers = Routers(model)
    native, _ = own_routes_replayed(model, routers)

    group = native.experts.long() // 2
    assert (group[..., 0] == group[..., 1]).all()  # one group per token
    foreign = Routes(experts=(native.experts + 2) % EXPERTS, valid=native.valid)
    weights: list[Tensor] = []
    experts = model.get_submodule("model.layers.0.mlp.experts")
    handle = experts.register_forward_pre_hook(lambda module, args: weights.append(args[2].detach()))
    with routers.replaying(foreign):
        trained(model)
    handle.remove()
    assert (weights[0] > 0).all()


def test_a_family_that_runs_all_experts_on_scattered_scores() -> None:
    """Llama 4 sets the scores of experts outside the top-k to zero and hands no ids on."""
    sizes: dict[str, Any] = {"head_dim": 16, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 1}
    model = built(Llama4TextConfig(**COMMON, **sizes, num_local_experts=EXPERTS))
    routers = Routers(model)
    native, logits = own_routes_replayed(model, routers)
    with routers.replaying(shifted(native)):
        changed, moved = trained(model)
    assert not torch.allclose(changed, logits)
    assert all(moved[f"{router.name}.weight"].abs().sum() > 0 for router in routers.routers)


def test_a_family_without_a_top_k_is_named() -> None:
    """Phi-MoE takes the largest score, masks it and takes the next."""
    model = built(PhimoeConfig(**COMMON, num_local_experts=EXPERTS))
    router = Routers(model).routers[0].name
    refused = pytest.raises(RoutingError, match=f"{router}: expected one top-2 over 8 experts per call, got 0")
    with refused, Routers(model).recording():
        model(IDS)


def test_layers_are_counted_with_the_dense_ones() -> None:
    sizes = {**COMMON, **LATENT, **GROUPS, "num_hidden_layers": 3}
    routers = Routers(built(DeepseekV3Config(**sizes, first_k_dense_replace=1, n_group=4, topk_group=2)))
    assert routers.layers == (1, 2)
    assert [router.depth for router in routers.routers] == [3, 3]
    every = torch.zeros(4, 3, TOP_K, dtype=torch.int32)
    every[:, 1], every[:, 2] = torch.tensor([5, 2]), torch.tensor([1, 7])
    accepted = routers.accept(every)
    assert accepted.dtype == torch.uint8
    assert accepted[0].tolist() == [[5, 2], [1, 7]]
    assert torch.equal(routers.accept(every[:, 1:]), accepted)


@pytest.mark.parametrize("normalised", [True, False])
def test_gates_of_the_worked_example(normalised: bool) -> None:
    """Both rules of normalisation, with their slopes in the router's logits."""
    config = CONFIGS["qwen3_moe"]()
    config.num_experts, config.num_hidden_layers, config.norm_topk_prob, config.hidden_size = 4, 1, normalised, 4
    config.head_dim = 4
    model = built(config)
    name = Routers(model).routers[0].name
    gate = model.get_submodule(name)
    logits = torch.tensor([VECTOR["s_train"]], requires_grad=True)
    routes = Routes(
        experts=torch.tensor([[[VECTOR["replayed_topk"]]]], dtype=torch.uint8), valid=torch.ones(1, 1, dtype=torch.bool)
    )
    with torch.no_grad():
        gate.get_parameter("weight").copy_(torch.eye(4))
    rule = "renormalised" if normalised else "not_renormalised"
    with Routers(model).replaying(routes):
        _, values, experts = gate(logits)
    found = torch.zeros(4).scatter(0, experts[0], values[0].detach())
    key = next(key for key in VECTOR if key.startswith(f"g_{rule} "))
    torch.testing.assert_close(found, torch.tensor(VECTOR[key]), rtol=0, atol=1e-6)
    values[0, 0].backward()
    slope = VECTOR[f"dg0_ds ({rule.replace('_', ' ')})"]
    torch.testing.assert_close(logits.grad, torch.tensor([slope]), rtol=0, atol=1e-6)
