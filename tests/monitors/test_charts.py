"""Charts and baselines against worked numbers, and their properties."""

import math

import numpy as np
import pytest
from monitor_vectors import vector

from rlstab.errors import ConfigError
from rlstab.monitors import Baseline, Chart, Cusum, Ewma, PageHinkley
from rlstab.monitors._budget import OF_CHART, OF_SPIKE, chart_limit, limit_for, spike_limit

WORKED = vector("detectors")
X: list[float] = WORKED["x"]
USED = {"x", "ewma_lambda0.2", "cusum_k0.5", "page_hinkley_delta0.1", "median_mad_first5", "robust_z_of_1.5"}


def test_every_worked_number_is_used() -> None:
    assert set(WORKED) == USED


def test_cusum() -> None:
    assert Cusum(k=0.5).statistics(X) == pytest.approx(WORKED["cusum_k0.5"])


def test_ewma() -> None:
    chart = Ewma(lam=0.2)
    for t, (statistic, worked) in enumerate(zip(chart.statistics(X), WORKED["ewma_lambda0.2"], strict=True), 1):
        assert 3 * chart.width(t) == pytest.approx(worked["limit_L3_sigma1"])
        assert statistic * chart.width(t) == pytest.approx(worked["z"])


def test_page_hinkley() -> None:
    assert PageHinkley(delta=0.1).statistics(X) == pytest.approx(WORKED["page_hinkley_delta0.1"])


def test_baseline() -> None:
    found = Baseline.of(X[:5])
    median, mad = WORKED["median_mad_first5"]
    assert found.median == pytest.approx(median)
    assert found.spread == pytest.approx(1.4826 * mad)
    assert found.robust_z(1.5) == pytest.approx(WORKED["robust_z_of_1.5"], abs=1e-4)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_baseline_finds_autocorrelation(rho: float) -> None:
    noise = np.random.default_rng(0).standard_normal(4000)
    values = [noise[0]]
    for innovation in noise[1:]:
        values.append(rho * values[-1] + math.sqrt(1 - rho**2) * innovation)
    found = Baseline.of(values)
    assert found.rho == pytest.approx(rho, abs=0.05)
    assert found.spread == pytest.approx(1.0, abs=0.06)


def test_constant_values_have_the_spread_they_are_given() -> None:
    assert Baseline.of([1e-10] * 50, least_spread=0.1).robust_z(0.05) == pytest.approx(0.5)
    assert math.isfinite(Baseline.of([0.0] * 50).robust_z(0.0))


def test_outliers_do_not_move_a_baseline() -> None:
    clean = [0.1 * (i % 5) for i in range(100)]
    assert Baseline.of([*clean[:-5], *[1e9] * 5]).median == pytest.approx(Baseline.of(clean).median, abs=0.1)


def test_charts_wait_for_values_on_one_side() -> None:
    balanced, shifted = [1.0, -1.0] * 50, [2.0] * 50
    for chart in {chart for chart, _ in OF_CHART}:
        assert max(chart.statistics([2.0 * x for x in balanced])) < max(chart.statistics([-2.0] * 20 + shifted))


@pytest.mark.parametrize(("chart", "window"), OF_CHART, ids=str)
def test_limits_grow_as_the_budget_shrinks(chart: Chart, window: int) -> None:
    limits = [chart_limit(chart, window, rate) for rate in (10.0, 1.0, 0.1, 0.01, 1e-6)]
    assert limits == sorted(limits)
    assert limits[1] < limits[3]
    for table in (OF_CHART[chart, window], OF_SPIKE):
        assert [limit_for(table, rate) for _, rate in table] == pytest.approx([limit for limit, _ in table])


def test_an_unmeasured_chart_needs_a_limit() -> None:
    with pytest.raises(ConfigError, match=r"Drift.limit: expected a number beside Cusum\(k=2.0\) over 100 steps"):
        chart_limit(Cusum(k=2.0), 100, 1.0)
    with pytest.raises(ConfigError, match=r"beside Ewma\(lam=0.1\) over 40 steps"):
        chart_limit(Ewma(), 40, 1.0)


def test_few_values_move_the_limit_of_a_spike_out() -> None:
    assert spike_limit(20, 0.1) > spike_limit(50, 0.1) > spike_limit(100, 0.1) > limit_for(OF_SPIKE, 0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cusum(k=-1.0), r"Cusum.k: expected a number of at least 0, got -1.0"),
        (lambda: Ewma(lam=0.0), r"Ewma.lam: expected a number in \(0, 1\], got 0.0"),
        (lambda: PageHinkley(delta=math.nan), r"PageHinkley.delta: expected a number of at least 0, got nan"),
    ],
)
def test_bad_parameters_are_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]
