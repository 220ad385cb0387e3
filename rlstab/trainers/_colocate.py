"""The host's own vLLM, in the trainer's process: in the trainer's precision, and on a CPU too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from trl.trainer import grpo_trainer

from rlstab.rollouts import colocated_arguments, colocated_start, colocated_steps, runs_on_cpu, take_weights
from rlstab.trainers._host import GRPOConfig

__all__ = ["colocated_vllm"]

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def colocated_vllm(args: GRPOConfig) -> Iterator[None]:
    """Inside the block the host builds a colocated vLLM in the precision that it trains in.

    By itself it starts one in bfloat16 for a policy in float32; and on a CPU its sync fails, as vLLM has packed the
    weights away that the sync would write to.
    """
    if not (args.use_vllm and args.vllm_mode == "colocate"):
        yield
        return
    with _replaced(grpo_trainer, "VLLMGeneration", _generation_class()):
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    before = vars(module)[name]
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _generation_class() -> type:
    # The module needs vLLM, which only this mode does.
    from trl.generation import vllm_generation

    class ColocatedGeneration(vllm_generation.VLLMGeneration):
        """The host's generation with vLLM, of which it tells no argument."""

        def _init_vllm(self) -> None:
            dtype = HALF.get(self.accelerator.mixed_precision, self.model.dtype)
            engine = partial(vllm_generation.LLM, **colocated_arguments(dtype))
            with _replaced(vllm_generation, "LLM", engine), colocated_start():
                super()._init_vllm()

        def sync_weights(self) -> None:
            if runs_on_cpu():
                take_weights(self.llm, [(name, tensor.detach().clone()) for name, tensor in self._iter_named_params()])
            else:
                super().sync_weights()

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            with colocated_steps():
                return super().generate(*args, **kwargs)

    return ColocatedGeneration
