"""Any rollout engine as the generator of a TRL trainer."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PretrainedConfig

from rlstab.errors import ConfigError, EngineError
from rlstab.models import isolated_rng
from rlstab.rollouts import Engine, ModelWeights, OverlappedRollouts, Request, Rollout, Sampling, SyncVerifier
from rlstab.trainers._ahead import Ahead
from rlstab.trainers._batches import PART
from rlstab.trainers._turns import Conversations, check_images, requests_of, token_versions

__all__ = ["EngineFactory", "Generation"]

logger = logging.getLogger("rlstab")

PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id")
CHECK_SEED = 0
CHECKED_PROMPTS = 8

TOKEN_VERSIONS = PART + "weight_versions"
"""Key of the version of the weights that sampled each token, among the parts of a batch."""

#: Makes an engine for the trainer's policy and tokenizer, once the trainer has prepared them.
EngineFactory = Callable[[Any, Any], Engine]


class _FailedElsewhereError(EngineError):
    """The engine of another process has given up."""


class Generation:
    """Samples the trainer's completions with an engine, whose weights follow the policy's.

    First turns and turns after a tool call both come through here, in training and in evaluation, so tools keep
    working. The engine takes new weights once for each version of the policy, however many turns that has.
    """

    def __init__(self, trainer: Any, engine: Engine | EngineFactory) -> None:
        _check_host(trainer)
        self._trainer = trainer
        #: What the latest call returned.
        self.latest: list[Rollout] = []
        self._conversations = Conversations()
        policy = trainer.accelerator.unwrap_model(trainer.model)
        self.engine = engine if isinstance(engine, Engine) else engine(policy, trainer.processing_class)
        self._events: SimpleQueue[tuple[str, Mapping[str, object]]] = SimpleQueue()
        self.engine.listen(lambda kind, fields: self._events.put((kind, fields)))
        self._sampling = Sampling(
            max_new_tokens=trainer.max_completion_length,
            temperature=trainer.temperature,
            top_p=trainer.top_p,
            top_k=trainer.top_k or 0,
            min_p=trainer.min_p or 0.0,
            stop_ids=tuple(trainer.eos_token_ids),
            forbidden_ids=_placeholders(policy.config),
        )
        self._ahead: Ahead | None = None
        if isinstance(self.engine, OverlappedRollouts) and self.engine.staleness:
            self._ahead = Ahead(trainer, self.engine, self._sampling)
        verifies = trainer.signals.sync and not self.engine.shares_weights
        mixed = trainer.accelerator.mixed_precision != "no"
        self._verifier = SyncVerifier(self.engine, policy, self._sampling, mixed=mixed) if verifies else None
        self._started = False
        self._synced: tuple[int, int] | None = None

    def __call__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        images: Sequence[Sequence[Any] | None] | None,
        multimodal_fields: Mapping[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Completions of the prompts, which repeat as often as wanted, and the log-probs of their tokens."""
        check_images(self._trainer.model, has_tool_images)
        requests = requests_of(prompt_ids, images, multimodal_fields)
        places = self._conversations.continued_by(prompt_ids)
        self.latest = self._sampled(requests, first=places is None)
        self._tell_events()
        self._conversations.add(self.latest, places)
        return [r.token_ids.tolist() for r in self.latest], [r.logprobs.tolist() for r in self.latest]

    def _sampled(self, requests: Sequence[Request], *, first: bool) -> list[Rollout]:
        ahead = self._ahead if first and self._trainer.model.training else None
        ready = None if ahead is None else ahead.take(requests)
        self._follow([request.prompt_ids for request in requests])
        rollouts = self.engine.generate(requests, self._sampling) if ready is None else ready
        if ahead is not None and not self._trainer.tools:
            ahead.announce()
        return rollouts

    @property
    def samples_ahead(self) -> bool:
        """Whether completions are sampled before the trainer asks for them."""
        return self._ahead is not None

    def forget(self) -> None:
        """Leave the turns of this generation as they are: somebody has made other rows of them."""
        self._conversations.end()

    def finish(self, output: dict[str, Any]) -> list[Rollout]:
        """End a generation: put the versions of its tokens where they travel with them.

        Returns:
            The rollouts of its rows, the turns of each joined.
        """
        rows = self._conversations.end()
        if len(rows) == len(output["completion_ids"]):
            output[TOKEN_VERSIONS] = token_versions(rows, output["completion_ids"])
        if self._ahead is not None and self._trainer.model.training and self._trainer.tools:
            self._ahead.announce()  # not earlier: the turns after a tool call would wait for it
        return rows

    # ------------------------------------------------------------------ weights

    def _follow(self, prompt_ids: Sequence[Sequence[int]]) -> None:
        """Bring the engine to the policy's weights, unless it has them."""
        step = self._trainer.state.global_step
        if self.engine.shares_weights:
            if self.engine.weight_version != step:
                self.engine.sync_weights(ModelWeights(self._policy()), version=step)
        elif self._synced != self._version():
            self._sync(prompt_ids, step)
            self._synced = self._version()

    def _policy(self) -> Any:
        return self._trainer.accelerator.unwrap_model(self._trainer.model)

    def _version(self) -> tuple[int, int]:
        """The policy's version. The step alone would miss weights that are loaded, as the best ones at the end."""
        return self._trainer.state.global_step, sum(parameter._version for parameter in self._policy().parameters())

    def _sync(self, prompt_ids: Sequence[Sequence[int]], step: int) -> None:
        """Send the policy's weights; raises where the engine does not become the same model."""
        started = time.perf_counter()
        if self._verifier is None:
            self.engine.sync_weights(ModelWeights(self._policy()), version=step)
            return
        if self._started:
            report = self._verifier.sync(step)
        else:
            with isolated_rng(CHECK_SEED):
                report = self._verifier.start(_shortest(prompt_ids), step)
            self._started = True
        seen = {"engine": self.engine.id, "seconds": time.perf_counter() - started, **dataclasses.asdict(report)}
        self._trainer._recorder.event("weight_sync", **seen)

    # ------------------------------------------------------------------ deaths

    def _tell_events(self) -> None:
        """Write down what befell the engine, on this thread."""
        while not self._events.empty():
            kind, fields = self._events.get()
            self._trainer._recorder.event(kind, **fields)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A generation of all processes: where the engine of one gives up, all stop, and leave a checkpoint."""
        generator = torch.get_rng_state()
        try:
            yield
        except EngineError as error:
            self._tell_events()
            if not isinstance(error, _FailedElsewhereError):
                self._failures(str(error))
            self.engine.drop()
            torch.set_rng_state(generator)
            obstacle = self._obstacle()
            if not obstacle:
                self._trainer._save_checkpoint(self._trainer.model, trial=None)
                self._trainer.accelerator.wait_for_everyone()  # one that ended earlier would take the others with it
            logger.error("the engine has failed: %s", _outcome(obstacle, self._trainer.state.global_step))
            self._trainer._recorder.event(
                "generation_failed", engine=self.engine.id, reason=str(error), checkpoint=not obstacle
            )
            raise

    def join(self) -> None:
        """Wait until all processes have sampled what they need; raises where the engine of another has given up."""
        for process, failure in enumerate(self._failures("")):
            if failure:
                raise _FailedElsewhereError(f"the engine of process {process} has failed: {failure}")

    def _failures(self, own: str) -> list[str]:
        """Why the engine of each process has failed, or "": said once in each generation by every process."""
        several = self._trainer.accelerator.num_processes > 1
        return gather_object([own]) if several else [own]

    def _obstacle(self) -> str:
        """What keeps a checkpoint from being written now, or ""."""
        trainer = self._trainer
        if not trainer.model.training:
            return "an evaluation was under way"
        if trainer._step % trainer.args.gradient_accumulation_steps:
            return "an update was under way"
        return "" if trainer.state.global_step else "there was no update yet"

    # ------------------------------------------------------------------ batches ahead, and their checkpoints

    def upcoming(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The epoch's batches, as the host is to read them."""
        return batches if self._ahead is None else self._ahead.upcoming(batches)

    def begin(self, batches: Sequence[Any]) -> None:
        """Note the batches of the optimizer step that begins."""
        if self._ahead is not None:
            self._ahead.begin(batches)

    def save(self, checkpoint: Path) -> None:
        """Write what a resumed run needs."""
        if self._ahead is not None:
            self._ahead.save(checkpoint)

    def load(self, checkpoint: Path) -> None:
        """Take up what `save` wrote."""
        if self._ahead is not None:
            self._ahead.load(checkpoint)


def _check_host(trainer: Any) -> None:
    args = trainer.args
    if args.use_vllm or args.use_transformers_continuous_batching:
        raise ConfigError(
            "engine=... samples the completions, and args.use_vllm or args.use_transformers_continuous_batching "
            "asks the host to: set one of them"
        )
    if trainer.rollout_func is not None:
        raise ConfigError("engine=... samples the completions, and rollout_func=... does so too: pass one of them")
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


def _placeholders(config: PretrainedConfig) -> tuple[int, ...]:
    """Tokens that stand for an image or a video in a prompt, and could not be read back from a completion."""
    known = config.to_dict()
    found = [known.get(name) for name in PLACEHOLDERS]
    return tuple(token for token in found if token is not None)


def _shortest(prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """A few different prompts, which take little time to score."""
    return sorted({tuple(prompt) for prompt in prompts}, key=lambda prompt: (len(prompt), prompt))[:CHECKED_PROMPTS]


def _outcome(obstacle: str, step: int) -> str:
    if obstacle:
        return f"no checkpoint of step {step} was written, as {obstacle}; go on from the last regular one (save_steps)"
    return f"a checkpoint of step {step} was written"
