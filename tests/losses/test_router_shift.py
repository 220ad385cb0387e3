import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlstab.batch import Column, TokenBatch
from rlstab.errors import ConfigError, MissingFieldError, ShapeError
from rlstab.losses import (
    GMPO,
    ClippedSurrogate,
    GeometricRatio,
    GSPOTokenRatio,
    PreClippedRatio,
    Ratio,
    RouterShiftRatio,
    SequenceRatio,
    TokenRatio,
    router_shift,
)

FILE = Path(__file__).parents[1] / "vectors" / "moe_monitors_optim.json"
VECTOR: dict[str, Any] = json.loads(FILE.read_text())["rspo"]


def double(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def worked_log_ratios() -> Tensor:
    """`[1, T, L, K]` from the router probabilities of the worked example."""
    chosen = torch.tensor(VECTOR["old_topk"])
    old, new = double(VECTOR["old_router_probs"]).log(), double(VECTOR["new_router_probs"]).log()
    return (new - old).gather(-1, chosen).unsqueeze(0)


def worked_batch(w: list[float], sign: float, log_ratios: Tensor | None = None) -> tuple[TokenBatch, Tensor]:
    log_w = double(w).log().unsqueeze(0).requires_grad_()
    old = torch.full_like(log_w, -3.0).detach()
    batch = TokenBatch(
        mask=torch.ones_like(log_w),
        logps={"policy": old + log_w, "old": old},
        advantages=double([sign]),
        router_log_ratios=worked_log_ratios() if log_ratios is None else log_ratios,
    )
    return batch, log_w


def test_the_shift_of_the_worked_example() -> None:
    torch.testing.assert_close(router_shift(worked_log_ratios())[0], double(VECTOR["gamma"]), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        -router_shift(worked_log_ratios())[0].log(), double(VECTOR["Delta_in_units_ln2"]) * double(2).log()
    )


def test_the_ratio_of_the_worked_example() -> None:
    batch, _ = worked_batch(VECTOR["w"], 1.0)
    rescaled = RouterShiftRatio().log_ratio(batch).exp()
    torch.testing.assert_close(rescaled[0], double(VECTOR["w_tilde"]), rtol=0, atol=1e-9)
    geometric = RouterShiftRatio(ratio=GeometricRatio()).log_ratio(batch).exp()
    torch.testing.assert_close(geometric[0], double([VECTOR["gspo_plugin_s"]]), rtol=0, atol=1e-9)
    whole = RouterShiftRatio(ratio=SequenceRatio()).log_ratio(batch).exp()
    torch.testing.assert_close(whole[0], double(VECTOR["w_tilde"]).prod().unsqueeze(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", ["pos", "neg"])
def test_rspo_is_gmpo_of_the_rescaled_ratio(side: str) -> None:
    sign = 1.0 if side == "pos" else -1.0
    surrogate = GMPO(low=0.4, high=0.4, ratio=RouterShiftRatio())
    batch, log_w = worked_batch(VECTOR["w"], sign)
    objective = -surrogate.loss(batch).values
    torch.testing.assert_close(objective.flatten()[0], double(VECTOR["v2"][side]["J"]), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(objective.sum(), log_w)
    torch.testing.assert_close(gradient[0], double(VECTOR["v2_grad_dJ_dlogw"][side]), rtol=0, atol=1e-9)
    plain, _ = worked_batch(VECTOR["w"], sign)
    without = -GMPO(low=0.4, high=0.4).loss(plain).values
    torch.testing.assert_close(without.flatten()[0], double(VECTOR["plain_gmpo_no_rs"][side]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["pos", "neg"])
def test_the_shift_decides_what_is_clipped(side: str) -> None:
    sign, case = (1.0 if side == "pos" else -1.0), VECTOR["clip_case"]
    batch, log_w = worked_batch(case["w"], sign, double([1.0, 0.5, 0.8]).log().reshape(1, 3, 1, 1))
    log_ratio = RouterShiftRatio().log_ratio(batch)
    expected = double(case["w"]).log() + double([1.0, 0.8, 0.8]).log()
    torch.testing.assert_close(log_ratio.detach()[0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_ratio.detach()[0], double(case[side]["log_w_tilde"]), rtol=0, atol=1e-9)
    objective = -GMPO(ratio=RouterShiftRatio()).loss(batch).values
    torch.testing.assert_close(objective.flatten()[0], double(case[side]["J"]), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(objective.sum(), log_w)
    torch.testing.assert_close(gradient[0], double(case[side]["grad_dJ_dlogw"]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", ["pos", "neg"])
def test_grpo_with_the_router_shift(side: str) -> None:
    sign = 1.0 if side == "pos" else -1.0
    batch, _ = worked_batch(VECTOR["w"], sign)
    values = -ClippedSurrogate(ratio=RouterShiftRatio()).loss(batch).values.detach()
    torch.testing.assert_close(values[0], double(VECTOR["grpo_plugin"][f"{side}_terms"]), rtol=0, atol=1e-9)


RATIOS = [TokenRatio(), SequenceRatio(), GeometricRatio(), GSPOTokenRatio(), PreClippedRatio()]


@pytest.mark.parametrize("inner", RATIOS, ids=lambda ratio: type(ratio).__name__)
def test_routers_that_stayed_change_nothing(inner: Ratio) -> None:
    still = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    results = []
    for ratio in (inner, RouterShiftRatio(ratio=inner)):
        batch, log_w = worked_batch(VECTOR["w"], 1.0, still)
        log_ratio = ratio.log_ratio(batch)
        assert ratio.sequence_level == inner.sequence_level
        results.append((log_ratio.detach(), torch.autograd.grad(log_ratio.exp().sum(), log_w)[0]))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_shift_carries_no_gradient() -> None:
    log_ratios = worked_log_ratios().requires_grad_()
    batch, log_w = worked_batch(VECTOR["w"], 1.0, log_ratios)
    RouterShiftRatio(min=1e-3).log_ratio(batch).sum().backward()
    assert log_ratios.grad is None
    torch.testing.assert_close(log_w.grad, torch.ones_like(log_w))


def test_tokens_outside_the_loss_do_not_count() -> None:
    log_ratios = torch.zeros(1, 3, 2, 2)
    log_ratios[0, 2] = torch.nan
    logps = {"policy": torch.tensor([[-1.0, -2.0, -torch.inf]]), "old": torch.tensor([[-1.5, -1.0, -torch.inf]])}
    batch = TokenBatch(mask=torch.tensor([[True, True, False]]), logps=logps, router_log_ratios=log_ratios)
    assert RouterShiftRatio(ratio=GeometricRatio()).log_ratio(batch).item() == pytest.approx(-0.25)


def test_the_ratio_may_be_against_the_sampler() -> None:
    logps = {"policy": torch.tensor([[-1.0]]), "old": torch.tensor([[-9.0]]), "sampler": torch.tensor([[-1.5]])}
    batch = TokenBatch(mask=torch.ones(1, 1), logps=logps, router_log_ratios=torch.full((1, 1, 1, 2), 0.1))
    ratio = RouterShiftRatio(ratio=TokenRatio(against="sampler"))
    assert ratio.against == "sampler"
    assert ratio.log_ratio(batch).item() == pytest.approx(0.4)


def test_without_old_log_probs_the_policy_is_the_old_one() -> None:
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    batch = TokenBatch(mask=torch.ones(1, 2), logps={"policy": logp}, router_log_ratios=torch.zeros(1, 2, 1, 1))
    log_ratio = RouterShiftRatio().log_ratio(batch)
    assert log_ratio.tolist() == [[0.0, 0.0]]
    log_ratio.sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == [[1.0, 1.0]]


def test_what_it_reads_and_when_it_is_inert() -> None:
    ratio = RouterShiftRatio(ratio=PreClippedRatio())
    assert ratio.requires == PreClippedRatio().requires | {Column("router_log_ratios")}
    assert ratio.inert_on_policy == ("the bounds of PreClippedRatio", "the router shift of RouterShiftRatio")
    assert "the router shift of RouterShiftRatio" in GMPO(ratio=ratio).inert_on_policy


def test_a_batch_without_router_log_ratios_is_an_error() -> None:
    batch = TokenBatch(mask=torch.ones(1, 1), logps={"policy": torch.zeros(1, 1)})
    with pytest.raises(MissingFieldError, match=r"router_log_ratios is not in the batch: add Column"):
        RouterShiftRatio().log_ratio(batch)


@pytest.mark.wrong_shapes
def test_router_log_ratios_of_other_tokens_are_an_error() -> None:
    with pytest.raises(ShapeError, match=r"router_log_ratios: expected \[1, 2, layers, experts\], got \[1, 3, 1, 1\]"):
        TokenBatch(mask=torch.ones(1, 2), router_log_ratios=torch.zeros(1, 3, 1, 1))


@pytest.mark.parametrize("floor", [0.0, -1.0, 1.5])
def test_floors_out_of_range_are_refused(floor: float) -> None:
    with pytest.raises(ConfigError, match=r"RouterShiftRatio\.min: expected a number"):
        RouterShiftRatio(min=floor)


def test_a_ratio_that_is_none_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"RouterShiftRatio\.ratio: expected TokenRatio\(\) or another Ratio, got 'gspo'"
    ):
        RouterShiftRatio(ratio="gspo")  # type: ignore[arg-type]
