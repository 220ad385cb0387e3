"""How high a limit must be for a given rate of false alarms: measured, not assumed.

The tables hold false alarms per 1000 steps, by length of the baseline, the worst of five kinds of noise: independent
and AR(1) with 0.5 and 0.8, normal; Student's t with 3 (charts) and 5 degrees of freedom, independent. 3000 series of
1000 steps each. Spikes are judged without t(3): whose single values lie beyond any limit that would still find one.
"""

import math
from itertools import pairwise

from rlstab.errors import ConfigError
from rlstab.monitors._charts import Chart, Cusum, Ewma, PageHinkley

Table = tuple[tuple[float, float], ...]

OF_CHART: dict[tuple[Chart, int], Table] = {
    (Cusum(), 40): (
        *((8, 0.136), (10, 0.107), (12, 0.0801), (14, 0.0635), (17, 0.0476)),
        *((20, 0.0336), (25, 0.0238), (30, 0.0177), (40, 0.0095)),
    ),
    (Cusum(), 100): (
        (6, 0.318),
        (7, 0.139),
        (8, 0.0615),
        (9, 0.0253),
        (10, 0.0127),
        (11, 0.007),
        (13, 0.0027),
        (15, 0.0017),
    ),
    (Ewma(), 100): ((4, 0.532), (4.5, 0.229), (5, 0.095), (5.5, 0.036), (6, 0.0104), (6.5, 0.0043), (7, 0.002)),
    (PageHinkley(), 100): (
        (10, 1.74),
        (15, 0.445),
        (20, 0.114),
        (25, 0.0513),
        (30, 0.0263),
        (35, 0.0124),
        (40, 0.0067),
    ),
}
OF_SPIKE: Table = (
    *((6, 0.872), (7, 0.417), (8, 0.218), (9, 0.147), (10, 0.0983)),
    *((12, 0.0333), (15, 0.0133), (20, 0.0083)),
)


def limit_for(table: Table, rate: float) -> float:
    """The limit whose false alarms per 1000 steps are `rate`: log-linear between the measured ones, ends held.

    >>> limit_for(((8, 0.1), (10, 0.001)), 0.01)
    9.0
    """
    if rate >= table[0][1]:
        return table[0][0]
    for (low, more), (high, fewer) in pairwise(table):
        if rate >= fewer:
            return low + (high - low) * math.log(more / rate) / math.log(more / fewer)
    return table[-1][0]


def chart_limit(chart: Chart, window: int, rate: float) -> float:
    """The limit of a chart over a baseline of `window` steps, for a rate of false alarms.

    Raises:
        ConfigError: the chart has other parameters than those that were measured, or the baseline another length.

    >>> chart_limit(Cusum(), 100, 0.0615)
    8.0
    """
    if (chart, window) not in OF_CHART:
        measured = ", ".join(f"{known!r} over {length}" for known, length in OF_CHART)
        raise ConfigError(
            f"Drift.limit: expected a number beside {chart!r} over {window} steps; measured are only {measured}"
        )
    return limit_for(OF_CHART[chart, window], rate)


def spike_limit(known: int, rate: float) -> float:
    """The limit of a robust z when `known` values are the norm: further out while they are few.

    >>> spike_limit(20, 0.0333)
    15.0
    """
    return limit_for(OF_SPIKE, rate) * (1 + 5 / known)
