"""Laws equal fits by numpy, and trends are told from noise."""

import math

import numpy as np
import pytest

from rlstab.errors import ConfigError
from rlstab.monitors import Crossing, HeldOutGap, RewardKLLaw, Surprise
from rlstab.monitors._laws import line


def test_a_line_is_that_of_numpy() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 30))
    (slope, intercept), covariance = np.polyfit(x, y, 1, cov=True)
    found = line(list(zip(x.tolist(), y.tolist(), strict=True)))
    residuals = y - slope * x - intercept
    rho = max(0.0, float((residuals[1:] * residuals[:-1]).sum() / (residuals**2).sum()))
    assert found.slope == pytest.approx(slope)
    assert found.at(0.0) == pytest.approx(intercept)
    assert found.error == pytest.approx(math.sqrt(covariance[0, 0] * (1 + rho) / (1 - rho)))
    assert math.isnan(line([(1.0, 2.0), (1.0, 3.0)]).slope)


class TestRewardKL:
    def test_the_local_slope_forgets_the_start(self) -> None:
        """Reward that grows with √KL until 0.5 and falls beyond it: over-optimisation."""
        law = RewardKLLaw(window=6)
        for i in range(30):
            distance = 0.05 * i
            law.observe(distance**2, min(distance, 1.0 - distance))
            if i < 4:
                assert math.isnan(law.slope)
            elif i == 8:
                assert law.slope == pytest.approx(1.0)
        assert law.slope == pytest.approx(-1.0)

    def test_what_is_no_number_is_passed_over_and_a_state_goes_on(self) -> None:
        law, other = RewardKLLaw(least=3), RewardKLLaw(least=3)
        for kl, reward in ((0.0, 0.0), (math.nan, 1.0), (0.01, 0.1), (0.04, math.inf), (0.09, 0.5)):
            law.observe(kl, reward)
        other.load_state_dict(law.state_dict())
        assert other.slope == law.slope == pytest.approx(line([(0.0, 0.0), (0.1, 0.1), (0.3, 0.5)]).slope)

    def test_bad_numbers_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"RewardKLLaw\.window: expected at least least=5, got 4"):
            RewardKLLaw(window=4)


class TestSurprise:
    def test_it_is_the_cross_entropy_above_the_entropy_of_the_start(self) -> None:
        """A policy that sharpens its start is not surprising to it; one of the same entropy elsewhere is."""
        start = np.array([0.5, 0.3, 0.15, 0.05])

        def surprise(policy: np.ndarray) -> float:
            law = Surprise()
            for step in range(20):
                now = start if step < 10 else policy
                entropy, kl = -float(now @ np.log(now)), float(now @ np.log(now / start))
                law.observe(entropy, kl=kl if step % 10 >= 8 else math.nan)
            assert law.value == pytest.approx(float((start - policy) @ np.log(start)))
            return law.value

        sharper = start**2 / (start**2).sum()
        assert surprise(sharper) < -0.1
        assert surprise(start[::-1]) > 1.0

    def test_it_waits_for_its_means_and_a_state_goes_on(self) -> None:
        law, other = Surprise(first=2, window=2), Surprise(first=2, window=2)
        for entropy in (0.9, math.nan, 0.7, 0.6):
            assert math.isnan(law.value)
            law.observe(entropy, kl=0.1)
        other.load_state_dict(law.state_dict())
        for each in (law, other):
            each.observe(0.4, kl=math.inf)
        assert other.value == law.value == pytest.approx(0.1 + 0.5 - 0.8)

    def test_bad_numbers_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"Surprise\.first: expected at least 1 entropy, got 0"):
            Surprise(first=0)


class TestHeldOutGap:
    def test_gains_are_compared_from_their_own_starts(self) -> None:
        """Held-out prompts are harder from the start, which is no gap; what training alone gains is one."""
        law = HeldOutGap()
        law.observe(0.1, 9.0)  # before the first held-out score: not what is compared with
        assert law.examine(0.2) is None
        for step in range(40):
            law.observe(0.5 + 0.01 * step, 0.4)
            if step == 8:
                assert law.examine(0.3) is None
        now, start = 0.5 + 0.01 * 34.5, 0.5 + 0.01 * 4.5
        assert law.examine(0.5) == pytest.approx(((now - start) - (0.5 - 0.2)) / 0.4)
        assert law.examine(0.2) == pytest.approx((now - start) / 0.4)
        assert law.examine(math.nan) is None

    def test_a_state_goes_on(self) -> None:
        law, other = HeldOutGap(window=2), HeldOutGap(window=2)
        law.examine(0.1)
        for reward, spread in ((0.2, 0.5), (math.nan, 0.5), (0.4, 0.3), (0.6, 0.1)):
            law.observe(reward, spread)
        other.load_state_dict(law.state_dict())
        assert other.examine(0.2) == law.examine(0.2) == pytest.approx((0.5 - 0.3 - 0.1) / 0.4)

    def test_without_a_spread_there_is_no_unit(self) -> None:
        law = HeldOutGap(window=1)
        law.examine(0.1)
        law.observe(1.0, 0.0)
        assert law.examine(0.1) is None
        with pytest.raises(ConfigError, match=r"HeldOutGap\.window: expected at least 1 step, got 0"):
            HeldOutGap(window=0)


class TestCrossing:
    @pytest.mark.parametrize("rising", [True, False])
    def test_an_exponential_is_followed_to_its_bound(self, rising: bool) -> None:
        """The step is that at which the signal arrives, and 0 once it is there."""
        rate = 0.01 if rising else -0.01
        crossing = Crossing(bound=math.exp(rate * 1000), rising=rising)
        for step in range(0, 1000, 10):
            left = crossing.observe(step, math.exp(rate * step))
            assert left is None if step < 70 else left == pytest.approx(1000 - step, rel=1e-6)
        assert crossing.observe(1001, math.exp(rate * 1001)) == 0.0

    def test_noise_has_no_bound_to_cross(self) -> None:
        random, spoken = np.random.default_rng(0), 0
        for _ in range(200):
            crossing, value = Crossing(bound=1e4), 0.0
            for step in range(40):
                value = 0.5 * value + random.normal(scale=0.1)
                spoken += crossing.observe(step, math.exp(value)) is not None
        assert spoken / (200 * 40) < 0.01

    def test_what_moves_away_never_arrives(self) -> None:
        crossing = Crossing(bound=10.0)
        assert all(crossing.observe(step, math.exp(-0.1 * step)) is None for step in range(20))
        assert crossing.observe(21, math.nan) is None

    def test_a_state_goes_on(self) -> None:
        first, second = Crossing(bound=1e3), Crossing(bound=1e3)
        for step in range(9):
            first.observe(step, 1.1**step)
        second.load_state_dict(first.state_dict())
        left = math.log(1e3 / 1.1**9) / math.log(1.1)
        assert first.observe(9, 1.1**9) == second.observe(9, 1.1**9) == pytest.approx(left)
