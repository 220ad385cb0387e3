import random

import numpy as np
import pytest
import torch

from rlstab.models import isolated_rng


def test_the_block_is_seeded_and_the_outer_state_returns() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)

    torch.manual_seed(3)
    with isolated_rng(11):
        first = torch.rand(4)
    with isolated_rng(11):
        again = torch.rand(4)
    with isolated_rng(12):
        other = torch.rand(4)

    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_outer_state_returns_after_an_error() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)

    torch.manual_seed(3)
    with pytest.raises(ZeroDivisionError), isolated_rng(11):
        torch.rand(4).tolist()[0] / 0
    assert torch.equal(torch.rand(4), expected)


def test_python_and_numpy_are_left_alone() -> None:
    random.seed(3)
    np.random.seed(3)
    expected = random.random(), np.random.rand()

    random.seed(3)
    np.random.seed(3)
    with isolated_rng(11):
        torch.rand(1)
    assert (random.random(), np.random.rand()) == expected


@pytest.mark.gpu
def test_the_generator_of_the_device_is_seeded_and_restored() -> None:
    torch.cuda.manual_seed(3)
    expected = torch.rand(4, device="cuda")

    torch.cuda.manual_seed(3)
    with isolated_rng(11, device="cuda"):
        first = torch.rand(4, device="cuda")
    with isolated_rng(11, device="cuda:0"):
        again = torch.rand(4, device="cuda")

    assert torch.equal(torch.rand(4, device="cuda"), expected)
    assert torch.equal(first, again)
