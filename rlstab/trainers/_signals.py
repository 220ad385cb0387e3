"""The first signals of the watcher: trainer against sampler at every step, and the drift from reference policies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlstab.batch import ExactDivergence, TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses import (
    MISMATCH_COLUMNS,
    ReverseKL,
    bucket_rows,
    bucket_values,
    clustered_mean,
    exact_kl,
    mismatch_rows,
    mismatch_values,
    streamed_statistics,
)
from rlstab.trainers import _batches
from rlstab.trainers._exact_pass import States, Streaming, completion_labels, forward_inputs, logits_of, whole
from rlstab.trainers._lag import VERSION, LagRegression
from rlstab.trainers._references import References

__all__ = ["Signals"]


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What the trainer measures beside the loss.

    Args:
        mismatch: compare the policy in training with the sampler at every step where the sampler's log-probs came back.
            From the second update of a batch on this includes what the updates moved, not the engine's error alone;
            over tokens of differing lag the two are told apart (`mismatch/engine_k3`, `mismatch/lag_k3`).
        drift: measure the exact KL from the policy to `initial` (and to `moving`, where one is kept) and how far the
            update of the step moved it (`drift/previous/kl`), and whether what the policy has moved towards are the
            completions with reward (`drift/initial/reward_correlation`).
        drift_every: optimizer steps between two measurements of drift.
        drift_positions: most completion positions per measurement, over all ranks (at least one on each).
        sync: prove at each weight sync that a rollout engine with weights of its own is the same model as the policy
            (`rlstab.rollouts.SyncVerifier`); where it is not, training stops before the next step.

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
    sync: bool = True

    def __post_init__(self) -> None:
        for name in ("drift_every", "drift_positions"):
            if self.__dict__[name] < 1:
                raise ConfigError(f"signals.{name}: expected at least 1, got {self.__dict__[name]}")


OFF = Signals(mismatch=False, drift=False, sync=False)
POSITIONS_PER_ROW = 4
CALL = "call/"  # before the names of a forward's inputs
ROW_KEYS = ("tool_mask", "rlstab_group", "rlstab_rewards")
TOKENS, K3 = MISMATCH_COLUMNS.index("tokens"), MISMATCH_COLUMNS.index("k3")
DRIFT = ExactDivergence(ReverseKL(), "reference")
BUCKETS = "mismatch/bucket/"


def is_empty(key: str, value: float) -> bool:
    """Whether a number is the mean of a bucket without tokens, which is not logged; any other NaN is a fault to see.

    >>> is_empty("mismatch/bucket/0-0.001/k3", math.nan), is_empty("mismatch/k3", math.nan)
    (True, False)
    """
    return key.startswith(BUCKETS) and math.isnan(value)


class Mismatch:
    """Trainer against sampler over one optimizer step: sums per row, joined when the step closes.

    Args:
        accelerator: the trainer's.
        version: tells the version of the weights that the policy has now; without, nothing is said about lag.
    """

    def __init__(self, accelerator: Any, version: Callable[[], int] | None = None) -> None:
        self._accelerator = accelerator
        self._version = version
        self._rows: list[Tensor] = []
        self._groups: list[Tensor] = []
        self._versions: list[Tensor] = []
        self._lag = LagRegression()

    def add(self, batch: TokenBatch) -> None:
        """Take a micro-batch whose sampler log-probs came back."""
        compared = batch.logp("policy"), batch.logp("sampler"), batch.loss_mask
        self._rows.append(torch.cat([mismatch_rows(*compared), bucket_rows(*compared)], dim=-1))
        self._groups.append(batch.column("group"))
        if VERSION in batch.parts:
            self._versions.append(batch.parts[VERSION])

    def tensors(self) -> dict[str, Tensor]:
        """The signals of the step over all ranks, still on the device; nothing where no sampler scored a token."""
        if not self._rows:
            return {}
        rows, groups = self._everywhere(self._rows), self._everywhere(self._groups)
        of_all, of_buckets = rows[:, : len(MISMATCH_COLUMNS)], rows[:, len(MISMATCH_COLUMNS) :]
        values = mismatch_values(of_all, groups)
        values |= {f"bucket/{key}": value for key, value in bucket_values(of_buckets).items()}
        if self._version is not None and len(self._versions) == len(self._rows):
            lag = self._version() - self._everywhere(self._versions)
            values |= self._lag.update(of_all[:, TOKENS], of_all[:, K3], lag)
        self._rows, self._groups, self._versions = [], [], []
        return {f"mismatch/{key}": value for key, value in values.items()}

    def _everywhere(self, of_micro_batches: list[Tensor]) -> Tensor:
        gathered: Tensor = self._accelerator.gather(torch.cat(of_micro_batches))
        return gathered

    def collect(self) -> dict[str, float]:
        """The signals of the step over all ranks, as numbers."""
        values = self.tensors()
        numbers = torch.stack([value.float() for value in values.values()]).tolist() if values else []
        return dict(zip(values, numbers, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {"lag": self._lag.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._lag.load_state_dict(state["lag"])


class _Before(NamedTuple):
    """The policy before an update, at the positions of a measurement."""

    step: int
    call: dict[str, Any]
    labels: Tensor
    chosen: Tensor
    mask: Tensor
    group: Tensor
    logits: Tensor


class Drift:
    """Exact KL from the policy to the references, and to itself before an update, at sampled positions."""

    def __init__(self, trainer: Any, references: References, streaming: Streaming, signals: Signals) -> None:
        self._trainer = trainer
        self._streaming = streaming
        self._references = references
        self._signals = signals
        self._before: _Before | None = None

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold between a measurement and the step after it; mostly nothing."""
        before = self._before
        if before is None or before.step != self._trainer.state.global_step - 1:
            return {}
        named = {name: value for name, value in before._asdict().items() if isinstance(value, Tensor)}
        return named | {f"{CALL}{name}": value for name, value in before.call.items() if isinstance(value, Tensor)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        own = {name: value.to(self._trainer.accelerator.device) for name, value in state.items()}
        call = {name.removeprefix(CALL): own.pop(name) for name in list(own) if name.startswith(CALL)}
        self._before = _Before(step=self._trainer.state.global_step - 1, call=call, **own) if own else None

    def forget(self) -> None:
        """The policy was replaced: nothing is to be said of how far it moved."""
        self._before = None

    def moved(self) -> dict[str, Tensor]:
        """How far its last update moved the policy, where the step before this one was measured.

        KL(policy ‖ policy before) per token with its standard error by prompt, still on the device.
        """
        before, self._before = self._before, None
        if before is None or before.step != self._trainer.state.global_step - 1:
            return {}
        now = logits_of(self._states(self._trainer.model, before.call, before.labels))
        kl = exact_kl(now, before.logits)
        everywhere = self._gather(kl.new_zeros(before.chosen.shape).masked_scatter(before.chosen, kl))
        mean, error = clustered_mean(everywhere, before.mask, before.group)
        return {"drift/previous/kl": mean, "drift/previous/kl_se": error}

    def measure(self, window: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """KL(policy ‖ reference) per token with its standard error by prompt, for every reference in memory.

        Beside it the correlation of what the policy has moved towards with the rewards.

        Args:
            window: the micro-batches of the optimizer step, of one generation.
        """
        inputs, chosen = self._chosen(window)
        labels, call = completion_labels(inputs, chosen), forward_inputs(inputs)
        policy = self._states(self._trainer.model, call, labels)
        mask, group = self._gather(chosen.int()).bool(), self._gather(inputs["rlstab_group"])
        step = self._trainer.state.global_step
        self._before = _Before(step, call, labels, chosen, mask, group, logits_of(policy))
        tokens = inputs["completion_ids"][chosen]
        values: dict[str, Tensor] = {}
        for source in sorted(self._references.own):
            with self._references.use(source, self._trainer.model, self._trainer.accelerator) as reference:
                kl, ratio = self._compare(policy, self._states(reference, call, labels), tokens)
            everywhere = self._gather(kl.new_zeros(chosen.shape).masked_scatter(chosen, kl))
            mean, error = clustered_mean(everywhere, mask, group)
            values[f"drift/{source}/kl"], values[f"drift/{source}/kl_se"] = mean, error
            if "rlstab_rewards" in inputs:
                implicit = self._gather(kl.new_zeros(chosen.shape).masked_scatter(chosen, ratio).sum(-1))
                rewards = self._gather(inputs["rlstab_rewards"].float())
                values[f"drift/{source}/reward_correlation"] = correlation(implicit, rewards)
        numbers = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)) if values else {}
        unknown = [k for k, number in numbers.items() if k.endswith("correlation") and math.isnan(number)]
        return {key: number for key, number in numbers.items() if key not in unknown}  # nothing has moved yet

    def _chosen(self, window: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Tensor]:
        """Rows to run and which of their tokens to compare; images stay in the micro-batch that they came in."""
        if self._trainer._is_vlm:
            inputs = window[self._trainer.state.global_step % len(window)]
            rows, columns = self._positions(inputs)
        else:
            keys = [key for key in (*_batches.TEXT_KEYS, *ROW_KEYS) if key in window[0]]
            inputs = {key: torch.cat([batch[key] for batch in window]) for key in keys}
            rows, columns = self._positions(inputs)
            inputs, rows = {key: value[rows] for key, value in inputs.items()}, torch.arange(len(rows))
        _, mask = _batches.completion_masks(inputs)
        chosen = torch.zeros_like(mask)
        chosen[rows.unsqueeze(-1), columns] = True
        return inputs, chosen & mask

    def _states(self, model: nn.Module, call: Mapping[str, Any], labels: Tensor) -> States:
        training = model.training
        model.eval()
        states = self._streaming.states(model, self._trainer.accelerator, call, labels)
        model.train(training)
        return states

    @torch.no_grad()
    def _compare(self, policy: States, reference: States, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence at each position, and log π − log π_reference of its token; both `[N]`."""
        ours, theirs = whole([policy.head, reference.head])
        found = streamed_statistics(
            policy.hidden,
            ours,
            tokens,
            statistics=["logp"],
            requirements=[DRIFT],
            references={DRIFT.source: (reference.hidden, theirs)},
        )
        of_reference = streamed_statistics(reference.hidden, theirs, tokens, statistics=["logp"])
        return found[DRIFT.key], found["logp"] - of_reference["logp"]

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


def _one_of_each_first(order: Tensor, group: Tensor) -> Tensor:
    """`order` with the first row of every group moved to the front: more prompts, fewer rows of one."""
    firsts: dict[int, int] = {}
    for position, row in enumerate(order.tolist()):
        firsts.setdefault(int(group[row]), position)
    front = set(firsts.values())
    positions = sorted(range(len(order)), key=lambda position: position not in front)
    return order[torch.tensor(positions, dtype=torch.long)]


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's r over the entries where both are numbers; NaN where either does not vary.

    >>> correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0]))
    tensor(1.)
    """
    known = x.isfinite() & y.isfinite()
    n = known.sum().clamp(min=1)
    x, y = (torch.where(known, v - torch.where(known, v, 0.0).sum() / n, 0.0) for v in (x, y))
    return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()
