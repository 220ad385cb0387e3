import copy
import json
import pickle
from typing import Any

import pytest

from rlstab.errors import ConfigError
from rlstab.losses import Controller, EntropyTarget, Linear


def run(controller: Controller, entropies: list[float], first: int = 1) -> list[float]:
    """The coefficient of each step, and of the one after the last."""
    values = [float(controller.value)]
    for step, entropy in enumerate(entropies, start=first):
        controller.observe(step, {"entropy": entropy})
        values.append(round(float(controller.value), 10))
    return values


def test_linear_goes_from_start_to_end_and_stays() -> None:
    assert run(Linear(start=1.0, end=0.2, steps=4), [0.0] * 6) == [1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2]
    assert run(Linear(start=0.0, end=3.0, steps=1), [0.0]) == [0.0, 3.0]


def test_entropy_target_acts_at_or_below_its_target_only() -> None:
    controller = EntropyTarget(target=0.5, start=0.01, delta=0.005)
    assert run(controller, [0.4, 0.5, 0.6, 0.6, 0.1]) == [0.0, 0.015, 0.02, 0.0, 0.0, 0.015]


def test_entropy_target_stays_within_its_bounds() -> None:
    assert run(EntropyTarget(target=1.0, start=0.5, delta=0.3, max=1.0), [0.0] * 4) == [0.0, 0.8, 1.0, 1.0, 1.0]
    falling = EntropyTarget(target=1.0, start=0.5, delta=0.3, min=0.1)
    assert run(falling, [2.0, 2.0, 2.0, 0.5]) == [0.0, 0.0, 0.0, 0.0, 0.4]


CONTROLLERS: list[Controller] = [
    Linear(start=1.0, end=0.0, steps=10),
    EntropyTarget(target=0.5, start=0.3, delta=0.1),
]
ENTROPIES = [0.1, 0.9, 0.9, 0.4, 0.5, 0.6, 0.2]


@pytest.mark.parametrize("controller", CONTROLLERS, ids=lambda c: type(c).__name__)
def test_a_checkpoint_goes_on_as_if_nothing_had_happened(controller: Controller) -> None:
    whole = copy.deepcopy(controller)
    expected = run(whole, ENTROPIES)
    before, after = copy.deepcopy(controller), copy.deepcopy(controller)
    run(before, ENTROPIES[:3])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert run(after, ENTROPIES[3:], first=4) == expected[3:]
    assert after.state_dict() == whole.state_dict()


@pytest.mark.parametrize("controller", CONTROLLERS, ids=lambda c: type(c).__name__)
def test_the_value_is_written_in_place(controller: Controller) -> None:
    controller = copy.deepcopy(controller)
    value = controller.value
    run(controller, ENTROPIES[:2])
    assert controller.value is value
    assert value.device.type == "cpu"
    assert value.dim() == 0


@pytest.mark.parametrize("controller", CONTROLLERS, ids=lambda c: type(c).__name__)
def test_copies_are_independent(controller: Controller) -> None:
    for copied in (copy.deepcopy(controller), pickle.loads(pickle.dumps(controller))):
        state = controller.state_dict()
        assert copied.state_dict() == state
        run(copied, ENTROPIES[:1])
        assert copied.state_dict() != state == controller.state_dict()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Linear(start=1.0, end=0.0, steps=0), r"Linear\.steps: expected at least 1, got 0"),
        (
            lambda: EntropyTarget(target=1.0, start=2.0),
            r"EntropyTarget\.start: expected a value in \[0\.0, 1\.0\], got 2",
        ),
    ],
)
def test_refusals(build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_entropy_target_says_which_metric_it_misses() -> None:
    with pytest.raises(ConfigError, match=r"EntropyTarget.*'entropy'.*\['kl'\]"):
        EntropyTarget(target=1.0).observe(1, {"kl": 0.1})
