"""`RayEnginePool`: engines in Ray actors, on one machine or many, behind the interface of one engine."""

from __future__ import annotations

import atexit
import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlstab.errors import ConfigError, EngineError
from rlstab.rollouts._draw import stream_keys
from rlstab.rollouts._engine import Health
from rlstab.rollouts._named import NamedEngine
from rlstab.rollouts._ray_actor import Facts, MakeEngine
from rlstab.rollouts._ray_local import reach_ray
from rlstab.rollouts._ray_weights import SentWeights
from rlstab.rollouts._replica import Replica
from rlstab.rollouts._request import Request, Sampling
from rlstab.rollouts._rollout import Rollout
from rlstab.rollouts._transformers import TransformersEngine
from rlstab.rollouts._weight_file import check_shapes
from rlstab.rollouts._weights import ModelWeights, WeightSource

if TYPE_CHECKING:
    from rlstab.rollouts._ray_workers import Task

__all__ = ["RayEnginePool"]

SAME = {torch.float32: 1e-4}
"""Largest mean difference, in nats, between the scores that engines of the same weights give; by their precision."""

SAME_IN_LESS = 0.1


@final
class RayEnginePool(NamedEngine):
    """Engines in Ray actors: placed by Ray on the machines of a cluster, and used as one.

    A call is cut into parts of at most `batch` requests; whichever engine is free takes the next one. A part whose
    engine dies is sampled again by another, and with the same seeds; parts that are finished stay as they are. Every
    request is answered exactly once. An engine that gives no answer for `patience` seconds counts as dead, and is
    killed. The dead are started again, and take part as soon as they have the present weights.

    New weights are put into Ray's object store once, whence every machine fetches them. `score` asks all engines, and
    fails where they differ: so a check of the pool is a check of each.

    Without a cluster (`ray.init`, or `RAY_ADDRESS`) Ray is started on this machine, on the loopback address, without
    dashboard or reports of use, and ends with the pool that has started it.

    Events for listeners: `engine_died` (worker, cause, process, restarted) and `engine_returned` (worker, version,
    process).

    Args:
        model: the policy, whose weights the engines start with; adapters are merged on the way.
        tokenizer: passed on to `engine`.
        engine: makes an engine of model and tokenizer, in the actor; one with weights of its own. Default:
            `TransformersEngine` with a copy.
        size: number of engines.
        options: what Ray's actors are made with: `num_gpus`, `num_cpus`, `resources`, `scheduling_strategy`,
            `runtime_env` and so on. Default: one CPU each, spread over the machines.
        device: where an actor puts the model that it makes the engine of.
        batch: most requests in one call to an engine.
        patience: seconds after which an engine that gives no answer is taken for dead: longer than a call of `batch`
            requests may take.
        start_patience: seconds after which an engine that has not started is taken for dead, and after which the pool
            gives up if no engine lives.
        restarts: how often an engine is started again without an answer in between, before it is left out.
        name: id of the pool; an engine's is the name with its number, `ray-0`.

    Raises:
        ConfigError: if a number is out of range, if Ray is not installed, or if `engine` cannot make an engine.
        EngineError: if the engines do not start in time, as where Ray has no place for them.

    Example:
        ```python
        with RayEnginePool(model, tokenizer, engine=VLLMEngine, size=8, options={"num_gpus": 1}) as pool:
            rollouts = pool.generate([Request(prompt_ids=ids)], Sampling(max_new_tokens=256))
        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        engine: MakeEngine | None = None,
        size: int = 2,
        options: Mapping[str, Any] = MappingProxyType({"num_cpus": 1, "scheduling_strategy": "SPREAD"}),
        device: str = "cpu",
        batch: int = 256,
        patience: float = 600.0,
        start_patience: float = 600.0,
        restarts: int = 3,
        name: str = "ray",
    ) -> None:
        _check(size=(size, 1), batch=(batch, 1), restarts=(restarts, 0))
        for key, seconds in {"patience": patience, "start_patience": start_patience}.items():
            if not seconds > 0:
                raise ConfigError(f"RayEnginePool: {key} {seconds}; expected a number of seconds above 0")
        super().__init__(name)
        self._batch = batch
        self._lock = threading.RLock()
        self._closed = False
        self._own = reach_ray()
        from rlstab.rollouts._ray_workers import Workers

        described = (engine or partial(TransformersEngine, share=False), Replica.of(model), tokenizer, device)
        self._workers = Workers(
            name,
            described,
            options=options,
            patience=patience,
            start_patience=start_patience,
            restarts=restarts,
            tell=self._tell_of,
        )
        atexit.register(self.close)
        try:
            self._facts = self._begin(SentWeights(ModelWeights(model)), size)
        except BaseException:
            self.close()
            raise

    def _begin(self, weights: SentWeights, size: int) -> Facts:
        """Start the engines, all of them; what they are is the same for all."""
        self._shapes = weights.shapes
        self._workers.carry(weights, 0)
        self._workers.grow(size)
        self._workers.await_all()
        facts = [worker.facts for worker in self._workers.living()]
        if len(facts) < size or facts[0] is None:
            raise EngineError(
                f"{self._name}: {len(facts)} of {size} engines have started, the last to fail: {self._workers.last}; "
                "ask for fewer (size) or smaller ones (options), or raise start_patience"
            )
        return facts[0]

    @property
    def size(self) -> int:
        """Engines that live or are being started."""
        return self._workers.size

    @property
    def shares_weights(self) -> bool:
        """Never: the engines are other processes."""
        return False

    @property
    def returns_routes(self) -> bool:
        """Do its rollouts say which experts every token went to?"""
        return self._facts.returns_routes

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights that it samples with."""
        return self._facts.dtype

    def resize(self, size: int) -> None:
        """Start engines, or end those that came last, until there are `size` of them.

        One that does not start in time is told of, and left out.

        Raises:
            ConfigError: if `size` is not positive.
            EngineError: if the pool is closed.
        """
        _check(size=(size, 1))
        with self._lock:
            self._check_usable()
            self._workers.shrink(max(self.size - size, 0))
            self._workers.grow(max(size - self.size, 0))
            self._workers.await_all()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """Continue every prompt: see `Engine.generate`.

        With a seed, tokens do not depend on how the call is cut; without one, seeds come from torch's global generator
        here, one for each part. The id in a rollout is the engine's.

        Raises:
            EngineError: if the pool is closed, if no engine is left, or if an engine cannot answer a request.
        """
        with self._lock:
            self._check_usable()
            calls = _Calls(_seeded(requests, sampling), sampling, share=self._share(len(requests)))
            return calls.rollouts(self._workers.run(calls.tasks()))

    def _share(self, count: int) -> int:
        """Requests of one part."""
        return max(1, min(self._batch, -(-count // max(1, self.size))))

    def score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """Log-probs of given tokens, of which every engine gives its own: see `Engine.score`.

        Raises:
            EngineError: if the pool is closed, if no engine is left, or if two engines differ: one has other weights.
        """
        with self._lock:
            self._check_usable()
            answers = self._workers.everywhere(lambda actor: actor.score.remote(list(sequences)))
        first, *others = answers
        for other in others:
            self._check_same(first, answers[first], other, answers[other])
        scores: list[Tensor] = answers[first]
        return scores

    def _check_same(self, first: str, scores: list[Tensor], other: str, found: list[Tensor]) -> None:
        if not scores:
            return
        distance = float((torch.cat(scores) - torch.cat(found)).abs().mean())
        if not distance <= SAME.get(self.dtype, SAME_IN_LESS):
            raise EngineError(
                f"{self._name}: {first} and {other} give the same tokens log-probs that differ by {distance:.2g} nats "
                f"on average; expected at most {SAME.get(self.dtype, SAME_IN_LESS):g}: one of them has other weights, "
                "or another precision"
            )

    def sync_weights(self, source: WeightSource, version: int) -> None:
        """Take the weights of `source`: all engines that live, and those that are being started as they come.

        Raises:
            WeightSyncError: if the version is older than the present one, or if names or shapes differ.
            EngineError: if the pool is closed or no engine is left.
        """
        with self._lock:
            self._check_usable()
            self._check_version(version)
            weights = SentWeights(source)
            check_shapes(self._name, self._shapes, weights.shapes)
            sent = self._workers.carry(weights, version)
            self._workers.everywhere(lambda actor: actor.sync.remote(sent, version))
            self._version = version

    def health(self) -> Health:
        """The state of the pool: alive as long as an engine is, or is being started."""
        detail = "closed" if self._closed else "" if self.size else "no engine is left"
        return Health(alive=not detail, engine=self._name, weight_version=self._version, detail=detail)

    def close(self) -> None:
        """End the engines, and Ray if the pool has started it."""
        import ray

        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if ray.is_initialized():
            self._workers.close()
            if self._own:
                ray.shutdown()

    def _tell_of(self, kind: str, **fields: object) -> None:
        self._tell(kind, engine=self._name, **fields)

    def _check_usable(self) -> None:
        if self._closed:
            raise EngineError(f"{self._name}: the engine is closed; make a new one")


class _Calls:
    """The parts of one call of `generate`, as tasks for engines."""

    def __init__(self, requests: Sequence[Request], sampling: Sampling, *, share: int) -> None:
        self._parts = [list(requests[start : start + share]) for start in range(0, len(requests), share)]
        self._sampling = sampling
        self._seed = int(torch.randint(2**62, ())) if sampling.seed is None else sampling.seed
        self._called = time.perf_counter()
        self._waited = [0.0] * len(self._parts)

    def tasks(self) -> list[Task]:
        """What an engine is asked for each part."""
        return [partial(self._ask, place) for place in range(len(self._parts))]

    def _ask(self, place: int, actor: Any) -> Any:
        self._waited[place] = time.perf_counter() - self._called
        return actor.generate.remote(self._parts[place], self._sampling, self._seed + place)

    def rollouts(self, answers: Sequence[Sequence[Rollout]]) -> list[Rollout]:
        """The rollouts of all parts, with the time that they waited for an engine."""
        return [
            dataclasses.replace(
                rollout, timing=dataclasses.replace(rollout.timing, waiting=rollout.timing.waiting + waited)
            )
            for part, waited in zip(answers, self._waited, strict=True)
            for rollout in part
        ]


def _seeded(requests: Sequence[Request], sampling: Sampling) -> Sequence[Request]:
    """Requests whose random streams do not depend on how the call is cut, where there is a seed."""
    if sampling.seed is None or not requests:
        return requests
    seeds = torch.full((len(requests),), sampling.seed, dtype=torch.int64)
    keys = stream_keys(seeds, torch.arange(len(requests))).bitwise_and(2**63 - 1).tolist()
    return [
        request if request.seed is not None else dataclasses.replace(request, seed=key)
        for request, key in zip(requests, keys, strict=True)
    ]


def _check(**numbers: tuple[int, int]) -> None:
    for name, (value, least) in numbers.items():
        if value < least:
            raise ConfigError(f"RayEnginePool: {name} {value}; expected at least {least}")
