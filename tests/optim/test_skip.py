import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlstab.errors import ConfigError
from rlstab.optim import SkipSpikes


def skips(part: SkipSpikes, norms: list[float]) -> list[bool]:
    return [part.decide(norm).skip for norm in norms]


def test_a_spike_is_left_out_and_not_remembered() -> None:
    part = SkipSpikes(factor=3.0, least=3, window=4)
    assert skips(part, [1.0, 2.0, 1.0, 3.1, 2.9, 4.6]) == [False, False, False, True, False, True]
    assert part.state_dict()["norms"] == [1.0, 2.0, 1.0, 2.9]


def test_there_are_no_spikes_before_enough_is_known() -> None:
    assert not any(skips(SkipSpikes(least=4), [1.0, 100.0, 1.0, 10000.0]))


def test_a_new_regime_is_accepted_after_some_patience() -> None:
    part = SkipSpikes(factor=3.0, least=2, patience=3)
    assert skips(part, [1.0, 1.0, *[50.0] * 6]) == [False, False, True, True, True, False, False, False]
    assert part.state_dict()["norms"] == [50.0] * 3


def test_a_quiet_step_between_begins_the_patience_anew() -> None:
    part = SkipSpikes(factor=3.0, least=2, patience=2)
    assert skips(part, [1.0, 1.0, 9.0, 9.0, 1.0, 9.0, 9.0, 9.0]) == [False] * 2 + [True, True, False, True, True, False]


@pytest.mark.parametrize("factor", [None, 10.0])
def test_what_is_not_finite_is_always_left_out(factor: float | None) -> None:
    part = SkipSpikes(factor=factor, least=1, patience=1)
    assert skips(part, [math.nan] * 4 + [1.0, math.inf]) == [True] * 4 + [False, True]


def test_without_a_factor_nothing_finite_is_left_out() -> None:
    assert not any(skips(SkipSpikes(factor=None, least=1), [1.0, 1e30]))


def test_a_step_that_is_left_out_changes_neither_weights_nor_moments() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones(2)
    optimizer.step()
    before, step = weight.detach().clone(), optimizer.state[weight]["step"].clone()
    weight.grad = torch.tensor([1.0, torch.inf])
    assert SkipSpikes().apply([weight]).skip
    optimizer.step()
    assert torch.equal(weight, before)
    assert optimizer.state[weight]["step"] == step


def test_it_goes_on_from_a_checkpoint() -> None:
    norms = [1.0, 1.1, 0.9, 20.0, 20.0, 1.0, 20.0, 20.0, 20.0]
    first = SkipSpikes(least=3, patience=2)
    skips(first, norms[:4])
    second = SkipSpikes(least=3, patience=2)
    second.load_state_dict(first.state_dict())
    assert skips(second, norms[4:]) == skips(first, norms[4:])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SkipSpikes(factor=1.0), r"SkipSpikes\.factor: expected a number > 1, or None, got 1\.0"),
        (lambda: SkipSpikes(least=0), r"SkipSpikes\.least: expected 1 to window=100 norms, got 0"),
        (lambda: SkipSpikes(least=30, window=20), r"SkipSpikes\.least"),
        (lambda: SkipSpikes(patience=0), r"SkipSpikes\.patience"),
    ],
)
def test_refusals(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
