import math
from collections.abc import Callable
from typing import Any

import pytest

from rlstab.errors import ConfigError
from rlstab.losses import KL, AdaptiveKL, Controller, Cosine, DynamicKL, Objective, presets


def after(controller: Controller, steps: list[int]) -> list[float]:
    found = []
    for step in steps:
        controller.observe(step, {})
        found.append(float(controller.value))
    return found


def test_a_cosine_has_its_ends_and_its_middle() -> None:
    coef = Cosine(start=0.9, end=0.1, steps=100)
    assert float(coef.value) == 0.9
    assert after(coef, [25, 50, 75, 100, 300]) == pytest.approx(
        [0.1 + 0.4 * (1 + math.sqrt(0.5)), 0.5, 0.1 + 0.4 * (1 - math.sqrt(0.5)), 0.1, 0.1]
    )


def test_grpo_d_falls_and_rises() -> None:
    """The numbers of the paper's formula for 1000 steps of which 300 explore."""
    coef = presets.grpo_d(steps=1000).terms["kl"].coef
    assert isinstance(coef, DynamicKL)
    assert float(coef.value) == pytest.approx(0.07)
    assert after(coef, [150, 300, 650, 1000, 1200]) == pytest.approx([0.055, 0.04, 0.07, 0.1, 0.1])


def test_an_adaptive_coefficient_follows_the_kl() -> None:
    coef = AdaptiveKL(target=0.1, start=0.05, gain=0.5, bound=0.2)
    for kl, factor in ((0.11, 1.05), (0.5, 1.1), (0.0, 0.9), (0.1, 1.0), (math.nan, 1.1), (math.inf, 1.1)):
        before = float(coef.value)
        coef.observe(1, {"kl": kl, "other": 9.0})
        assert float(coef.value) == pytest.approx(before * factor)


def test_it_holds_a_process_at_its_target() -> None:
    """A KL that is inversely proportional to the coefficient settles at the target."""
    coef = AdaptiveKL(target=0.1, start=1.0, gain=0.5)
    for step in range(1, 200):
        coef.observe(step, {"value": 0.02 / float(coef.value)})
    assert float(coef.value) == pytest.approx(0.2, rel=0.02)


def test_it_stays_between_its_ends() -> None:
    coef = AdaptiveKL(target=1.0, start=1.0, gain=4.0, min=0.9, max=1.1)
    coef.observe(1, {"kl": 100.0})
    assert float(coef.value) == 1.1
    for step in (2, 3):
        coef.observe(step, {"kl": 0.0})
    assert float(coef.value) == 0.9


def test_it_reads_the_metric_that_it_is_told() -> None:
    coef = AdaptiveKL(target=0.1, start=0.05, metric="drift")
    coef.observe(1, {"kl": 9.0, "drift": 0.1})
    assert float(coef.value) == 0.05
    with pytest.raises(ConfigError, match=r"reports no metric 'drift' \(it has \['kl'\]\)"):
        coef.observe(2, {"kl": 9.0})
    with pytest.raises(ConfigError, match=r"reports no metric 'kl' or 'value'.*metric=\.\.\."):
        AdaptiveKL(target=0.1).observe(1, {"clip": 0.1})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cosine(start=1.0, end=0.0, steps=10),
        lambda: DynamicKL(steps=10),
        lambda: AdaptiveKL(target=0.1),
    ],
)
def test_they_go_on_from_a_checkpoint(make: Callable[[], Controller]) -> None:
    first, second = Objective(kl=KL(coef=make())), Objective(kl=KL(coef=make()))
    for step in range(1, 5):
        first.observe(step, {"kl": {"kl": 0.3}})
    second.load_state_dict(first.state_dict())
    for objective in (first, second):
        objective.observe(5, {"kl": {"kl": 0.3}})
    assert first.state_dict() == second.state_dict()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Cosine(start=1.0, end=0.0, steps=0), r"Cosine\.steps: expected at least 1, got 0"),
        (lambda: Cosine(start=math.nan, end=0.0, steps=9), r"Cosine\.start"),
        (lambda: DynamicKL(min=0.2, max=0.1, steps=9), r"DynamicKL\.max: expected a number of at least 0\.2, got 0\.1"),
        (lambda: DynamicKL(steps=1), r"DynamicKL\.steps: expected at least 2"),
        (lambda: DynamicKL(steps=9, explore=1.0), r"DynamicKL\.explore: expected a share between 0 and 1"),
        (lambda: AdaptiveKL(target=0.0), r"AdaptiveKL\.target"),
        (lambda: AdaptiveKL(target=0.1, start=99.0), r"AdaptiveKL\.start"),
        (lambda: AdaptiveKL(target=0.1, gain=-1.0), r"AdaptiveKL\.gain"),
    ],
)
def test_refusals(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
