"""vLLM in this process, or in processes of its own: the few calls that an engine needs, the same for both."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlstab.errors import ConfigError, EngineError
from rlstab.models import isolated_rng
from rlstab.rollouts._loop import LoopThread
from rlstab.rollouts._vllm_calls import Call, Completion, scores_of, scoring_call
from rlstab.rollouts._vllm_driver import Driver, InFlight
from rlstab.rollouts._vllm_follow import leader_environment

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.outputs import RequestOutput

__all__ = ["Core", "InProcess", "OwnProcesses", "environment_defaults", "process_state_kept"]

Answer = TypeVar("Answer")

SHUTDOWN = 3.0
"""Seconds that processes are given to end by themselves."""


class Core(ABC):
    """A running vLLM."""

    @property
    @abstractmethod
    def context(self) -> int:
        """Most tokens of a prompt and its completion."""

    @abstractmethod
    def generate(self, call: Call, seed: int) -> list[Completion]:
        """Answer all requests of a call; `seed` is for those without a seed of their own."""

    @abstractmethod
    def score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """Log-probs of each sequence's tokens but the first, at temperature 1."""

    @abstractmethod
    def update(self, info: Mapping[str, Any], version: int) -> None:
        """Take new weights and forget what was computed with the old ones."""

    @abstractmethod
    def call_workers(self, method: str, **arguments: Any) -> list[Any]:
        """What a method of the worker extension returns in each worker."""

    @abstractmethod
    def fault(self) -> str:
        """What is wrong, or ""."""

    @abstractmethod
    def close(self) -> None:
        """Stop it and give its memory back."""


class InProcess(Core):
    """vLLM in this process, on this thread.

    Starting vLLM here would seed this process's generators and take away its threads; both are as before afterwards.
    Small functions that vLLM compiles on the side, and anew for each size of batch, run eagerly where the model does.
    """

    running = False

    def __init__(self, arguments: Mapping[str, Any], init_info: Mapping[str, Any]) -> None:
        if InProcess.running:
            raise ConfigError(
                "VLLMEngine: another one runs in this process, whose process groups serve one model only: close it, or "
                "set in_process=False"
            )
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ConfigError(
                "VLLMEngine: in_process=True with several training processes, whose process group vLLM would take for "
                "its own; set in_process=False"
            )
        self._lock = threading.RLock()
        self._eager = bool(arguments["enforce_eager"])
        self._version = 0
        self._whole = False
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        gc.collect()  # what is left of another engine would take down the process groups of this one when it goes
        with environment_defaults(environment), process_state_kept(), self._stance():
            from vllm import LLM

            self._llm: LLM = LLM(**arguments)
            self._llm.init_weight_transfer_engine({"init_info": dict(init_info)})
        InProcess.running = True
        self._device = torch.device(self._llm.llm_engine.vllm_config.device_config.device)

    @property
    def context(self) -> int:
        return int(self._llm.llm_engine.vllm_config.model_config.max_model_len)

    def generate(self, call: Call, seed: int) -> list[Completion]:
        with self._lock, isolated_rng(seed, device=self._device), self._stance():
            self._return_whole(call.whole)
            outputs = self._llm.generate(call.prompts(), call.params(), use_tqdm=False)
        return [self._completion(output, call) for output in outputs]

    def _completion(self, output: RequestOutput, call: Call) -> Completion:
        (chosen,) = output.outputs
        completion = Completion(reason=chosen.finish_reason, routed=chosen.routed_experts)
        completion.extend(chosen.token_ids, chosen.logprobs, self._version, keeps=call.records_sets)
        if output.metrics is not None:
            completion.waited = output.metrics.scheduled_ts - output.metrics.queued_ts
            completion.worked = output.metrics.last_token_ts - output.metrics.scheduled_ts
        return completion

    def score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        prompts, params = scoring_call(sequences)
        with self._lock, isolated_rng(0, device=self._device), self._stance():
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [scores_of(output.prompt_logprobs) for output in outputs]

    def update(self, info: Mapping[str, Any], version: int) -> None:
        with self._lock:
            self._llm.start_weight_update()
            self._llm.update_weights({"update_info": dict(info)})
            self._llm.finish_weight_update(weight_version=str(version))
            self._llm.reset_prefix_cache()
            self._version = version

    def call_workers(self, method: str, **arguments: Any) -> list[Any]:
        answers: list[Any] = self._llm.collective_rpc(method, kwargs=arguments)
        return answers

    def _return_whole(self, whole: bool) -> None:
        if whole != self._whole:
            self.call_workers("rlstab_whole_log_probs", whole=whole)
            self._whole = whole

    def fault(self) -> str:
        return ""

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()
        InProcess.running = False

    def _stance(self) -> Any:
        return torch.compiler.set_stance("force_eager" if self._eager else "default")


