"""The schema is complete, unambiguous, and finds every key that the rest of the package logs."""

import re

import pytest

from rlstab.errors import RlstabError, SchemaError
from rlstab.schema import SIGNALS, Signal, signal


@pytest.mark.parametrize(
    "key",
    [
        *(f"mismatch/{name}" for name in ("k1", "k1_se", "k3", "k3_se", "f2", "f2_se", "max_abs", "unscored")),
        *("mismatch/ess_token", "mismatch/ess_sequence"),
        *(f"policy/{name}" for name in ("entropy", "clip_fraction_low", "clip_fraction_high", "ratio_max")),
        *("drift/initial/kl", "drift/initial/kl_se", "drift/moving/kl", "drift/moving/kl_se"),
        *("objective/loss", "objective/policy/loss", "objective/policy/weight", "objective/drift/overflow"),
        *("train/reward", "train/reward_std", "train/frac_reward_zero_std", "train/grad_norm", "train/learning_rate"),
        *("train/loss", "train/step_time", "completions/mean_length", "completions/clipped_ratio"),
        *("rewards/accuracy/mean", "eval/pass@1", "eval/pass@8", "eval/reward", "eval/entropy", "eval/kl"),
    ],
)
def test_logged_keys_are_known(key: str) -> None:
    entry = signal(key)
    assert entry.key == key
    assert not re.search(r"<\w+>", entry.meaning + entry.formula)


def test_specific_pattern_comes_before_the_general_one() -> None:
    assert signal("objective/drift/overflow").reduction == "sum"
    assert (
        signal("objective/drift/weights/kept").meaning == "metric weights/kept of the term drift; its part documents it"
    )
    assert signal("eval/pass@8_se").direction == "none"
    assert signal("eval/pass@8").direction == "higher"


def test_named_segments_are_filled_in() -> None:
    assert signal("eval/pass@16").meaning == "chance that at least one of 16 completions of a held-out prompt is right"
    assert "C(n, 16)" in signal("eval/pass@16").formula


@pytest.mark.parametrize(
    "key", ["eval/pass@one", "rewards/a/b/mean", "mismatch", "", "objective/drift", "train/reward/"]
)
def test_other_keys_are_refused(key: str) -> None:
    with pytest.raises(SchemaError, match="not in the schema"):
        signal(key)


def test_error_names_the_nearest_key() -> None:
    with pytest.raises(SchemaError, match=r"'mismatch/k33' is not in the schema: did you mean mismatch/k3"):
        signal("mismatch/k33")
    with pytest.raises(SchemaError, match="SIGNALS lists every key"):
        signal("§§§§")
    assert issubclass(SchemaError, RlstabError)
    assert issubclass(SchemaError, KeyError)


def test_every_signal_is_reached_by_its_own_key() -> None:
    """No pattern hides a later one: filling a pattern with names finds that very pattern."""
    for entry in SIGNALS:
        key = entry.key.replace("<k>", "4").replace("<term>", "drift").replace("<metric>", "kept/mean")
        key = key.replace("<function>", "accuracy")
        found = signal(key)
        assert (found.unit, found.direction, found.reduction) == (entry.unit, entry.direction, entry.reduction), key


def test_keys_are_unique_and_every_signal_is_explained() -> None:
    keys = [entry.key for entry in SIGNALS]
    assert len(set(keys)) == len(keys)
    assert all(entry.meaning and entry.unit and entry.cadence and entry.cost for entry in SIGNALS)


def test_standard_errors_stand_beside_what_they_measure() -> None:
    units = {entry.key: entry.unit for entry in SIGNALS}
    errors = [key for key in units if key.endswith("_se")]
    assert len(errors) >= 7
    assert all(units[key] == units[key.removesuffix("_se")] for key in errors)


def test_signals_are_immutable() -> None:
    with pytest.raises(AttributeError):
        Signal("a/b", "meaning").key = "c"  # type: ignore[misc]
