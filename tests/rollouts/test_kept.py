"""Log-probs renormalised over kept sets: by hand, at the edges, and without bias by enumeration."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from rlstab.errors import ShapeError
from rlstab.rollouts import KeptSets, renormalised_logprobs

V, T, K = 4, 2, 2


def test_a_worked_number_and_its_gradient() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log().requires_grad_()
    logprob = renormalised_logprobs(logits, torch.tensor(1), torch.tensor([1, 3, -1]))
    assert logprob.item() == pytest.approx(math.log(0.2 / 0.6), abs=1e-7)
    logprob.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([0, 2 / 3, 0, -2 / 3], dtype=torch.float64))


def test_the_whole_vocabulary_is_no_truncation() -> None:
    logits = torch.randn(3, 5, V)
    token_ids = torch.randint(V, (3, 5))
    expected = logits.log_softmax(-1).gather(-1, token_ids[..., None]).squeeze(-1)
    torch.testing.assert_close(renormalised_logprobs(logits, token_ids, torch.arange(V).expand(3, 5, V)), expected)


def test_an_empty_set_gives_the_untruncated_log_prob_and_a_finite_gradient() -> None:
    logits = torch.randn(2, V, requires_grad=True)
    kept = torch.tensor([[-1, -1], [0, 2]])
    logprobs = renormalised_logprobs(logits, torch.tensor([1, 2]), kept)
    assert logprobs[0].item() == pytest.approx(logits.log_softmax(-1)[0, 1].item())
    logprobs.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[1, [1, 3]].tolist() == [0, 0]


def test_half_precision_is_raised() -> None:
    logits = torch.randn(V).bfloat16()
    assert renormalised_logprobs(logits, torch.tensor(0), torch.tensor([0, 1])).dtype == torch.float32


def test_kept_sets_split_and_pad() -> None:
    kept = KeptSets.of([torch.tensor([3, 5]), torch.tensor([], dtype=torch.int64), torch.tensor([7])])
    assert kept.counts.tolist() == [2, 0, 1]
    assert [position.tolist() for position in kept.split()] == [[3, 5], [], [7]]
    assert kept.padded().tolist() == [[3, 5], [-1, -1], [7, -1]]
    assert KeptSets.of([]).padded().shape == (0, 0)
    with pytest.raises(ShapeError, match="add up to"):
        KeptSets(torch.tensor([1, 2]), torch.tensor([1]))


class TestEnumeration:
    """Every completion of two tokens of a tabular policy, truncated to its two best tokens per position."""

    rewards = torch.randn(V, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    @staticmethod
    def policy(seed: int) -> Tensor:
        """Logits after the empty prefix and after each first token: `[1 + V, V]`."""
        return torch.randn(1 + V, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    @staticmethod
    def logprob(logits: Tensor, completion: tuple[int, int], kept: Tensor | None) -> Tensor:
        """Log-prob of a completion; over the kept sets if there are any."""
        rows = torch.tensor([0, 1 + completion[0]])
        everything = torch.arange(V).expand(1 + V, V)
        sets = everything if kept is None else kept
        return renormalised_logprobs(logits[rows], torch.tensor(completion), sets[rows]).sum()

    def completions(self, kept: Tensor) -> list[tuple[int, int]]:
        """Those that can be sampled."""
        pairs = product(range(V), repeat=T)
        return [(a, b) for a, b in pairs if a in kept[0] and b in kept[1 + a]]

    def value_gradient(self, logits: Tensor, kept: Tensor) -> Tensor:
        """Gradient of the expected reward of the truncated policy, written out as probabilities."""
        logits = logits.clone().requires_grad_()
        mask = torch.zeros(1 + V, V, dtype=torch.bool).scatter_(1, kept, True)
        probs = logits.masked_fill(~mask, -torch.inf).softmax(-1)
        value = (probs[0][:, None] * probs[1:] * self.rewards).sum()
        (gradient,) = torch.autograd.grad(value, logits)
        return gradient

    def estimate(self, logits: Tensor, sampler: Tensor, kept: Tensor, trained_on: Tensor | None) -> Tensor:
        """Expectation over the truncated sampler of the gradient of ratio times reward."""
        logits = logits.clone().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for completion in self.completions(kept):
            sampled = self.logprob(sampler, completion, kept)
            behaviour = self.logprob(sampler, completion, trained_on)
            ratio = (self.logprob(logits, completion, trained_on) - behaviour).exp()
            total = total + sampled.exp() * ratio * self.rewards[completion]
        (gradient,) = torch.autograd.grad(total, logits)
        return gradient

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("staleness", [0, 1], ids=["on policy", "off policy"])
    def test_renormalised_ratios_are_unbiased(self, seed: int, staleness: int) -> None:
        logits, sampler = self.policy(seed), self.policy(seed + 10 * staleness)
        kept = sampler.topk(K).indices
        assert len(self.completions(kept)) == K**T
        estimated = self.estimate(logits, sampler, kept, trained_on=kept)
        torch.testing.assert_close(estimated, self.value_gradient(logits, kept), rtol=0, atol=1e-12)

    def test_untruncated_ratios_are_biased(self) -> None:
        logits = self.policy(0)
        kept = logits.topk(K).indices
        everything = torch.arange(V).expand(1 + V, V)
        estimated = self.estimate(logits, logits, kept, trained_on=None)
        assert float((estimated - self.value_gradient(logits, kept)).abs().max()) > 0.01
        assert float((estimated - self.value_gradient(logits, everything)).abs().max()) > 0.01
