"""However an optimizer step is split over micro-batches and processes, its gradient is the same."""

import os
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from two_processes import in_two_processes

from rlstab.batch import Count, Requirement, TokenBatch
from rlstab.losses import (
    KL,
    ClippedSurrogate,
    ConflictWeight,
    EntropyBonus,
    GroupNorm,
    KLCov,
    Loss,
    Mean,
    Objective,
    RolloutPart,
    StepStatistic,
    Term,
    TopEntropy,
    prepared_parts,
)
from rlstab.losses._mean import Unit

VOCABULARY, ROWS, LENGTH = 11, 16, 9


class Policy(nn.Module):
    """A recurrent language model of a few hundred parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.core = nn.GRU(6, 8, batch_first=True)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-prob of each token and entropy at its position."""
        before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1)
        logp = self.head(self.core(self.embed(before))[0]).log_softmax(-1)
        return logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


@dataclass(frozen=True)
class Case:
    """A policy that has moved since the rollouts were made, an objective, and a whole step with what phase 1 left."""

    policy: Policy
    objective: Objective
    step: TokenBatch


def objective_over(over: Literal["step", "micro_batch"]) -> Objective:
    mean = Mean(over=over)
    return Objective(
        policy=ClippedSurrogate(low=0.2, high=0.28, weights=(ConflictWeight(),), mean=mean),
        cov=0.5 * KLCov(fraction=0.1, over=over, mean=mean),
        drift=0.05 * KL(estimator="k3", mean=Mean(unit="sequence", over=over)),
        calm=0.01 * EntropyBonus(weights=(TopEntropy(fraction=0.3, over=over),), mean=mean),
    )


