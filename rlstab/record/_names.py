"""What other tools call the metrics that rlstab knows, and how their rows become a run's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

from rlstab.errors import SchemaError
from rlstab.record._rows import Metrics, MetricsRow
from rlstab.schema import signal

STEP_NAMES = ("step", "global_step", "_step", "train/global_step", "training/global_step", "iteration")
TIME_NAMES = ("_timestamp", "time", "wall_time")

# Names of verl and OpenRLHF for what TRL and rlstab call otherwise.
_ELSEWHERE = {
    "critic/rewards/mean": "train/reward",
    "critic/score/mean": "train/reward",
    "actor/entropy": "policy/entropy",
    "actor/entropy_loss": "policy/entropy",
    "actor/grad_norm": "train/grad_norm",
    "actor/lr": "train/learning_rate",
    "actor/pg_loss": "train/policy_loss",
    "actor/kl_loss": "train/kl",
    "response_length/mean": "completions/mean_length",
    "response_length/clip_ratio": "completions/clipped_ratio",
    "rollout_corr/kl": "mismatch/k1",
    "rollout_corr/k3_kl": "mismatch/k3",
    "train/response_length": "completions/mean_length",
    "train/actor_lr": "train/learning_rate",
}


class Row(NamedTuple):
    """What a foreign log says of one step; time is 0 where it is unknown."""

    step: int
    time: float
    values: Mapping[str, float]


@cache
def canonical(name: str) -> str:
    """Return the key of the schema that a foreign name stands for, or the name itself.

    >>> canonical("reward"), canonical("train/rewards/exact/mean"), canonical("eval_reward"), canonical("my/number")
    ('train/reward', 'rewards/exact/mean', 'eval/reward', 'my/number')
    """
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    bare = name.removeprefix("train/")
    for candidate in (f"train/{bare}", bare, name):
        if is_known(candidate):
            return candidate
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else name


def is_known(key: str) -> bool:
    """Return whether the schema lists a key."""
    try:
        signal(key)
    except SchemaError:
        return False
    return True


def number(value: object) -> float | None:
    """Return a value as a number, also where it was written as text; None where it is none.

    >>> number("0.5"), number("nan"), number(True), number("high")
    (0.5, nan, None, None)
    """
    match value:
        case bool():
            return None
        case int() | float():
            return _finite_or_infinite(value)
        case str():
            try:
                return float(value)
            except ValueError:
                return None
    return None


def _finite_or_infinite(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def metrics_of(rows: Iterable[Row], *, torn: int = 0) -> Metrics:
    """Join rows of one step, later values counting, under the keys of the schema; rows without numbers are left out."""
    times: dict[int, float] = {}
    values: dict[int, dict[str, float]] = {}
    for row in rows:
        if not row.values:
            continue
        times[row.step] = max(times.get(row.step, 0.0), row.time)
        values.setdefault(row.step, {}).update({canonical(key): value for key, value in row.values.items()})
    return Metrics(tuple(MetricsRow(step, times[step], values[step]) for step in sorted(values)), torn)


def flat(data: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested mappings as one, with `/` between their keys."""
    found: dict[str, object] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        else:
            found[f"{prefix}{key}"] = value
    return found


def as_step(value: object) -> int | None:
    """Return a step of training as an integer ≥ 0; None for what is none."""
    found = number(value)
    if found is None or not math.isfinite(found) or not 0 <= found < 2**53:
        return None
    return int(found)
