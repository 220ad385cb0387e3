"""Rollouts that begin with an expert's tokens: made turn by turn, and their prefixes told from what follows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlstab.batch import Column, Count, LogProbs, TokenBatch, VocabStat
from rlstab.errors import ConfigError
from rlstab.losses import EXPERT_PREFIX, Objective
from rlstab.trainers import _batches
from rlstab.trainers._extra_rows import needs_of_rows
from rlstab.trainers._guidance import CARRIED, ROLE, Guidance, Progress
from rlstab.trainers._policy_pass import streams
from rlstab.trainers._routing import Routing

__all__ = ["Guided", "demonstration_ids"]

IMITATED = "rlstab_imitated"

Rows = Sequence[Mapping[str, Any]]
Sample = Callable[..., tuple[list[list[int]], list[list[float]] | None]]


@dataclass(frozen=True)
class Draft:
    """A rollout: its tokens with those of the prefix, their log-probs where the sampler returns them, and how many."""

    ids: list[int]
    logps: list[float] | None
    prefix: int


def demonstration_ids(value: Any, tokenizer: Any) -> list[int]:
    """The tokens of an expert's completion, the end of sequence among them; none of nothing.

    Args:
        value: text, or a conversation whose last message is the expert's.
        tokenizer: makes tokens of it.
    """
    text = value[-1]["content"] if isinstance(value, list) and value else value
    if not text:
        return []
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


class Guided:
    """Lets the rollouts of a trainer begin as its guidance says; does nothing without one, and in evaluations.

    Args:
        trainer: whose rollouts.
        guidance: how much of a demonstration they begin with.

    Raises:
        ConfigError: for a host or an objective that cannot go along with it.
    """

    def __init__(self, trainer: Any, guidance: Guidance | None) -> None:
        self._trainer = trainer
        self._guidance = guidance
        self._rows: Rows | None = None
        self._drafts: list[Draft] = []
        self._step_tokens: Tensor | None = None
        if guidance is not None:
            _check(trainer, guidance)

    # ------------------------------------------------------------------ a generation

    @contextmanager
    def generation(self, rows: Rows) -> Iterator[None]:
        """While it lasts, the host's call for completions is answered with guided ones."""
        self._rows = rows if self._guidance is not None and self._trainer.model.training else None
        self._drafts = []
        try:
            yield
        finally:
            self._rows = None

    def __call__(self, sample: Sample, prompt_ids: Any, images: Any, *turn: Any, **named: Any) -> Any:
        """Completions of the prompts, and the sampler's log-probs."""
        if self._rows is None:
            return sample(prompt_ids, images, *turn, **named)
        if images is not None:
            raise ConfigError("guidance=... takes no image inputs yet: leave it unset for this data set")
        drafts = self._guide(lambda prompts: sample(prompts, None, {}, 1), prompt_ids, self._rows)
        self._drafts = [drafts[row] for row in range(len(prompt_ids))]
        if self._trainer._generation is not None:
            self._trainer._generation.forget()  # its rollouts lack the prefixes, and some rows
        logps = [draft.logps for draft in self._drafts if draft.logps is not None]
        return [draft.ids for draft in self._drafts], logps if len(logps) == len(self._drafts) else None

    def _guide(self, sample: Sample, prompts: Sequence[list[int]], rows: Rows) -> dict[int, Draft]:
        guidance, trainer = self._guidance, self._trainer
        assert guidance is not None
        size = trainer.num_generations
        first = self._demonstrations(guidance.demonstration, rows[::size])
        groups = [self._progress(number, size) for number in range(len(first))]
        kept: dict[int, Draft] = {}
        for turn in range(guidance.turns):
            column = guidance.column(turn)
            other = first if column == guidance.demonstration else self._demonstrations(column, rows[::size])
            demonstrations = [theirs or ours for theirs, ours in zip(other, first, strict=True)]
            plans = [self._plan(turn, group, bool(ids)) for group, ids in zip(groups, demonstrations, strict=True)]
            asked = {
                number * size + rollout: self._prefix(demonstrations[number], share)
                for number, plan in enumerate(plans)
                for rollout, share in plan.items()
            }
            drafts = self._made(sample, prompts, asked)
            passed = self._judge({**kept, **drafts}, rows) if guidance.turns > 1 else {}
            for number, (group, plan) in enumerate(zip(groups, plans, strict=True)):
                group.tried.append(plan)
                group.succeeded.append(any(passed.get(number * size + rollout, False) for rollout in plan))
                for rollout in plan:
                    row = number * size + rollout
                    if row not in kept or group.succeeded[-1]:
                        kept[row], group.passed[rollout] = drafts[row], passed.get(row)
        self._log(kept, first)
        return kept

    def _demonstrations(self, column: str, rows: Rows) -> list[list[int]]:
        return [demonstration_ids(row.get(column), self._trainer._tokenizer) for row in rows]

    def _prefix(self, ids: Sequence[int], share: float) -> list[int]:
        """So much of a demonstration, in whole tokens; all of it with its end."""
        assert self._guidance is not None
        if 0 < share < 1:
            pieces = self._trainer._tokenizer.batch_decode([[token] for token in ids])
            return list(ids[: min(self._longest, self._guidance.cut(share, pieces))])
        return list(ids[: self._longest]) if share >= 1 else []

    @property
    def _longest(self) -> int:
        return int(self._trainer.max_completion_length)

    def _progress(self, number: int, size: int) -> Progress:
        guidance, trainer = self._guidance, self._trainer
        assert guidance is not None
        place = f"{guidance.seed} {trainer._step} {trainer.accelerator.process_index} {number}"
        return Progress(step=trainer.state.global_step, draw=random.Random(place), passed=[None] * size)

    def _plan(self, turn: int, group: Progress, guided: bool) -> Mapping[int, float]:
        """What the guidance asks for; without a demonstration, rollouts that are missing and no others."""
        assert self._guidance is not None
        plan = self._guidance.plan(turn, group)
        return plan if guided else {place: 0.0 for place in plan if turn == 0 or group.passed[place] is None}

    def _made(self, sample: Sample, prompts: Sequence[list[int]], asked: Mapping[int, list[int]]) -> dict[int, Draft]:
        """The rollouts of these rows, each behind its prefix; a whole demonstration is not gone on with."""
        end = self._trainer._tokenizer.eos_token_id
        open_rows = [row for row, ids in asked.items() if len(ids) < self._longest and ids[-1:] != [end]]
        ids, logps = sample([[*prompts[row], *asked[row]] for row in open_rows]) if open_rows else ([], [])
        written = dict(zip(open_rows, ids, strict=True))
        scored = dict(zip(open_rows, logps, strict=True)) if logps is not None else None
        return {row: self._draft(prefix, written.get(row, []), scored, row) for row, prefix in asked.items()}

    def _draft(
        self, prefix: list[int], written: list[int], scored: Mapping[int, list[float]] | None, row: int
    ) -> Draft:
        assert self._guidance is not None
        ids = [*prefix, *written][: self._longest]
        if scored is None:
            return Draft(ids, None, len(prefix))
        # Nobody sampled the prefix: unknown where it is trained on, else nothing that is looked at.
        unknown = math.nan if self._guidance.trains_prefixes else 0.0
        logps = [*[unknown] * len(prefix), *scored.get(row, [])][: self._longest]
        return Draft(ids, logps, len(prefix))

    def _judge(self, drafts: Mapping[int, Draft], rows: Rows) -> dict[int, bool]:
        """Which of these rollouts succeed, by the trainer's own rewards."""
        trainer, places = self._trainer, sorted(drafts)
        chosen, ids = [rows[place] for place in places], [drafts[place].ids for place in places]
        prompts = [row["prompt"] for row in chosen]
        texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
        chats = [[{"role": "assistant", "content": text}] for text in texts]
        trainer._calculate_rewards(chosen, prompts, texts if isinstance(prompts[0], str) else chats, ids)
        total = _batches.own_rows(trainer._total_rewards(), trainer.accelerator, len(places), 0)
        assert self._guidance is not None
        return dict(zip(places, (total >= self._guidance.success).tolist(), strict=True))

    def _log(self, drafts: Mapping[int, Draft], demonstrations: Sequence[Sequence[int]]) -> None:
        """Say how much was guided, over all processes."""
        accelerator = self._trainer.accelerator
        shares = [draft.prefix / max(len(draft.ids), 1) for draft in drafts.values()]
        own = [sum(share > 0 for share in shares), sum(shares), sum(not ids for ids in demonstrations)]
        guided, prefix, empty = accelerator.gather(torch.tensor([own], device=accelerator.device)).sum(0).tolist()
        size = len(drafts) * accelerator.num_processes
        values = {"rollout/guided": guided / size, "rollout/prefix_share": prefix / size, "demonstrations/empty": empty}
        for key, value in values.items():
            self._trainer._metrics["train"][key].append(value)

    # ------------------------------------------------------------------ what travels with a generation

    def finish(self, output: dict[str, Any]) -> None:
        """Mark the prefixes of a generation, and take them out of the policy's loss."""
        guidance = self._guidance
        if guidance is None or not self._trainer.model.training:
            return
        mask, device = output["completion_mask"].bool(), output["completion_ids"].device
        lengths = torch.tensor([draft.prefix for draft in self._drafts], device=device)
        prefix = (torch.arange(mask.size(1), device=device) < lengths.unsqueeze(-1)) & mask
        output[_batches.PART + EXPERT_PREFIX] = prefix
        if guidance.imitates:
            output[IMITATED] = prefix & self._distinct(device).unsqueeze(-1)
        if not guidance.trains_prefixes:
            output["tool_mask"] = (~prefix).long()
            accelerator = self._trainer.accelerator
            output["num_items_in_batch"] = accelerator.gather((mask & ~prefix).sum()).sum()

    def _distinct(self, device: torch.device) -> Tensor:
        """The first rollout of each prompt with each of its prefixes."""
        size, seen, first = self._trainer.num_generations, set(), []
        for row, draft in enumerate(self._drafts):
            key = (row // size, tuple(draft.ids[: draft.prefix]))
            first.append(draft.prefix > 0 and key not in seen)
            seen.add(key)
        return torch.tensor(first, device=device)

    # ------------------------------------------------------------------ a step, and a micro-batch

    def open_step(self, window: Sequence[Mapping[str, Any]]) -> None:
        """Count the imitated tokens of an optimizer step, over all ranks."""
        if self._guidance is None or not self._guidance.imitates:
            return
        tokens = torch.stack([inputs[IMITATED].sum() for inputs in window]).sum()
        accelerator = self._trainer.accelerator
        if accelerator.num_processes > 1:
            tokens = accelerator.reduce(tokens, reduction="sum") / accelerator.num_processes
        self._step_tokens = tokens

    def batches(
        self, inputs: Mapping[str, Any], rollouts: TokenBatch, logps: Tensor, vocab: Mapping[str, Tensor]
    ) -> list[TokenBatch]:
        """The prefixes of a micro-batch as rows of their own, scored by the rollouts' pass.

        Their tokens have a count of their own; the rows they are divided by are those of the rollouts, which they are a
        part of.
        """
        if self._guidance is None or not self._guidance.imitates:
            return []
        mask = inputs[IMITATED] if IMITATED in inputs else torch.zeros_like(rollouts.mask)
        counts = {scope: Count(self._tokens(scope, mask), count.sequences) for scope, count in rollouts.counts.items()}
        batch = TokenBatch(
            mask=mask,
            logps={"policy": logps},
            vocab=vocab,
            advantages=inputs.get("advantages"),
            rewards=rollouts.rewards,
            group=rollouts.group,
            token_ids=rollouts.token_ids,
            counts=counts,
            rows=ROLE,
        )
        return [batch]

    def _tokens(self, scope: str, mask: Tensor) -> Tensor:
        if scope == "step" and self._step_tokens is not None and self._trainer.model.training:
            return self._step_tokens
        accumulation: float = self._trainer._accumulation()
        return mask.sum() * accumulation


def _check(trainer: Any, guidance: Guidance) -> None:
    guidance.check(trainer.num_generations)
    rows = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
    if rows % trainer.num_generations:
        raise ConfigError(
            f"guidance: each process has {rows} rows of a generation, which cut groups of {trainer.num_generations} "
            "apart; make per_device_train_batch_size * steps_per_generation a multiple of num_generations"
        )
    if trainer.tools or trainer.rollout_func is not None:
        raise ConfigError("guidance: rollouts with tools or of a rollout_func begin as they do; leave guidance unset")
    if isinstance(trainer._routing, Routing):
        raise ConfigError("guidance: an expert's tokens have no routes that an engine returned; leave replay unset")
    if trainer._generation is not None and trainer._generation.samples_ahead:
        raise ConfigError(
            "guidance: what a rollout begins with is not known ahead; expected an engine without OverlappedRollouts"
        )
    if guidance.turns > 1 and trainer._generation is None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ConfigError(
            f"guidance: {type(guidance).__name__} makes different rollouts on each process, and the weights are spread "
            "over all: pass engine=..., or use DDP"
        )
    _check_objective(trainer.objective, guidance)


def _check_objective(objective: Objective, guidance: Guidance) -> None:
    known = CARRIED | {LogProbs("policy"), VocabStat("entropy"), Column("token_ids")}
    strange = sorted(map(str, needs_of_rows(objective, ROLE) - known))
    if guidance.imitates and strange:
        raise ConfigError(
            f"guidance: a term on prefixes reads {strange[0]}, which they do not have: expected terms of the policy's "
            "log-probs, entropy, advantages and rewards, or rows of extra_rows=[Demonstrations(...)]"
        )
    if guidance.imitates and streams(objective.requires):
        raise ConfigError(
            "guidance: exact divergences and log Z are computed at the policy's own tokens only, prefixes are none: "
            "use sampled forms, or rows of extra_rows=[Demonstrations(...)]"
        )
