from typing import Any

import pytest
import torch

from rlstab.batch import TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses import TotalVariationMask, presets

OLD = [0.5, 0.5, 0.01, 0.01, 0.9]
NEW = [0.75, 0.65, 0.04, 0.005, 0.65]


def batch_of(advantage: float) -> TokenBatch:
    logp = torch.tensor([NEW], dtype=torch.float64).log().requires_grad_()
    logps = {"policy": logp, "old": torch.tensor([OLD], dtype=torch.float64).log()}
    return TokenBatch(mask=torch.ones(1, 5), advantages=torch.tensor([advantage]).double(), logps=logps)


def test_gradient_by_hand() -> None:
    """A ratio of 4 at a rare token stays, one of 1.5 at a frequent token that moved by 0.25 does not."""
    for advantage, kept in ((1.0, [0, 1, 1, 1, 1]), (-1.0, [1, 1, 1, 1, 0])):
        batch = batch_of(advantage)
        (slope,) = torch.autograd.grad(presets.dppo_tv()(batch).loss, [batch.logps["policy"]])
        ratios = torch.tensor([NEW], dtype=torch.float64) / torch.tensor([OLD], dtype=torch.float64)
        torch.testing.assert_close(slope, -advantage * ratios * torch.tensor(kept) / 5)


def test_the_ratio_is_held_at_the_ceiling() -> None:
    logp = torch.tensor([[0.1]]).log().requires_grad_()
    logps = {"policy": logp, "old": torch.tensor([[0.001]]).log()}
    batch = TokenBatch(mask=torch.ones(1, 1), advantages=torch.ones(1), logps=logps)
    presets.dppo_tv(max=20.0)(batch).loss.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[-20.0]]))


def test_bounds_differ_by_side() -> None:
    factor = TotalVariationMask(low=0.3, high=0.1).factor
    assert factor(batch_of(1.0)).values.tolist() == [[0, 0, 1, 1, 1]]
    assert factor(batch_of(-1.0)).values.tolist() == [[1, 1, 1, 1, 1]]
    assert factor(batch_of(1.0)).metrics["total_variation_mask/kept"].value() == 0.6


def test_a_token_that_the_sampler_could_not_score_stays() -> None:
    batch = batch_of(1.0)
    scores = batch.logp("old").clone()
    scores[0, 0] = torch.nan
    batch = batch.replace(logps={**batch.logps, "sampler": scores})
    assert TotalVariationMask(against="sampler").factor(batch).values[0, 0] == 1


def test_it_says_that_it_is_idle_on_policy() -> None:
    assert TotalVariationMask().inert_on_policy == ("TotalVariationMask",)
    assert TotalVariationMask(against="sampler").inert_on_policy == ()


@pytest.mark.parametrize("changes", [{"low": -0.1}, {"high": 1.1}])
def test_refusals(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"TotalVariationMask\.{next(iter(changes))}: expected a number from 0 to 1"):
        TotalVariationMask(**changes)
