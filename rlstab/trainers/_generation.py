"""Any rollout engine as the generator of a TRL trainer."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from rlstab.errors import ConfigError
from rlstab.models import isolated_rng
from rlstab.rollouts import Engine, ModelWeights, Request, Rollout, Sampling, SyncVerifier

__all__ = ["EngineFactory", "Generation"]

CHECK_SEED = 0
CHECKED_PROMPTS = 8

#: Makes an engine for the trainer's policy and tokenizer, once the trainer has prepared them.
EngineFactory = Callable[[Any, Any], Engine]


class Generation:
    """Samples the trainer's completions with an engine, whose weights follow the policy's.

    First turns and turns after a tool call both come through here, so tools and environments keep working.
    """

    def __init__(self, trainer: Any, engine: Engine | EngineFactory) -> None:
        args = trainer.args
        if args.use_vllm or args.use_transformers_continuous_batching:
            raise ConfigError(
                "engine=... samples the completions, and args.use_vllm or args.use_transformers_continuous_batching "
                "asks the host to: set one of them"
            )
        if trainer.repetition_penalty != 1.0:
            raise ConfigError(
                f"args.repetition_penalty={trainer.repetition_penalty} changes the distribution by the tokens before, "
                "which no log-prob of the trainer knows of: leave it at 1.0"
            )
        if args.generation_kwargs:
            raise ConfigError(
                f"args.generation_kwargs={args.generation_kwargs} are arguments of the host's own generation: build "
                "the engine with them"
            )
        self._trainer = trainer
        #: What the latest call returned.
        self.rollouts: list[Rollout] = []
        policy = trainer.accelerator.unwrap_model(trainer.model)
        self.engine = engine if isinstance(engine, Engine) else engine(policy, trainer.processing_class)
        self._sampling = Sampling(
            max_new_tokens=trainer.max_completion_length,
            temperature=trainer.temperature,
            top_p=trainer.top_p,
            top_k=trainer.top_k or 0,
            min_p=trainer.min_p or 0.0,
            stop_ids=tuple(trainer.eos_token_ids),
        )
        verifies = trainer.signals.sync and not self.engine.shares_weights
        mixed = trainer.accelerator.mixed_precision != "no"
        self._verifier = SyncVerifier(self.engine, policy, self._sampling, mixed=mixed) if verifies else None
        self._started = False

    def __call__(self, prompt_ids: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[float]]]:
        """Completions of the prompts and the log-probs that their tokens were sampled with."""
        step = self._trainer.state.global_step
        if self.engine.weight_version != step or not self.engine.shares_weights:
            self._sync(prompt_ids, step)
        self.rollouts = self.engine.generate([Request(prompt_ids=ids) for ids in prompt_ids], self._sampling)
        return [r.token_ids.tolist() for r in self.rollouts], [r.logprobs.tolist() for r in self.rollouts]

    def _sync(self, prompt_ids: Sequence[Sequence[int]], step: int) -> None:
        """Bring the engine to the policy's weights; raises where it does not become the same model."""
        started = time.perf_counter()
        if self._verifier is None:
            policy = self._trainer.accelerator.unwrap_model(self._trainer.model)
            self.engine.sync_weights(ModelWeights(policy), version=step)
            return
        if self._started:
            report = self._verifier.sync(step)
        else:
            with isolated_rng(CHECK_SEED):
                report = self._verifier.start(_shortest(prompt_ids), step)
            self._started = True
        seen = {"engine": self.engine.id, "seconds": time.perf_counter() - started, **dataclasses.asdict(report)}
        self._trainer._recorder.event("weight_sync", **seen)


def _shortest(prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """A few different prompts, which take little time to score."""
    return sorted({tuple(prompt) for prompt in prompts}, key=lambda prompt: (len(prompt), prompt))[:CHECKED_PROMPTS]
