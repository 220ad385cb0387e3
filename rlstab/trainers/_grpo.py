"""`StableGRPOTrainer`: TRL's GRPOTrainer with a composable objective."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from rlstab.batch import Count, LogProbs, Requirement, TokenBatch, VocabStat
from rlstab.errors import ConfigError
from rlstab.losses import (
    Objective,
    ObjectiveLoss,
    RolloutPart,
    StepStatistic,
    Sum,
    Term,
    prepared_parts,
)
from rlstab.record import RunFolder
from rlstab.rollouts import Engine
from rlstab.trainers import _arguments, _batches, _checkpoint, _host_metrics, _signals, _supply
from rlstab.trainers._async_host import check_host_arguments
from rlstab.trainers._colocate import colocated_vllm
from rlstab.trainers._counts import micro_batch_counts
from rlstab.trainers._exact_pass import Streaming
from rlstab.trainers._extra_rows import ExtraPass, ExtraRows
from rlstab.trainers._generation import EngineFactory, Generation
from rlstab.trainers._gradients import tell_switches
from rlstab.trainers._guidance import Guidance
from rlstab.trainers._guided import Guided
from rlstab.trainers._host import GRPOConfig, GRPOTrainer, disable_gradient_checkpointing
from rlstab.trainers._lag import VERSION, row_versions
from rlstab.trainers._policy_pass import PolicyPass, streams
from rlstab.trainers._recorder import Recorder
from rlstab.trainers._references import References, Teacher
from rlstab.trainers._resample import Resample, Resampler
from rlstab.trainers._reset import Reset, ResetCallback
from rlstab.trainers._routing import Replay, routing_of
from rlstab.trainers._signals import Signals
from rlstab.trainers._step_log import StepLog
from rlstab.trainers._trackers import Trackers

__all__ = ["StableGRPOTrainer"]

logger = logging.getLogger("rlstab")


class StableGRPOTrainer(GRPOTrainer):
    """A drop-in for `trl.GRPOTrainer` whose loss is an `Objective`.

    Without an objective it trains the host's own loss, as `args` describes it. With one, the host's loss arguments must
    be at their defaults: what they did is a part of the objective. Everything else (generation, rewards, tools, images,
    PEFT, accumulation, evaluation, checkpoints) stays the host's; resuming from a checkpoint follows the same
    trajectory as a run without a stop.

    Args:
        model: the policy, or its path. The source `initial` is the policy as passed here.
        reward_funcs: as for the host.
        args: as for the host.
        objective: the loss; a single term will do. Default: the host's loss.
        advantage: rollout part that turns rewards into advantages. Default: the objective's own, else the host's.
        signals: what is measured beside the loss, or None for nothing. Default: `Signals()`.
        run: run folder to write metrics, sampled completions and events into.
        engine: what samples the completions, or what makes it from policy and tokenizer, such as `TransformersEngine`:
            the sampler's log-probs then come back with every token. Default: the host's generation.
        extra_rows: rows beside the rollouts, for terms that name their role: a buffer, demonstrations.
        guidance: how much of an expert's demonstration rollouts begin with, such as `MicroGroups()`. Default: nothing.
        teachers: models, paths or servers that answer for sources of these names, as in `reference="teacher"`.
        reset: when the source `anchor`, an earlier policy, becomes the present one, and whether the optimizer forgets.
        resample: sample other prompts in place of groups without a signal. Default: train on all.
        replay: for a mixture of experts, whose expert choices every pass of the policy takes: `R3` those of the engine
            that sampled, `R2` those of the policy at the start of the batch. Default: its own.
        skip_overflow: leave out the update of a step in which a term is `+inf` at some token, as an exact divergence is
            from a reference that excludes what the policy does not. Not with DeepSpeed.
        *others: further arguments of the host by position, from `train_dataset` on.
        **host: every other argument of the host (`train_dataset`, `processing_class`, `peft_config`, ...).

    Raises:
        ConfigError: for what the objective cannot honour, with the reason and the remedy.

    Example:
        ```python
        trainer = StableGRPOTrainer(
            "Qwen/Qwen3-0.6B",
            reward_funcs=reward,
            args=GRPOConfig(output_dir="runs/a"),
            train_dataset=prompts,
            objective=Objective(
                policy=ClippedSurrogate(low=0.2, high=0.28, weights=[TruncatedIS(max=2.0)]),
                drift=0.05 * JensenShannon(reference="initial"),
            ),
        )
        trainer.train()
        ```
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "rlstab"]

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *others: Any,
        objective: Objective | Term | None = None,
        advantage: RolloutPart | None = None,
        signals: Signals | None = Signals(),  # noqa: B008  # frozen
        run: RunFolder | None = None,
        engine: Engine | EngineFactory | None = None,
        skip_overflow: bool = True,
        replay: Replay | None = None,
        extra_rows: Sequence[ExtraRows] = (),
        guidance: Guidance | None = None,
        teachers: Mapping[str, Teacher] | None = None,
        reset: Reset | None = None,
        resample: Resample | None = None,
        **host: Any,
    ) -> None:
        _supply.check_types(model, signals, run, engine)
        check_host_arguments(args)
        host = _arguments.by_name(others, host)
        args = args if args is not None else GRPOConfig(_arguments.default_output_dir(model))
        self.signals = signals or _signals.OFF
        self.objective, self.advantage = _arguments.resolve(objective, advantage, args)
        self._needs = _arguments.requirements(self.objective, self.advantage)
        _arguments.check_schedule(self.objective, args)
        _supply.check_terms(self._needs)
        supply = _supply.Supply.of(extra_rows, teachers, reset, guidance)
        peft = host.get("peft_config") is not None or (not isinstance(model, str) and is_peft_model(model))
        streaming = Streaming(args.temperature, float32=args.cast_lm_head_to_fp32)
        watched = {"initial"} if self.signals.drift else set()
        sources = _arguments.all_references(self.objective, self._needs, args, peft=peft, supply=supply)
        self._references = References(sources, watched, model, peft=peft, teachers=supply.teachers)
        copy_adapter = peft and bool(self._references.own)
        ours = objective is not None
        with _arguments.host_loss_arguments(args, beta=1.0 if copy_adapter else 0.0, ours=ours), colocated_vllm(args):
            super().__init__(model, reward_funcs, args, **host)
        self.beta = 0.0
        self._recorder = Recorder(self, run)
        self._skipped: set[str] = set()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            _supply.fit_to_shards(self)
        attach = partial(streaming.attach, fused=streams(self.objective.requires))
        attach(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        self._references.prepare(self, model, attach)
        self._pass = PolicyPass(self, self._references, streaming, self._needs)
        self._generation = Generation(self, engine) if engine is not None else None
        self._routing = routing_of(self, replay, self._needs)
        self._references.aside = self._routing.aside
        self._extra = ExtraPass(self, extra_rows, partial(PolicyPass, self, self._references, streaming))
        self._guided = Guided(self, guidance)
        self._resampler = Resampler(self, resample) if resample is not None else None
        self._reset = ResetCallback(self, reset) if reset is not None else None
        _supply.check_supply(self)
        if objective is not None:
            _arguments.notice_inert_parts(self.objective, args)
        self._scopes = {term.mean.over for term in self.objective.terms.values()}
        acting = [part for part in (self._reset,) if part is not None]
        self._steps = StepLog(self, acting, skip_overflow=skip_overflow)
        self._mismatch = _signals.Mismatch(self.accelerator, lambda: self.state.global_step)
        self._beside: Callable[[], dict[str, Tensor]] | None = None  # what a watch measures leaves the device with it
        self._drift = _signals.Drift(self, self._references, streaming, self.signals)
        self._step_count: Count | None = None
        self._buffered_inputs: Any = None
        self._reward_matrix: Tensor | None = None
        self._truncated: Tensor | None = None
        self._sampler: Any = None
        self._sampler_start: Tensor | None = None
        self.add_callback(self._recorder)
        if self._reset is not None:
            self.add_callback(self._reset)
        self.add_callback(_checkpoint.EpochStart(self))
        self._trackers = Trackers(self)
        self.add_callback(self._trackers)

    @property
    def returns_log_probs(self) -> bool:
        """Whether generation can return the sampler's log-probs."""
        own_generation = type(self)._generate_single_turn is not StableGRPOTrainer._generate_single_turn
        return bool(self.use_vllm or self.rollout_func or self._generation or own_generation)

    # ------------------------------------------------------------------ phase 1: a whole generation

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of an optimizer step, as the host takes them; those after them can then be seen."""
        if self._generation is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        samples, count = super().get_batch_samples(self._generation.upcoming(epoch_iterator), num_batches, device)
        self._generation.begin(samples)
        return samples, count

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._reward_matrix = rewards
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        self._truncated = torch.tensor(
            [not ids or ids[-1] not in ends for ids in completion_ids_list], device=rewards.device
        )
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        training = self.model.training
        if training and self._resampler is not None:
            inputs, output = self._resampler(self._generate_and_reward, inputs)
        else:
            output = self._generate_and_reward(inputs)
        rows = output["completion_ids"].size(0)
        size = self.num_generations if training else self.num_generations_eval
        everywhere = rows * self.accelerator.num_processes
        # Counted on from generation to generation: two of them may fall into one optimizer step.
        ids = self._step * everywhere + torch.arange(everywhere, device=self.accelerator.device) // size
        if LogProbs("sampler") in self._needs and "sampling_per_token_logps" not in output:
            raise ConfigError(
                "the objective reads the sampler's log-probs, but the generation returned None for them: return "
                "'logprobs' from rollout_func, one list per completion, or drop the part that needs them"
            )
        output["rlstab_group"] = _batches.own_rows(ids, self.accelerator, rows, 0)
        with torch.no_grad():
            for source in sorted(self._term_references()):
                output[_batches.REFERENCE_LOGPS + source] = self._score_reference(source, output)
            _batches.zero_outside_loss(output)
            self._run_rollout_parts(output)
        if training:
            self._recorder.on_rollouts(inputs, output)
        return output

    def _generate_and_reward(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The host's generation, with what travels with each row of it."""
        with self._routing.generation(), self._guided.generation(inputs):
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        self._routing.finish(output)
        self._guided.finish(output)
        rows = output["completion_ids"].size(0)
        output["rlstab_rewards"] = _batches.own_rows(self._total_rewards(), self.accelerator, rows, 0)
        output["rlstab_truncated"] = self._truncated
        rollouts = self._generation.finish(output) if self._generation is not None else ()
        output[_batches.PART + VERSION] = row_versions(rollouts, output["completion_ids"], self.state.global_step)
        return output

    def _generate(self, prompts: list[Any]) -> Any:
        with nullcontext() if self._generation is None else self._generation.together():
            return super()._generate(prompts)

    def _generate_single_turn(self, *turn: Any, **named: Any) -> Any:
        sampled = self._guided(self._sample, *turn, **named)
        if self._generation is not None and not self.tools:
            self._generation.join()
        return sampled

    def _tool_call_loop(self, *call: Any, **named: Any) -> Any:
        turns = super()._tool_call_loop(*call, **named)
        if self._generation is not None:
            self._generation.join()
        return turns

    def _sample(self, *turn: Any, **named: Any) -> Any:
        if self._generation is None:
            return super()._generate_single_turn(*turn, **named)
        sampled = self._generation(*turn, **named)
        self._routing.collect(self._generation.latest)
        return sampled

    def _get_per_token_logps_and_entropies(self, *call: Any, **named: Any) -> Any:
        return self._routing.score(super()._get_per_token_logps_and_entropies, *call, **named)

    def _total_rewards(self) -> Tensor:
        assert self._reward_matrix is not None
        rewards = (self._reward_matrix * self.reward_weights.to(self._reward_matrix.device)).nansum(dim=1)
        return torch.where(self._reward_matrix.isnan().all(dim=1), torch.nan, rewards)

    def _term_references(self) -> set[str]:
        sources = {need.source for need in self._needs if isinstance(need, LogProbs)}
        return sources & self._references.sources

    def _score_reference(self, source: str, inputs: Mapping[str, Any]) -> Tensor:
        args = self.args
        if source in self._references.servers:
            return self._references.servers[source].logprobs(**_batches.model_inputs(inputs))
        chunk = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        with (
            self._references.use(source, self.model, self.accelerator) as reference,
            self._without_checkpointing() if reference is self.model else nullcontext(),
        ):
            logps: Tensor = self._get_per_token_logps_and_entropies(
                reference, **_batches.model_inputs(inputs), batch_size=chunk
            )[0]
        return logps

    def _run_rollout_parts(self, output: dict[str, Any]) -> None:
        parts = _arguments.rollout_parts(self._needs, self.advantage)
        if not parts:
            return
        needs = {need for part in parts for need in part.requires}
        if LogProbs("old") in needs and "old_per_token_logps" not in output:
            needs.add(LogProbs("policy"))
        rows, width = output["completion_ids"].shape
        whole = _batches.gather_batch(
            _batches.token_batch(output, **self._detached_pass(output, needs)), self.accelerator
        )
        for part in parts:
            result = part.compute(whole).detach()
            whole = whole.replace(parts={**whole.parts, part.key: result})
            output[_batches.PART + part.key] = _batches.own_rows(result, self.accelerator, rows, width)
        if self.advantage is not None:
            advantages = output.pop(_batches.PART + self.advantage.key)
            output["advantages"] = advantages
            self._recorder.on_advantages(whole.part(self.advantage.key), whole.loss_mask)

    # ------------------------------------------------------------------ phase 2: a whole optimizer step

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            self._run_step_statistics([inputs])
            return inputs
        accumulation = self.args.gradient_accumulation_steps
        if self._step % accumulation == 0 and self.args.steps_per_generation % accumulation == 0:
            first = self._step % self.args.steps_per_generation
            self._open_step(self._buffered_inputs[first : first + accumulation])
        return inputs

    def _window(self) -> list[dict[str, Any]]:
        """The micro-batches of the step that closes; only the last one where a step spans two generations."""
        accumulation, generation = self.args.gradient_accumulation_steps, self.args.steps_per_generation
        last = (self._step - 1) % generation
        first = last - accumulation + 1 if generation % accumulation == 0 else last
        window: list[dict[str, Any]] = self._buffered_inputs[first : last + 1]
        return window

    def _open_step(self, window: list[dict[str, Any]]) -> None:
        tokens = torch.stack([_batches.completion_masks(batch)[1].sum() for batch in window]).sum()
        if self.accelerator.num_processes > 1:
            tokens = self.accelerator.reduce(tokens, reduction="sum")
        rows = sum(batch["completion_ids"].size(0) for batch in window)
        self._step_count = Count(tokens=tokens / self.accelerator.num_processes, sequences=float(rows))
        self._guided.open_step(window)
        self._run_step_statistics(window)

    def _run_step_statistics(self, window: list[dict[str, Any]]) -> None:
        statistics = prepared_parts(self._needs, StepStatistic)
        if not statistics:
            return
        needs = {need for part in statistics for need in part.requires}
        batches = [_batches.token_batch(inputs, **self._detached_pass(inputs, needs)) for inputs in window]
        whole = _batches.gather_batch(_batches.join(batches), self.accelerator)
        rows, width = sum(b.mask.shape[0] for b in batches), batches[0].mask.shape[1]
        for part in statistics:
            result = part.compute(whole).detach()
            whole = whole.replace(parts={**whole.parts, part.key: result})
            own = _batches.own_rows(result, self.accelerator, rows, width)
            start = 0
            for inputs in window:
                size = inputs["completion_ids"].size(0)
                inputs[_batches.PART + part.key] = own[start : start + size] if own.dim() else own
                start += size

    def _detached_pass(self, inputs: Mapping[str, Any], needs: set[Requirement]) -> dict[str, Any]:
        if not needs & {LogProbs("policy"), VocabStat("entropy")}:
            return {}
        if VocabStat("entropy") not in needs and self._fresh and "old_per_token_logps" in inputs:
            return {"logps": {"policy": inputs["old_per_token_logps"]}}
        chunk = self.args.per_device_train_batch_size
        with torch.no_grad(), self._without_checkpointing(), self._routing.replayed(inputs):
            logps, entropies, _ = self._get_per_token_logps_and_entropies(
                self.model, **_batches.model_inputs(inputs), batch_size=chunk, compute_entropy=True
            )
        return {"logps": {"policy": logps}, "vocab": {"entropy": entropies}}

    @property
    def _fresh(self) -> bool:
        """Whether the policy is still the one that made the completions, so that the old log-probs are its own."""
        updates = self.args.steps_per_generation * self.num_iterations
        return bool(self.model.training and self._step % updates < self.args.gradient_accumulation_steps)

    def _without_checkpointing(self) -> Any:
        return disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)

    # ------------------------------------------------------------------ phase 3: a micro-batch

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        self._routing.open(inputs)
        logps, vocab, aux_loss = self._pass(model, inputs, aux_loss=self.aux_loss_enabled)
        batch = _batches.token_batch(
            inputs,
            logps={"policy": logps},
            vocab=vocab,
            counts=micro_batch_counts(self, inputs),
            router_log_ratios=self._routing.moved(inputs),
            zeroed=self._pass.zeroed(inputs),
        )
        result = self.objective(batch, *self._extra(model), *self._guided.batches(inputs, batch, logps, vocab))
        loss = result.loss
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / self._accumulation()
        if model.training:
            self._routing.measure(inputs, batch)
        self._measure(result, batch, aux_loss)
        return loss

    def _accumulation(self) -> float:
        return float(self.current_gradient_accumulation_steps) if self.model.training else 1.0

    def _measure(self, result: ObjectiveLoss, batch: TokenBatch, aux_loss: Tensor | None) -> None:
        """Leave metrics on the device until the step closes; an evaluation has no steps and takes them at once."""
        metrics = _host_metrics.measured(result, batch, self.accelerator.num_processes)
        if aux_loss is not None:
            metrics["train/aux_loss"] = Sum(aux_loss.detach(), torch.ones_like(aux_loss))
        if not self.model.training:
            self._routing.close()
            self._steps.evaluated(metrics)
            return
        self._steps.add(metrics)
        if self.signals.mismatch and "sampler" in batch.logps:
            self._mismatch.add(batch)
        elif self.signals.mismatch:
            self.report_skipped("mismatch/k3", "the sampler returns no log-probs: pass engine=TransformersEngine")

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch, as the host does it; the last of a step also closes the step's measurements."""
        try:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._routing.close()
        if self.accelerator.sync_gradients:
            self._close_step()
        return loss

    def _close_step(self) -> None:
        numbers = self._routing.values()
        moved = self._drift.moved()
        if self.signals.drift and self.state.global_step % self.signals.drift_every == 0:
            numbers |= self._drift.measure(self._window())
        joined = moved | self._mismatch.tensors() | (self._beside() if self._beside is not None else {})
        self._steps.close(joined, numbers, self._accumulation())

    def report_skipped(self, signal: str, reason: str) -> None:
        """Say once, in the log and in the run folder, that a signal is not measured and why."""
        if signal not in self._skipped:
            self._skipped.add(signal)
            logger.warning("%s is not measured: %s", signal, reason)
            self._recorder.event("signal_skipped", signal=signal, reason=reason)

    def send_report(self, page: Path) -> None:
        """Show a report, such as `rlstab.report.write_report` writes, in the trackers that `report_to` names."""
        self._trackers.send(page)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._recorder.grad_norm = norm
        tell_switches(self.objective, norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the host does; what rlstab measured since the last time is joined as the schema says."""
        self._steps.read()
        self._recorder.reduce_window()
        super().log(logs, start_time)

    # ------------------------------------------------------------------ checkpoints

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._steps.read()
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        _checkpoint.save_state(folder, self.accelerator.process_index, _checkpoint.capture(self))
        if self._generation is not None:
            self._generation.save(folder)
        self.accelerator.wait_for_everyone()
        # The host comes last: with `save_total_limit` it removes older checkpoints as soon as its own files are there.
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        _checkpoint.load_converted(self.accelerator.unwrap_model(self.model), resume_from_checkpoint)
        self._references.load_trained_adapter(resume_from_checkpoint, self.accelerator.unwrap_model(self.model))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            _checkpoint.restore(self, checkpoint)
            if self._generation is not None:
                self._generation.load(Path(checkpoint))
