"""Observers: what is told the detached tensors of every loss call and every rollout of a trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlstab.trainers import _batches
from rlstab.trainers._signals import Mismatch

__all__ = ["LossCall", "Observer"]


@dataclass(frozen=True, kw_only=True)
class LossCall:
    """One loss call of the host: what went in, what the model gave, what came out; nothing with a gradient.

    Args:
        inputs: the dictionary that the host's `compute_loss` was given; its keys are the host's.
        outputs: tensors of the model's output: `log_probs` and `entropy` of each next token `[B, T − 1]` where the host
            scores with a fused head (all stable trainers of TRL), `logits` where it does not.
        loss: what the host returned.
    """

    inputs: Mapping[str, Any]
    outputs: Mapping[str, Tensor]
    loss: Tensor


class Observer(ABC):
    """Something that measures a run from outside. It must not change a tensor it is shown.

    Example:
        >>> class Rows(Observer):
        ...     '''Rows of the step's loss calls.'''
        ...     def __init__(self) -> None:
        ...         self.rows = 0
        ...     def on_loss(self, call: LossCall) -> None:
        ...         self.rows += call.inputs["input_ids"].shape[0]
        ...     def collect(self) -> dict[str, Tensor]:
        ...         rows, self.rows = self.rows, 0
        ...         return {"train/num_tokens": torch.tensor(float(rows))}
    """

    def on_rollout(self, rows: Sequence[Mapping[str, Any]], output: Mapping[str, Any]) -> None:  # noqa: B027
        """Take a generation, before it is shuffled and split.

        Args:
            rows: rows of the data set, one per completion.
            output: the host's tensors, first axis the completion.
        """

    def on_loss(self, call: LossCall) -> None:  # noqa: B027
        """Take one loss call of training; evaluations are not shown."""

    @abstractmethod
    def collect(self) -> Mapping[str, Tensor]:
        """What the step measured, over all ranks: 0-dim tensors by schema key. Called by all ranks once a step."""


class SamplerMismatch(Observer):
    """Trainer against sampler, where the host carries the sampler's log-probs."""

    def __init__(self, accelerator: Any) -> None:
        self._mismatch = Mismatch(accelerator)
        self._rows = 0

    def on_loss(self, call: LossCall) -> None:
        """Compare the log-probs of the loss with those of the sampler."""
        if "sampling_per_token_logps" not in call.inputs or "log_probs" not in call.outputs:
            return
        inputs = dict(call.inputs)
        rows, width = inputs["completion_ids"].shape
        ids = self._rows + torch.arange(rows, device=inputs["completion_ids"].device)
        self._rows += rows
        inputs.setdefault("rlstab_group", ids)  # every row a prompt of its own, where nobody knows better
        self._mismatch.add(_batches.token_batch(inputs, logps={"policy": call.outputs["log_probs"][:, -width:]}))

    def collect(self) -> Mapping[str, Tensor]:
        """The mismatch of the step."""
        self._rows = 0
        return self._mismatch.tensors()


_MULTIPLIER = 6364136223846793005  # odd: its powers differ modulo 2^64


class Diversity(Observer):
    """Share of the completions of a generation that no other one equals."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._hashes: list[Tensor] = []

    def on_rollout(self, rows: Sequence[Mapping[str, Any]], output: Mapping[str, Any]) -> None:
        """Keep one number per completion."""
        ids, mask = output["completion_ids"], output["completion_mask"]
        powers = torch.full(ids.shape[1:], _MULTIPLIER, dtype=torch.int64, device=ids.device).cumprod(0)
        self._hashes.append(((ids.long() + 1) * mask.long() * powers).sum(-1))

    def collect(self) -> Mapping[str, Tensor]:
        """The share; nothing at steps without a generation."""
        if not self._hashes:
            return {}
        hashes = self._accelerator.gather(torch.cat(self._hashes)).sort().values
        self._hashes = []
        return {"rollout/unique": (1 + hashes.diff().ne(0).sum()) / hashes.numel()}
