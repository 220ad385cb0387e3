import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monitor_vectors import vector

from rlstab.errors import ConfigError
from rlstab.optim import Chain, SkipSpikes, ZClip

NORMS = [1.0, 1.2, 0.8, 1.1, 0.9, 1.0, 5.0, 1.05, 0.95, 3.0, 1.0]


def test_vector() -> None:
    found = vector("zclip")
    clip = ZClip(alpha=found["alpha"], threshold=found["z_thresh"], eps=found["eps"], warmup=found["warmup_steps"])
    capped = ZClip(warmup=found["warmup_steps"], max_norm=1.0)
    assert [step["norm"] for step in found["trace"]] == NORMS
    for step in found["trace"]:
        decision = clip.decide(step["norm"])
        applied = capped.decide(step["norm"]).applied_norm
        wanted = (step["clip_to"], step["mean"], step["var"])
        for ours, expected in zip((decision.limit, clip.mean, clip.variance), wanted, strict=True):
            assert ours is expected is None or ours == pytest.approx(expected, rel=1e-7)
        assert capped.state_dict() == clip.state_dict()  # the cap does not enter the statistics
        assert applied == pytest.approx(step.get("effective_with_max_grad_norm_1", min(1.0, step["norm"])), rel=1e-7)


def warm(**changes: Any) -> ZClip:
    clip = ZClip(warmup=5, **changes)
    for norm in NORMS[:5]:
        clip.decide(norm)
    return clip


def test_modes_by_hand() -> None:
    spread = math.sqrt(0.02)
    z = (5 - 1) / (spread + 1e-6)
    assert warm().decide(5.0).limit == pytest.approx(1 + 2.5**2 * spread / z)
    assert warm(mode="mean").decide(5.0).limit == pytest.approx(1.0)
    assert warm(mode="percentile").decide(5.0).limit == pytest.approx(1 + 2.5 * spread)
    assert warm(mode="mean", factor=1.5).decide(5.0).limit == pytest.approx(1.5)
    assert warm().decide(1.3).limit is None
    assert "z = 28" in warm().decide(5.0).reason


def test_a_wilder_spike_is_scaled_down_further() -> None:
    limits = [warm().decide(norm).limit for norm in (1.5, 2.0, 10.0, 1000.0)]
    assert limits == sorted(limits, reverse=True)  # type: ignore[type-var]
    assert limits[-1] == pytest.approx(1.0, abs=1e-3)


def test_a_spike_may_teach_nothing() -> None:
    clip = warm(learn_from_spikes=False)
    before = clip.state_dict()
    clip.decide(5.0)
    assert clip.state_dict() == before
    clip.decide(1.1)
    assert clip.state_dict() != before


@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize("make", [warm, lambda: ZClip(warmup=5)])
def test_what_is_not_finite_is_left_out_and_forgotten(make: Callable[[], ZClip], norm: float) -> None:
    clip = make()
    before = clip.state_dict()
    decision = clip.decide(norm)
    assert decision.skip
    assert decision.applied_norm == 0
    assert clip.state_dict() == before


def test_it_goes_on_from_a_checkpoint() -> None:
    for cut in (3, 8):
        first, second = ZClip(warmup=5), ZClip(warmup=5)
        for norm in NORMS[:cut]:
            first.decide(norm)
        second.load_state_dict(first.state_dict())
        for norm in NORMS[cut:]:
            assert second.decide(norm) == first.decide(norm)
        assert second.state_dict() == first.state_dict()


def test_gradients_are_scaled_in_place_or_dropped() -> None:
    weights = [torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True), torch.zeros(1)]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    decision = ZClip(max_norm=1.3).apply(weights)
    assert decision.norm == pytest.approx(13.0)
    torch.testing.assert_close(weights[0].grad, torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(weights[1].grad, torch.tensor([1.2]))
    weights[1].grad = torch.tensor([torch.nan])
    assert ZClip().apply(weights).skip
    assert [w.grad for w in weights] == [None, None, None]


def test_no_gradient_at_all() -> None:
    assert ZClip().apply([torch.zeros(2, requires_grad=True)]).norm == 0


# --- chains --------------------------------------------------------------------------


def test_the_lowest_limit_of_a_chain_holds_and_a_skip_ends_it() -> None:
    clip = warm()
    chain = Chain([SkipSpikes(factor=3.0, least=2), clip, ZClip(max_norm=1.05)])
    for norm in (1.0, 1.0):
        chain.decide(norm)
    assert chain.decide(1.4).limit == pytest.approx(1.05)
    before = clip.state_dict()
    assert chain.decide(4.0).skip
    assert clip.state_dict() == before


def test_a_chain_is_saved_with_its_parts() -> None:
    chain, other = (Chain([SkipSpikes(), ZClip(warmup=5)]) for _ in range(2))
    for norm in NORMS:
        chain.decide(norm)
    other.load_state_dict(chain.state_dict())
    assert other.state_dict() == chain.state_dict()
    with pytest.raises(ConfigError, match="holds 2 gradient stabilisers, this chain 1"):
        Chain([ZClip()]).load_state_dict(chain.state_dict())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ZClip(alpha=1.0), r"ZClip\.alpha: expected a number from 0 to below 1, got 1\.0"),
        (lambda: ZClip(threshold=0.0), r"ZClip\.threshold"),
        (lambda: ZClip(warmup=1), r"ZClip\.warmup: expected at least 2"),
        (lambda: ZClip(max_norm=0.0), r"ZClip\.max_norm"),
        (lambda: ZClip(mode="z"), r"ZClip\.mode"),  # type: ignore[arg-type]
        (lambda: ZClip(factor=-1.0), r"ZClip\.factor"),
        (lambda: ZClip(eps=0.0), r"ZClip\.eps"),
        (lambda: Chain([]), r"Chain\.parts"),
        (lambda: Chain([ZClip]), r"Chain\.parts"),  # type: ignore[list-item]
    ],
)
def test_refusals(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
