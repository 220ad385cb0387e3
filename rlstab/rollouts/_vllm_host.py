"""For trainers that start vLLM in their own process themselves: what they leave out for a CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlstab.rollouts._vllm_cores import environment_defaults, process_state_kept

__all__ = ["colocated_arguments", "colocated_start", "colocated_steps", "runs_on_cpu", "take_weights"]

GIBIBYTE = 1 << 30


def runs_on_cpu() -> bool:
    """Is the installed vLLM the one for CPUs?

    Example:
        ```python
        if runs_on_cpu():
            take_weights(llm, model.named_parameters())
        ```
    """
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def colocated_arguments(dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `vllm.LLM` beside those of a trainer that runs it in its own process.

    The precision is the trainer's: vLLM would turn float32 into bfloat16. On a CPU the model runs eagerly, with an
    explicit cache: vLLM would otherwise claim nearly all of the machine's memory and spend a long time compiling.

    Args:
        dtype: precision that the trainer computes in.

    Returns:
        Keyword arguments.

    Example:
        ```python
        llm = LLM("checkpoint", **colocated_arguments(torch.float32))
        ```
    """
    on_cpu = {"enforce_eager": True, "kv_cache_memory_bytes": GIBIBYTE} if runs_on_cpu() else {}
    return {"dtype": str(dtype).removeprefix("torch."), **on_cpu}


@contextmanager
def colocated_start() -> Iterator[None]:
    """Give back what vLLM takes for its own while it starts: random states, threads and environment variables.

    Example:
        ```python
        with colocated_start():
            llm = LLM("checkpoint")
        ```
    """
    with environment_defaults({"VLLM_CPU_OMP_THREADS_BIND": "nobind"}), process_state_kept(), colocated_steps():
        yield


@contextmanager
def colocated_steps() -> Iterator[None]:
    """Run small functions that vLLM compiles on the side eagerly, where there is no GPU.

    Example:
        ```python
        with colocated_steps():
            outputs = llm.generate(prompts, params)
        ```
    """
    with torch.compiler.set_stance("force_eager" if runs_on_cpu() else "default"):
        yield


def take_weights(llm: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Load all weights of a model into a vLLM in this process, on a CPU, and clear its caches.

    `model.load_weights`, which trainers call on a GPU, fails there: vLLM's CPU backend has packed its weights away.
    What its own reloading leaves stale (the head tied to the embedding, experts) is brought up to date.

    Args:
        llm: the `vllm.LLM`.
        tensors: every weight under the name that it has in a checkpoint.

    Example:
        ```python
        take_weights(llm, model.named_parameters())
        ```
    """
    from rlstab.rollouts._vllm_worker import repair_packed_weights

    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(tensors)})
    llm.apply_model(repair_packed_weights)
    llm.reset_prefix_cache()