def generation(requires: frozenset[Requirement], old: Policy, initial: Policy) -> TokenBatch:
    """Rollouts with everything of phase 1."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    tokens[:, :2] = 7  # a prefix that good and bad completions share
    batch = TokenBatch(
        mask=torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (ROWS, 1), generator=generator),
        token_ids=tokens,
        rewards=torch.randint(0, 2, (ROWS,), generator=generator).double(),
        group=torch.arange(ROWS) // 4,
    )
    with torch.no_grad():
        batch = batch.replace(logps={"old": old(tokens)[0], "initial": initial(tokens)[0]})
    for part in prepared_parts(requires, RolloutPart):
        batch = batch.replace(parts={**batch.parts, part.key: part.compute(batch)})
    return batch.replace(advantages=GroupNorm().compute(batch))


@cache
def case(over: Literal["step", "micro_batch"] = "step") -> Case:
    torch.manual_seed(0)
    policies = [Policy().double() for _ in range(3)]
    policy, old, initial = policies
    with torch.no_grad():
        for moved, size in ((old, 0.1), (initial, 0.2)):
            for parameter, start in zip(moved.parameters(), policy.parameters(), strict=True):
                parameter.copy_(start + size * torch.randn_like(start))
    objective = objective_over(over)
    return Case(policy, objective, generation(objective.requires, old, initial))


def score(policy: Policy, batch: TokenBatch) -> TokenBatch:
    logp, entropy = policy(batch.column("token_ids"))
    return batch.replace(logps={**batch.logps, "policy": logp}, vocab={"entropy": entropy})


def prepare(objective: Objective, step: TokenBatch) -> dict[str, Tensor]:
    """Phase 2: what step statistics leave."""
    parts = dict(step.parts)
    for part in prepared_parts(objective.requires, StepStatistic):
        parts[part.key] = part.compute(step.replace(parts=parts)).detach()
    return parts


def gradient_of(case: Case, step: TokenBatch, sizes: list[int]) -> Tensor:
    """Gradient of a step that is run in micro-batches."""
    case.policy.zero_grad()
    for micro in step.split(sizes):
        case.objective(score(case.policy, micro)).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in case.policy.parameters() if parameter.grad is not None])


def whole_step(case: Case) -> TokenBatch:
    with torch.no_grad():
        return case.step.replace(parts=prepare(case.objective, score(case.policy, case.step)))


def relative(gradient: Tensor, expected: Tensor) -> float:
    return float((gradient - expected).norm() / expected.norm())


SPLITS = [[8, 8], [4] * 4, [2] * 8, [1] * 16, [3, 7, 1, 5]]


def test_the_step_is_a_hard_one() -> None:
    """Every part acts: something is clipped, in conflict, chosen, masked; and rows are of many lengths."""
    step, ours = whole_step(case()), case()
    _, terms = ours.objective(score(ours.policy, step))
    for term, metric in [
        ("policy", "clip_region"),
        ("policy", "conflict_weight/conflict"),
        ("cov", "selected"),
        ("calm", "entropy"),
    ]:
        assert float(terms[term].metrics[metric].value()) > 0
    assert all(float(report.loss) != 0 for report in terms.values())
    assert len(step.mask.sum(-1).unique()) > 3


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_any_split_of_a_step_gives_the_same_gradient(sizes: list[int]) -> None:
    ours, step = case(), whole_step(case())
    assert relative(gradient_of(ours, step, sizes), gradient_of(ours, step, [ROWS])) < 1e-10


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_in_single_precision_too(sizes: list[int]) -> None:
    double = case()
    step = double.step
    ours = Case(Policy(), double.objective, step)
    ours.policy.load_state_dict(double.policy.state_dict())
    logps = {name: value.float() for name, value in step.logps.items()}
    ours = Case(ours.policy, ours.objective, step.replace(logps=logps, advantages=step.column("advantages").float()))
    whole = whole_step(ours)
    assert relative(gradient_of(ours, whole, sizes), gradient_of(ours, whole, [ROWS])) < 1e-6


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_over_micro_batches_it_is_another(sizes: list[int]) -> None:
    ours = case("micro_batch")
    weight = len(sizes)  # what a trainer divides by when micro-batches are averaged
    split = gradient_of(ours, ours.step, sizes) / weight
    assert relative(split, gradient_of(ours, ours.step, [ROWS])) > 1e-3


def test_the_order_of_rows_does_not_matter() -> None:
    ours, step = case(), whole_step(case())
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    shuffled = ours.step.select(order)
    with torch.no_grad():
        shuffled = shuffled.replace(parts=prepare(ours.objective, score(ours.policy, shuffled)))
    assert relative(gradient_of(ours, shuffled, [5, 6, 5]), gradient_of(ours, step, [ROWS])) < 1e-10


@dataclass(frozen=True, kw_only=True)
class Imitate(Term):
    """Cross-entropy of demonstrations."""

    rows: str = "demonstration"

    def loss(self, batch: TokenBatch) -> Loss:
        return Loss(-batch.logp("policy"), {})


@pytest.mark.parametrize("units", [("token", "token"), ("token", "sequence"), (LENGTH, "token")], ids=str)
def test_each_row_source_is_counted_by_itself(units: tuple[Unit, Unit]) -> None:
    """Demonstrations in a batch of their own, as many micro-batches as rollouts but of other sizes."""
    ours, step = case(), whole_step(case())
    objective = Objective(
        cov=KLCov(fraction=0.1, mean=Mean(unit=units[0])), imitate=0.3 * Imitate(mean=Mean(unit=units[1]))
    )
    demonstrations = TokenBatch(
        mask=torch.arange(5) < torch.tensor([[2], [5], [1], [4], [3], [5]]),
        token_ids=torch.arange(30).view(6, 5) % VOCABULARY,
        rows="demonstration",
    )

    def gradient(rollout_sizes: list[int], demonstration_sizes: list[int]) -> Tensor:
        ours.policy.zero_grad()
        for batches in zip(step.split(rollout_sizes), demonstrations.split(demonstration_sizes), strict=True):
            objective(*(score(ours.policy, batch) for batch in batches)).loss.backward()
        return torch.cat(
            [parameter.grad.flatten() for parameter in ours.policy.parameters() if parameter.grad is not None]
        )

    whole = gradient([ROWS], [6])
    for sizes in (([8, 8], [1, 5]), ([10, 2, 4], [2, 2, 2])):
        assert relative(gradient(*sizes), whole) < 1e-10


# --- two processes ----------------------------------------------------------------------------------------------------


def gathered(tensor: Tensor) -> Tensor:
    pieces = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, tensor.contiguous())
    return torch.cat(pieces)


def train_as_one_of_two(sizes: list[int]) -> dict[str, Any]:
    """A data-parallel trainer: own rows, counts per rank, statistics of the gathered step, the mean of gradients."""
    dist.init_process_group("gloo")
    ours, rank = case(), dist.get_rank()
    mine = ours.step.select(slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)).replace(counts={})
    with torch.no_grad():
        scored = score(ours.policy, mine)
    step = TokenBatch(
        mask=gathered(mine.mask),
        logps={name: gathered(value) for name, value in scored.logps.items()},
        vocab={name: gathered(value) for name, value in scored.vocab.items()},
        advantages=gathered(mine.column("advantages")),
        parts={key: gathered(value) for key, value in mine.parts.items()},
    )
    left = prepare(ours.objective, step)
    own = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    totals = torch.tensor([float(mine.loss_mask.sum()), float(len(mine.mask))], dtype=torch.float64)
    dist.all_reduce(totals)
    tokens, sequences = (totals / dist.get_world_size()).unbind()
    mine = mine.replace(
        parts={key: value[own] if value.dim() else value for key, value in left.items()},
        counts={"step": Count(tokens=tokens, sequences=sequences)},
    )
    gradient = gradient_of(ours, mine, sizes)
    dist.all_reduce(gradient)
    return {"gradient": gradient / dist.get_world_size(), "process": os.getpid(), "world": dist.get_world_size()}


@pytest.mark.parametrize("sizes", [[8], [3, 1, 4]], ids=str)
def test_two_processes_give_the_gradient_of_one(sizes: list[int]) -> None:
    ranks = in_two_processes(train_as_one_of_two, sizes)
    assert len({os.getpid(), *(rank["process"] for rank in ranks)}) == 3
    assert [rank["world"] for rank in ranks] == [2, 2]
    expected = gradient_of(case(), whole_step(case()), [ROWS])
    for rank in ranks:
        assert relative(rank["gradient"], expected) < 1e-6
