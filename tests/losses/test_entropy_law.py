import math
import random

import pytest

from rlstab.errors import ConfigError
from rlstab.losses import EntropyLaw


def law_of(points: list[tuple[float, float]], **changes: int) -> EntropyLaw:
    law = EntropyLaw(**changes)
    for entropy, reward in points:
        law.observe(entropy, reward)
    return law


def noisy(count: int, noise: float = 0.01) -> list[tuple[float, float]]:
    draw = random.Random(0)
    entropies = [2.0 * math.exp(-step / 30) for step in range(count)]
    return [(h, 0.9 - 0.12 * math.exp(h) + noise * draw.gauss(0, 1)) for h in entropies]


def test_it_finds_the_law_and_the_ceiling() -> None:
    law = law_of(noisy(200, noise=0.0))
    assert (law.a, law.b, law.ceiling) == pytest.approx((0.12, 0.9, 0.78))
    assert law.explained == pytest.approx(1.0)


def test_it_is_least_squares() -> None:
    points = noisy(80)
    law = law_of(points)
    xs, ys = [math.exp(h) for h, _ in points], [r for _, r in points]
    mean_x, mean_y = sum(xs) / 80, sum(ys) / 80
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    assert law.a == pytest.approx(-slope)
    assert law.b == pytest.approx(mean_y - slope * mean_x)
    assert sum(law.residual(h, r) for h, r in points) == pytest.approx(0.0, abs=1e-9)


def test_the_first_steps_predict_the_ceiling_of_the_rest() -> None:
    """The paper's claim for its 36 first steps of 200, on a run that obeys the law with a hundredth of noise."""
    assert law_of(noisy(200)[:36]).ceiling == pytest.approx(law_of(noisy(200)).ceiling, abs=0.02)


def test_there_is_no_law_before_there_is_one() -> None:
    few, still = law_of(noisy(19)), law_of([(1.0, 0.5)] * 40)
    for law in (few, still):
        assert not law.fitted
        assert all(math.isnan(x) for x in (law.a, law.b, law.ceiling, law.explained))
    assert law_of(noisy(20)).fitted


def test_what_is_not_finite_is_passed_over() -> None:
    law = law_of(noisy(30))
    before = law.state_dict()
    for entropy, reward in ((math.nan, 0.5), (1.0, math.nan), (math.inf, 0.5)):
        law.observe(entropy, reward)
    assert law.state_dict() == before


def test_it_goes_on_from_a_checkpoint() -> None:
    points = noisy(60)
    resumed = EntropyLaw()
    resumed.load_state_dict(law_of(points[:25]).state_dict())
    for entropy, reward in points[25:]:
        resumed.observe(entropy, reward)
    assert resumed.state_dict() == law_of(points).state_dict()


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"EntropyLaw\.least: expected at least 3 steps"):
        EntropyLaw(least=2)
