"""Random streams and the drawing of tokens."""

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rlstab.rollouts import Sampling
from rlstab.rollouts._draw import draw, splitmix64, stream_keys, uniforms

PLAIN = Sampling(max_new_tokens=1)
NOTHING = torch.tensor([0.5])


def test_the_generator_gives_its_published_numbers() -> None:
    """The first outputs of SplitMix64 for the seed 1234567, as unsigned integers."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    outputs = splitmix64(torch.tensor([1234567] * 4), torch.arange(4))
    assert [output % 2**64 for output in outputs.tolist()] == published


def test_uniforms_are_uniform_within_and_across_streams() -> None:
    count = 1000
    keys = stream_keys(torch.full((count,), 42), torch.arange(count))
    assert len(set(keys.tolist())) == count
    numbers = torch.stack([uniforms(keys, torch.full((count,), step)) for step in range(count)])
    assert 0 <= float(numbers.min()) < float(numbers.max()) < 1
    for axis in (0, 1):
        means = numbers.mean(axis)
        assert float((means - 0.5).abs().max()) < 5 * (1 / 12 / count) ** 0.5
    neighbours = torch.corrcoef(torch.stack([numbers[:, :-1].flatten(), numbers[:, 1:].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 5e-3


def test_each_token_takes_the_share_of_its_probability() -> None:
    """Exactly: a grid of uniforms is inverted, not a sample."""
    points = 100_000
    logits = torch.tensor([0.1, 1e-4, 0.0, 0.5, 0.3999]).log()
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    drawn = draw(logits.expand(points, -1), grid, PLAIN)
    shares = drawn.token_ids.bincount(minlength=5) / points
    torch.testing.assert_close(shares, logits.exp(), rtol=0, atol=1.5 / points)
    torch.testing.assert_close(drawn.logprobs, logits[drawn.token_ids], rtol=0, atol=1e-6)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-52])
def test_the_edges_never_draw_what_has_no_probability(uniform: float) -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 0.3, -torch.inf], [-torch.inf, -torch.inf, 0.0, -torch.inf]])
    drawn = draw(logits, torch.full((2,), uniform, dtype=torch.float64), PLAIN)
    assert drawn.token_ids.tolist() == [1 if uniform == 0 else 2, 2]


def test_each_token_of_a_thin_tail_can_be_drawn() -> None:
    """A thousand tokens of probability 2e-9 each: sums in float32 would tell twenty of them apart."""
    logits = torch.cat([torch.zeros(1), torch.full((1000,), -20.0)])
    tail = 1000 * torch.tensor(-20.0, dtype=torch.float64).exp()
    uniform = 1 - tail * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = draw(logits.expand(1000, -1), uniform, PLAIN)
    assert sorted(drawn.token_ids.tolist()) == list(range(1, 1001))


def test_forbidden_tokens_are_never_drawn() -> None:
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    logits = torch.tensor([0.1, 0.6, 0.3]).log().expand(1000, -1)
    drawn = draw(logits, grid, dataclasses.replace(PLAIN, forbidden_ids=(1,)))
    assert drawn.token_ids.bincount().tolist() == [250, 0, 750]
    torch.testing.assert_close(drawn.logprobs, logits[0, drawn.token_ids])
    cut = Sampling(max_new_tokens=1, top_k=2, truncation="renormalise", forbidden_ids=(1,))
    kept = draw(logits, grid, cut).kept
    assert kept is not None
    assert kept.split()[0].tolist() == [0, 2]


def test_log_probs_are_those_of_the_temperature() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0]])
    drawn = draw(logits, NOTHING, dataclasses.replace(PLAIN, temperature=2.0))
    torch.testing.assert_close(drawn.logprobs, (logits / 2).log_softmax(-1)[0, drawn.token_ids])
    greedy = draw(logits, NOTHING, dataclasses.replace(PLAIN, temperature=0.0))
    assert greedy.token_ids.tolist() == [2]
    torch.testing.assert_close(greedy.logprobs, logits.log_softmax(-1)[0, 2:])


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = torch.randn(4, 50).bfloat16()
    drawn = draw(logits, torch.rand(4, dtype=torch.float64), PLAIN)
    expected = logits.float().log_softmax(-1).gather(-1, drawn.token_ids[:, None])[:, 0]
    torch.testing.assert_close(drawn.logprobs, expected)


def test_logits_that_are_not_finite_show_in_the_log_prob() -> None:
    logits = torch.tensor([[0.0, torch.nan], [0.0, 0.0]])
    assert draw(logits, NOTHING.expand(2), PLAIN).logprobs.isnan().tolist() == [True, False]


def reference_kept(scores: Tensor, sampling: Sampling) -> Tensor:
    """The tokens that the processors of transformers leave, in the order of `generate`."""
    ids = torch.zeros(len(scores), 1, dtype=torch.int64)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(ids, scores)  # type: ignore[arg-type]  # asks for legacy classes
    return scores.isfinite()


@pytest.mark.parametrize(
    "setting",
    [
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.1},
        {"top_k": 7, "top_p": 0.8},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.05},
        {"top_p": 1e-6},
        {"min_p": 1.0},
    ],
    ids=str,
)
def test_the_kept_sets_are_those_of_transformers(setting: dict[str, float]) -> None:
    sampling = Sampling(max_new_tokens=1, truncation="renormalise", **setting)  # type: ignore[arg-type]
    logits = torch.randn(200, 40, generator=torch.Generator().manual_seed(0))
    drawn = draw(logits, torch.rand(200, dtype=torch.float64), sampling)
    assert drawn.kept is not None
    expected = reference_kept(logits, sampling)
    assert [kept.tolist() for kept in drawn.kept.split()] == [row.nonzero()[:, 0].tolist() for row in expected]
    assert bool(expected.gather(-1, drawn.token_ids[:, None]).all())
