"""The first signals of the watcher: trainer against sampler at every step, and the drift from reference policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlstab.batch import TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses import clustered_mean, exact_kl, mismatch_rows, mismatch_values
from rlstab.trainers import _batches
from rlstab.trainers._references import References

__all__ = ["Signals"]


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What the trainer measures beside the loss.

    Args:
        mismatch: compare the policy in training with the sampler at every step where the sampler's log-probs came back.
            From the second update of a batch on this includes what the updates moved, not the engine's error alone.
        drift: measure the exact KL from the policy to `initial` (and to `moving`, where one is kept).
        drift_every: optimizer steps between two measurements of drift.
        drift_positions: most completion positions per measurement, over all ranks (at least one on each).

    Measuring drift counts as a part that requires the policy as passed. Under PEFT that is the policy with its adapter
    off. Otherwise, if no term keeps a reference anyway, a copy waits in the CPU's memory and is brought to the device
    for the measurement; where the policy's weights are spread over ranks, drift is not measured, and the log says so.

    >>> Signals(drift=False).mismatch
    True
    """

    mismatch: bool = True
    drift: bool = True
    drift_every: int = 10
    drift_positions: int = 64

    def __post_init__(self) -> None:
        for name in ("drift_every", "drift_positions"):
            if self.__dict__[name] < 1:
                raise ConfigError(f"signals.{name}: expected at least 1, got {self.__dict__[name]}")


OFF = Signals(mismatch=False, drift=False)
POSITIONS_PER_ROW = 4


class Mismatch:
    """Trainer against sampler over one optimizer step: sums per row, joined when the step closes."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._rows: list[Tensor] = []
        self._groups: list[Tensor] = []

    def add(self, batch: TokenBatch) -> None:
        """Take a micro-batch whose sampler log-probs came back."""
        self._rows.append(mismatch_rows(batch.logp("policy"), batch.logp("sampler"), batch.loss_mask))
        self._groups.append(batch.column("group"))

    def collect(self) -> dict[str, float]:
        """The signals of the step over all ranks; nothing where no sampler scored a token."""
        if not self._rows:
            return {}
        rows = self._accelerator.gather(torch.cat(self._rows))
        groups = self._accelerator.gather(torch.cat(self._groups))
        self._rows, self._groups = [], []
        values = mismatch_values(rows, groups)
        numbers = torch.stack(list(values.values())).tolist()
        return {f"mismatch/{key}": number for key, number in zip(values, numbers, strict=True)}


class Drift:
    """Exact KL from the policy to the references at sampled positions."""

    def __init__(self, trainer: Any, references: References, signals: Signals) -> None:
        self._trainer = trainer
        self._references = references
        self._signals = signals

    def measure(self, window: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """KL(policy ‖ reference) per token with its standard error by prompt, for every reference in memory.

        Args:
            window: the micro-batches of the optimizer step, of one generation.
        """
        sources, trainer = sorted(self._references.sources), self._trainer
        keys = [key for key in (*_batches.TEXT_KEYS, "tool_mask", "rlstab_group") if key in window[0]]
        inputs = {key: torch.cat([batch[key] for batch in window]) for key in keys}
        rows, columns = self._positions(inputs)
        call = _scoring_call(inputs, rows, columns)
        mask = _batches.completion_masks(inputs)[1][rows][:, columns]
        policy = self._logits(trainer.model, call)
        mask, group = self._gather(mask.int()).bool(), self._gather(inputs["rlstab_group"][rows])
        values: dict[str, float] = {}
        for source in sources:
            with self._references.use(source, trainer.model, trainer.accelerator) as reference:
                kl = exact_kl(policy, self._logits(reference, call))
            mean, error = clustered_mean(self._gather(kl), mask, group)
            values[f"drift/{source}/kl"], values[f"drift/{source}/kl_se"] = mean.item(), error.item()
        return values

    def _gather(self, values: Tensor) -> Tensor:
        """The rows of all ranks, which may have drawn different numbers of positions."""
        accelerator = self._trainer.accelerator
        if values.dim() > 1:
            values = accelerator.pad_across_processes(values, dim=1)
        gathered: Tensor = accelerator.gather(values)
        return gathered

    def _positions(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Rows of different prompts and columns, drawn by a generator of their own: measuring changes no trajectory."""
        trainer = self._trainer
        budget = max(1, self._signals.drift_positions // trainer.accelerator.num_processes)
        seed = (trainer.args.seed * 1_000_003 + trainer.state.global_step) * 65_537 + trainer.accelerator.process_index
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(inputs["rlstab_group"].numel(), generator=generator)
        order = _one_of_each_first(order, inputs["rlstab_group"].cpu())
        rows = order[: min(len(order), max(1, budget // POSITIONS_PER_ROW))]
        width = int(inputs["completion_mask"][rows.to(inputs["completion_mask"].device)].sum(-1).max())
        columns = torch.randperm(max(width, 1), generator=generator)[: max(1, budget // len(rows))].sort().values
        device = trainer.accelerator.device
        return rows.to(device), columns.to(device)

    def _logits(self, model: nn.Module, call: Mapping[str, Tensor]) -> Tensor:
        training = model.training
        model.eval()
        with torch.no_grad(), self._trainer.accelerator.autocast():
            logits: Tensor = model(**call).logits.float()
        model.train(training)
        return logits / float(self._trainer.args.temperature)


def _one_of_each_first(order: Tensor, group: Tensor) -> Tensor:
    """`order` with the first row of every group moved to the front: more prompts, fewer rows of one."""
    firsts: dict[int, int] = {}
    for position, row in enumerate(order.tolist()):
        firsts.setdefault(int(group[row]), position)
    front = set(firsts.values())
    positions = sorted(range(len(order)), key=lambda position: position not in front)
    return order[torch.tensor(positions, dtype=torch.long)]


def _scoring_call(inputs: Mapping[str, Any], rows: Tensor, columns: Tensor) -> dict[str, Tensor]:
    call = _batches.model_inputs({key: inputs[key][rows] for key in _batches.TEXT_KEYS})
    call["logits_to_keep"] = inputs["prompt_ids"].size(1) - 1 + columns
    return call
