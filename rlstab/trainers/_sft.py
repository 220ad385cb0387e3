"""`TrustRegionSFTTrainer`: TRL's SFTTrainer with an objective of imitation terms."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from rlstab.batch import Count, ExactDivergence, LogProbs
from rlstab.errors import ConfigError
from rlstab.losses import Objective, Term, Total
from rlstab.trainers import _checkpoint, _host_metrics, _sft_rules
from rlstab.trainers._exact_pass import Streaming
from rlstab.trainers._host import SFTConfig, SFTTrainer, check_seams, disable_gradient_checkpointing
from rlstab.trainers._log import MetricLog, Series, joined
from rlstab.trainers._sft_pass import SupervisedPass
from rlstab.trainers._sft_rows import DemonstrationRows
from rlstab.trainers._sft_snapshot import Snapshot
from rlstab.trainers._skip import leave_out_infinite
from rlstab.trainers._under import under

__all__ = ["TrustRegionSFTTrainer"]

logger = logging.getLogger("rlstab")

SEAMS: dict[str, tuple[str, ...]] = {
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "_save_checkpoint": ("model", "trial"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
}

check_seams(SFTTrainer, SEAMS)


class TrustRegionSFTTrainer(SFTTrainer):
    """A drop-in for `trl.SFTTrainer` whose loss is an `Objective` of terms on demonstrated tokens.

    Without an objective it trains the host's own loss. With one, such as `presets.trsft()`, the demonstrations are its
    rows: one for each demonstration, in padded, padding-free and packed batches alike, so that means and weights over
    sequences are what they say. (With `packing_strategy="wrapped"`, which cuts demonstrations anywhere, a row is one of
    its chunks.) Everything else (data preparation, images, PEFT, accumulation, evaluation) stays the host's.

    The source `initial` is the policy as passed here; `old` is a snapshot of it, taken anew every `snapshot_every`
    steps. A demonstration without a token of the loss adds nothing and is counted as `demonstrations/empty`.

    Args:
        model: as for the host.
        args: as for the host. With an objective, `loss_type` must be at its default.
        *others: further arguments of the host by position, from `data_collator` on.
        objective: terms with `rows="demonstration"`; a single one will do. Default: the host's loss.
        snapshot_every: optimizer steps that a snapshot is kept for.
        skip_overflow: leave out the update of a step in which a term is `+inf` at some token, as an exact divergence is
            from a reference that excludes what the policy does not. Not with DeepSpeed.
        **host: every other argument of the host (`train_dataset`, `processing_class`, `peft_config`, ...).

    Raises:
        ConfigError: for what the objective cannot honour, with the reason and the remedy.

    Example:
        ```python
        trainer = TrustRegionSFTTrainer(
            "Qwen/Qwen3-0.6B",
            args=SFTConfig(output_dir="runs/sft"),
            train_dataset=demonstrations,
            objective=presets.trsft(alpha=0.1),
        )
        trainer.train()
        ```

    Reference: Trust-Region Adaptive Policy Optimization (TRAPO), https://arxiv.org/abs/2512.17636
    """

    _tag_names: ClassVar[list[str]] = ["trl", "sft", "rlstab"]

    def __init__(
        self,
        model: str | nn.Module,
        args: SFTConfig | None = None,
        *others: Any,
        objective: Objective | Term | None = None,
        snapshot_every: int = 8,
        skip_overflow: bool = True,
        **host: Any,
    ) -> None:
        given = inspect.signature(SFTTrainer.__init__).bind_partial(self, model, args, *others, **host).arguments
        self.objective = _sft_rules.resolve(objective, args, given)
        self.snapshot_every = _sft_rules.checked_period(snapshot_every)
        needs = self.objective.requires
        super().__init__(model, args, *others, **host)
        self._divergences = tuple(need for need in needs if isinstance(need, ExactDivergence))
        self._scored = {need.source for need in needs if isinstance(need, LogProbs)} - {"policy"}
        sources = self._scored | {need.source for need in self._divergences}
        _sft_rules.check_host(self, sources)
        _sft_rules.notice_inert_parts(self.objective, snapshot_every)
        self._streaming = Streaming(1.0)
        self._statistics = _sft_rules.streamed(needs)
        if self._statistics:
            self._streaming.attach(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        self._snapshots = {source: Snapshot(self.model) for source in sorted(sources)}
        self._skip_overflow = skip_overflow
        self._log_of_pass = MetricLog(self.accelerator)
        self._of_step: list[dict[str, Series]] = []
        self._rows_of_step: Tensor | float = 1.0

    # ------------------------------------------------------------------ a whole optimizer step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of an optimizer step, as the host collects them; their demonstrations are counted."""
        samples, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples:
            rows = torch.stack([DemonstrationRows.of(inputs).count for inputs in samples]).sum().to(device)
            ranks = self.accelerator.num_processes
            if ranks > 1 and self.args.average_tokens_across_devices:
                rows = self.accelerator.reduce(rows, reduction="sum") / ranks
            self._rows_of_step = rows
            if "old" in self._snapshots and self._is_snapshot:
                self._snapshots["old"].take()
        return samples, tokens

    @property
    def _is_snapshot(self) -> bool:
        """Whether the policy is the snapshot, because no update has happened since."""
        return bool(self.model.training and self.state.global_step % self.snapshot_every == 0)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch, as the host does it; the last of a step decides whether there is an update."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._close_step()
        return loss

    def _close_step(self) -> None:
        values = joined(self._of_step)
        self._of_step = []
        metrics = _host_metrics.by_term(self.objective, values)
        leave_out_infinite(self, metrics, skip=self._skip_overflow)
        self.objective.observe(self.state.global_step + 1, metrics)

    # ------------------------------------------------------------------ a micro-batch

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """The objective on the host's own pass of the policy, whose metrics it logs; ours stand beside them."""
        rows = DemonstrationRows.of(inputs)
        work = SupervisedPass(self, model, self._streaming, self._statistics, self._divergences)
        hosts = super().compute_loss(work, inputs, return_outputs, num_items_in_batch)
        scored = self._scored - {"old"} if self._is_snapshot else self._scored
        logps = {source: work.score(source) for source in sorted(scored)}
        batch = rows.batch(
            inputs,
            logps={"policy": work.logp, **logps},
            vocab=work.vocab,
            counts=self._counts(rows, num_items_in_batch),
        )
        result = self.objective(batch)
        metrics = _host_metrics.measured(result, batch, self.accelerator.num_processes)
        self._log_pass({**metrics, "demonstrations/empty": Total(rows.empty)})
        loss = result.loss
        if work.aux_loss is not None:
            accumulation = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * work.aux_loss / accumulation
        return (loss, hosts[1]) if return_outputs else loss

    def _log_pass(self, metrics: Mapping[str, Any]) -> None:
        self._log_of_pass.add(self.state.global_step, metrics)
        measured = self._log_of_pass.collect()
        logged = self._metrics["train" if self.model.training else "eval"]
        for key, series in measured.items():
            logged[key].extend(series.values)
        if self.model.training:
            self._of_step.append(measured)

    def _counts(self, rows: DemonstrationRows, step_tokens: Tensor | None) -> dict[str, Count]:
        """The step's tokens as the host counts them; an evaluation counts those at hand."""
        tokens, demonstrations = rows.scored.sum(), rows.count
        if step_tokens is None:
            here = Count(tokens, demonstrations)
            return {"step": here, "generation": here, "micro_batch": here}
        accumulation = float(self.current_gradient_accumulation_steps)
        ranks = self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1
        step = Count(step_tokens / ranks, self._rows_of_step)
        micro_batch = Count(tokens * accumulation, demonstrations * accumulation)
        return {"step": step, "generation": step, "micro_batch": micro_batch}

    @contextmanager
    def run_as(self, source: str, model: Any) -> Iterator[None]:
        """Have `model` be the policy of `source` inside the block, without gradient and dropout."""
        training = model.training
        model.eval()
        try:
            with (
                torch.no_grad(),
                disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
                self._snapshots[source].in_place(),
            ):
                yield
        finally:
            model.train(training)

    # ------------------------------------------------------------------ checkpoints

    def _is_saved(self, source: str) -> bool:
        """Whether a checkpoint holds a snapshot: not the start of a whole model, which a resumed run is given anew."""
        return source == "old" or is_peft_model(self.model)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            kept = {source: snapshot for source, snapshot in self._snapshots.items() if self._is_saved(source)}
            tensors = {f"{source}/{place}": t for source in kept for place, t in kept[source].state_dict().items()}
            values = {"ranks": self.accelerator.num_processes, "objective": self.objective.state_dict()}
            _checkpoint.save_state(folder, 0, _checkpoint.TrainerState(values=values, tensors=tensors))
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if _checkpoint.written_by(checkpoint) is None:
            logger.warning("%s holds no state of rlstab: snapshots and controllers start anew", checkpoint)
            return
        state = _checkpoint.load_state(checkpoint, 0, self.accelerator.device)
        self.objective.load_state_dict(state.values["objective"])
        saved = {name.partition("/")[0] for name in state.tensors}
        if missing := sorted(set(self._snapshots) - saved - ({"initial"} - saved)):
            raise ConfigError(
                f"{checkpoint} holds no snapshot {missing[0]!r}: resume with the objective that was saved"
            )
        for source in saved & set(self._snapshots):
            own = under(f"{source}/", state.tensors)
            self._snapshots[source].load_state_dict(own)