class OwnProcesses(Core):
    """vLLM in processes of its own, driven by an event loop on a thread of ours.

    A core that dies raises in every request that waits for it; one that hangs is found by the time since its last
    token, and killed.
    """

    def __init__(
        self, arguments: Mapping[str, Any], init_info: Mapping[str, Any], *, patience: float, in_flight: InFlight
    ) -> None:
        self._patience = patience
        self._fault = ""
        self._thread = LoopThread("vllm")
        environment = {
            "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            **leader_environment(),
            **({"TORCHDYNAMO_DISABLE": "1"} if arguments["enforce_eager"] else {}),
        }
        with environment_defaults(environment):
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            made = self._thread.submit(_called(AsyncLLM.from_engine_args, AsyncEngineArgs(**arguments)))
            self.driver = Driver(made.result(), in_flight=in_flight)
            self._thread.submit(self.driver.start_transfer(init_info)).result()

    @property
    def context(self) -> int:
        return self.driver.context

    def generate(self, call: Call, seed: int) -> list[Completion]:
        return self._wait(self.driver.generate(call, seed))

    def score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        return self._wait(self._scores(sequences))

    async def _scores(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        found = {place: scores async for place, scores in self.driver.scores(sequences)}
        return [found[place] for place in range(len(sequences))]

    def update(self, info: Mapping[str, Any], version: int) -> None:
        self._wait(self.driver.update(info, version))

    def call_workers(self, method: str, **arguments: Any) -> list[Any]:
        return self._wait(self.driver.call_workers(method, **arguments))

    def fault(self) -> str:
        return self._fault or ("its core has died" if self.driver.engine.errored else "")

    def close(self) -> None:
        grace = 0.0 if self.fault() else SHUTDOWN
        self._thread.submit(self.driver.end_reading()).result()
        self.driver.engine.shutdown(timeout=grace)
        self.driver.kill()
        del self.driver.engine
        gc.collect()  # it would shut down once more when the interpreter does, and fail
        self._thread.close()

    def _wait(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """The result of work on the loop, unless the core dies or nothing comes from it for too long."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._fault:
            work.close()
            raise EngineError(f"vLLM {self._fault}; make a new engine")
        self.driver.progress = time.monotonic()
        future = self._thread.submit(work)
        while True:
            try:
                return future.result(timeout=min(1.0, self._patience))
            except TimeoutError:
                if self.driver.engine.errored:  # vLLM leaves calls of its workers without an answer then
                    future.cancel()
                    raise self._died() from None
                if time.monotonic() - self.driver.progress > self._patience:
                    self._give_up(future)
            except EngineDeadError as died:
                raise self._died() from died

    def _died(self) -> EngineError:
        self._fault = "died in its own process"
        return EngineError(f"vLLM {self._fault}; its log says why. Make a new engine")

    def _give_up(self, future: Future[Any]) -> None:
        self._fault = f"gave no sign of life for {self._patience:g} s"
        future.cancel()
        self.driver.kill()
        raise EngineError(
            f"vLLM {self._fault} and was killed; make a new engine, with a longer patience if it was busy"
        )


async def _called(make: Callable[[Any], Answer], argument: Any) -> Answer:
    """What a plain function returns, called on the loop."""
    return make(argument)


@contextmanager
def environment_defaults(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that hold inside the block, unless they are set already."""
    added = {"VLLM_LOGGING_LEVEL": "ERROR", **values}
    added = {key: value for key, value in added.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Give back what vLLM takes for its own at its start: random states, threads, and variables that are not its."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.cuda.set_rng_state_all(cuda)
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        for key in [key for key in os.environ if not key.startswith("VLLM_") and key not in environment]:
            del os.environ[key]
        os.environ.update(environment)
