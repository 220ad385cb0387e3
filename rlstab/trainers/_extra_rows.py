"""Rows beside the rollouts: completions that the policy did not sample in this step, with terms of their own.

The seam. An `ExtraRows` says for each optimizer step which rows belong to it, over all ranks, as a function of the
step's number alone: nothing has to be saved for an exact resume, and every rank can count without asking the others.
`ExtraPass` takes this rank's share of a micro-batch, pads it, runs the policy on it, and hands the objective a
`TokenBatch` whose `rows` is the source's role. Terms choose it by name: `ForwardKL(rows="buffer", ...)`.

- Rows have their own forward, masks and counts; advantages, filters and statistics of the rollouts never see them.
- Log-probs that rows bring along (`ExtraRow.logps`) are `batch.logp(source)` of their batch. References of the trainer
  that terms on these rows read, and the rows do not carry, run beside the policy.
- Rows with an `advantage` fill that column: a surrogate can act on them as on rollouts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlstab.batch import Column, Count, LogProbs, Requirement, TokenBatch, VocabStat
from rlstab.errors import ConfigError, ShapeError
from rlstab.losses import Needs, Objective
from rlstab.trainers import _batches
from rlstab.trainers._policy_pass import PolicyPass

__all__ = ["ROLLOUT", "ExtraPass", "ExtraRow", "ExtraRows", "check_extra_rows", "cycled", "needs_of_rows"]

ROLLOUT = "rollout"


@dataclass(frozen=True, kw_only=True, eq=False)
class ExtraRow:
    """One completion of somebody else.

    Args:
        prompt_ids: the prompt, at least one token.
        completion_ids: the completion, at least one token.
        loss_mask: which tokens of the completion are trained on; all if not given.
        logps: log-probs in nats of the completion's tokens, by source.
        advantage: what a surrogate on these rows weighs the row with.

    Raises:
        ShapeError: if the lengths do not agree.

    >>> ExtraRow(prompt_ids=[5], completion_ids=[6, 7], logps={"initial": [-0.5]})
    Traceback (most recent call last):
    ...
    rlstab.errors.ShapeError: ExtraRow.logps['initial']: expected 2 numbers, one per token of the completion, got 1
    """

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    loss_mask: Sequence[bool] | None = None
    logps: Mapping[str, Sequence[float]] = field(default_factory=dict)
    advantage: float | None = None

    def __post_init__(self) -> None:
        size = len(self.completion_ids)
        if not len(self.prompt_ids) or not size:
            raise ShapeError(
                f"ExtraRow: expected a prompt and a completion of at least one token, got {len(self.prompt_ids)} and "
                f"{size} tokens"
            )
        named = {f"logps[{source!r}]": values for source, values in self.logps.items()}
        if self.loss_mask is not None:
            named["loss_mask"] = self.loss_mask
        for name, values in named.items():
            if len(values) != size:
                raise ShapeError(
                    f"ExtraRow.{name}: expected {size} numbers, one per token of the completion, got {len(values)}"
                )


class ExtraRows(ABC):
    """Where the rows of one role come from. Abstract: a buffer, a set of demonstrations."""

    @property
    @abstractmethod
    def role(self) -> str:
        """What terms call these rows: `buffer`, `demonstration`."""

    @property
    @abstractmethod
    def per_step(self) -> int:
        """How many rows an optimizer step has, over all ranks."""

    @property
    def carries(self) -> frozenset[Requirement]:
        """What every row brings along: `LogProbs(source)`, `Column("advantages")`."""
        return frozenset()

    @abstractmethod
    def prepare(self, trainer: Any) -> None:
        """Look at the trainer once, before its first step: refuse what does not fit its model or tokenizer."""

    @abstractmethod
    def step(self, number: int) -> Sequence[ExtraRow]:
        """The `per_step` rows of an optimizer step (0 is the first): the same on every rank and at every call."""


def cycled(size: int, per_step: int, step: int, *, seed: int) -> list[int]:
    """Places in a list of `size`: a shuffled epoch after the other, `per_step` at a time.

    >>> [cycled(4, 2, step, seed=0) for step in range(2)]
    [[0, 1], [3, 2]]
    """
    orders: dict[int, list[int]] = {}
    chosen = []
    for place in range(step * per_step, (step + 1) * per_step):
        epoch, within = divmod(place, size)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(size, generator=generator).tolist()
        chosen.append(orders[epoch][within])
    return chosen


def needs_of_rows(objective: Objective, role: str) -> frozenset[Requirement]:
    """What the terms on rows of this role read."""
    return frozenset(need for term in objective.terms.values() if term.rows == role for need in term.requires)


def check_extra_rows(objective: Objective, carried: Mapping[str, frozenset[Requirement]]) -> frozenset[Requirement]:
    """Refuse terms on rows that nobody brings, rows that no term reads, and what rows cannot have.

    Args:
        objective: the loss.
        carried: what the rows of each role bring along.

    Returns:
        What of the trainer's references these terms read, beside what the rows bring along.
    """
    asked = {name: term.rows for name, term in objective.terms.items() if term.rows != ROLLOUT}
    missing = {name: role for name, role in asked.items() if role not in carried}
    if missing:
        raise ConfigError(
            f"terms act on rows that this trainer does not have: {missing}; expected rows='rollout', or a source of "
            f"such rows in extra_rows=[...] (there are {sorted(carried) or 'none'})"
        )
    unread = sorted(set(carried) - set(asked.values()))
    if unread:
        raise ConfigError(
            f"extra_rows: no term of the objective acts on {unread[0]!r} rows; expected one such as "
            f"ForwardKL(rows={unread[0]!r}, ...), or no such rows"
        )
    return frozenset(
        need for role, own in carried.items() for need in _of_references(role, needs_of_rows(objective, role) - own)
    )


def _of_references(role: str, needs: Iterable[Requirement]) -> Iterator[Requirement]:
    own = {LogProbs("policy"), LogProbs("old"), Column("token_ids")}
    for need in needs:
        if (isinstance(need, Needs | Column) and need not in own) or need == LogProbs("sampler"):
            raise ConfigError(
                f"a term on {role!r} rows reads {need}, which these rows do not carry: expected terms that read the "
                "policy, references, and what the rows bring along"
            )
        if need not in own and not isinstance(need, VocabStat):
            yield need


class ExtraPass:
    """The policy's pass over this rank's extra rows of a micro-batch.

    Args:
        trainer: whose policy runs.
        sources: where the rows come from.
        pass_for: makes the pass that supplies what terms read.
    """

    def __init__(
        self,
        trainer: Any,
        sources: Sequence[ExtraRows],
        pass_for: Callable[[frozenset[Requirement]], PolicyPass],
    ) -> None:
        self._trainer = trainer
        self._sources = list(sources)
        self._needs = {source.role: needs_of_rows(trainer.objective, source.role) for source in sources}
        self._passes = {role: pass_for(needs) for role, needs in self._needs.items()}
        if self._sources and trainer._routing.replay is not None:
            raise ConfigError(
                f"replay={trainer._routing.replay!r} has routes of the rollouts alone, and "
                f"{self._sources[0].role!r} rows beside them have none: leave replay unset"
            )
        shares = trainer.accelerator.num_processes * trainer.args.gradient_accumulation_steps
        for source in self._sources:
            if source.per_step < shares:
                raise ConfigError(
                    f"extra_rows: {source.per_step} {source.role!r} rows a step; expected at least {shares}, one for "
                    "each micro-batch of each process"
                )
            source.prepare(trainer)

    def __call__(self, model: nn.Module) -> list[TokenBatch]:
        """A batch for each role: rows of the step at hand, of this micro-batch and rank."""
        if not self._sources:
            return []
        with self._trainer._routing.aside():
            return [self._batch(model, source) for source in self._sources]

    def _batch(self, model: nn.Module, source: ExtraRows) -> TokenBatch:
        trainer = self._trainer
        accelerator, accumulation = trainer.accelerator, trainer.args.gradient_accumulation_steps
        rows = source.step(trainer.state.global_step)
        first = accelerator.process_index * accumulation + (trainer._step % accumulation if model.training else 0)
        own = rows[first :: accelerator.num_processes * accumulation]
        inputs = host_inputs(own, trainer._tokenizer.pad_token_id, accelerator.device)
        carried = {name: _padded([row.logps[name] for row in own], 0.0, inputs) for name in own[0].logps}
        for name in self._scored(source.role) - carried.keys():
            with torch.no_grad(), trainer._without_checkpointing():
                carried[name] = trainer._score_reference(name, inputs)
        logps, vocab, _ = self._passes[source.role](model, inputs, aux_loss=False)
        counts = _counts(rows, own, accelerator.num_processes, accumulation) if model.training else {}
        batch = _batches.token_batch(inputs, logps={**carried, "policy": logps}, vocab=vocab, counts=counts)
        return batch.replace(rows=source.role)

    def _scored(self, role: str) -> set[str]:
        """The references whose log-probs terms on these rows read."""
        sources = {need.source for need in self._needs[role] if isinstance(need, LogProbs)}
        held: set[str] = self._trainer._references.sources
        return sources & held


def host_inputs(rows: Sequence[ExtraRow], pad: int, device: torch.device) -> dict[str, Any]:
    """Rows as the host's dictionary of tensors: prompts padded on the left, completions on the right."""
    before = max(len(row.prompt_ids) for row in rows)
    after = max(len(row.completion_ids) for row in rows)

    def table(lists: list[list[Any]]) -> Tensor:
        return torch.tensor(lists, device=device)

    prompts = [(before - len(row.prompt_ids), list(row.prompt_ids)) for row in rows]
    completions = [(after - len(row.completion_ids), list(row.completion_ids)) for row in rows]
    inputs: dict[str, Any] = {
        "prompt_ids": table([[pad] * gap + ids for gap, ids in prompts]),
        "prompt_mask": table([[0] * gap + [1] * len(ids) for gap, ids in prompts]),
        "completion_ids": table([ids + [pad] * gap for gap, ids in completions]),
        "completion_mask": table([[1] * len(ids) + [0] * gap for gap, ids in completions]),
    }
    if any(row.loss_mask is not None for row in rows):
        masks = [row.loss_mask if row.loss_mask is not None else [True] * len(row.completion_ids) for row in rows]
        inputs["tool_mask"] = _padded(masks, 0, inputs).long()
    advantages = [row.advantage for row in rows if row.advantage is not None]
    if len(advantages) == len(rows):
        inputs["advantages"] = torch.tensor(advantages, device=device)
    return inputs


def _padded(values: Sequence[Sequence[float]], filling: float, inputs: Mapping[str, Any]) -> Tensor:
    mask = inputs["completion_mask"]
    padded = torch.full(mask.shape, filling, dtype=torch.float32)
    for line, numbers in zip(padded, values, strict=True):
        line[: len(numbers)] = torch.as_tensor(numbers, dtype=torch.float32)
    return padded.to(mask.device)


def _counts(rows: Sequence[ExtraRow], own: Sequence[ExtraRow], ranks: int, accumulation: int) -> dict[str, Count]:
    """What means over these rows divide by, per rank: those of the step are the same on every rank."""
    step = Count(tokens=sum(map(_tokens, rows)) / ranks, sequences=len(rows) / ranks)
    here = Count(tokens=float(sum(map(_tokens, own)) * accumulation), sequences=float(len(own) * accumulation))
    return {"step": step, "generation": step, "micro_batch": here}


def _tokens(row: ExtraRow) -> int:
    return len(row.completion_ids) if row.loss_mask is None else sum(map(bool, row.loss_mask))
