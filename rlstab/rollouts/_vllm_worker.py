"""What runs inside vLLM's worker: taking new weights, the repair of its CPU backend, seeds, untruncated log-probs.

vLLM imports this module by name, before it loads the model (`worker_extension_cls`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.sample.sampler import Sampler

from rlstab.errors import ConfigError
from rlstab.rollouts._adapters import adapted_tensors
from rlstab.rollouts._vllm_follow import follow_leader
from rlstab.rollouts._vllm_routes_worker import RoutesExtension

if TYPE_CHECKING:
    from vllm.v1.sample.metadata import SamplingMetadata

__all__ = ["BACKEND", "WorkerExtension", "repair_packed_weights"]

follow_leader()

BACKEND = "rlstab"
GREEDY_BELOW = 1e-5


@dataclass
class TransferInit(WeightTransferInitInfo):
    """`repair`: bring packed copies of the CPU backend up to date after each update."""

    repair: bool = True


@dataclass
class TransferUpdate(WeightTransferUpdateInfo):
    """All weights of a model: in safetensors files, or as they are where trainer and worker share a process.

    `paths` names a file of all weights, `base`, and where there are adapters one of what they change, `changes`.
    """

    paths: dict[str, str] | None = None
    tensors: Any = None
    changes: Any = None

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights under the names of a checkpoint, adapters merged; files are mapped into memory, not read."""
        if self.paths is None:
            yield from adapted_tensors(self.tensors, self.changes)
            return
        changes = dict(_mapped(self.paths["changes"])) if "changes" in self.paths else {}
        yield from adapted_tensors(_mapped(self.paths["base"]), changes)


def _mapped(path: str) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a mapping
            yield name, file.get_tensor(name)


class Transfer(WeightTransferEngine[TransferInit, TransferUpdate]):
    """Loads all weights anew in the format of checkpoints, layer by layer."""

    init_info_cls = TransferInit
    update_info_cls = TransferUpdate

    def init_transfer_engine(self, init_info: TransferInit) -> None:
        self._repair = init_info.repair

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: TransferUpdate) -> None:
        self.model.load_weights(update_info.named_tensors())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self._repair:
            repair_packed_weights(self.model)

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine(BACKEND, Transfer)


def repair_packed_weights(model: nn.Module) -> None:
    """Pack anew what vLLM's CPU backend leaves as it was when a model is loaded a second time.

    The backend computes with packed copies of its weights. Reloading renews those of linear layers; it forgets the head
    that is tied to the embedding, and gives experts their new weights unpacked, which the kernel reads as packed. Both
    go unnoticed: the engine samples on, from a mixture of old, new and scrambled weights. Run it once after each
    reload of all weights: packing packed experts again would scramble them.
    """
    for module in model.modules():
        if module_device(module).type != "cpu":
            continue
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
        elif isinstance(module, RoutedExperts):
            module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(module)


def module_device(module: nn.Module) -> torch.device:
    """Where the parameters of a module are; the CPU if it has none."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


class WholeSampler(Sampler):
    """Can return the log-probs of the whole distribution where sampling is truncated."""

    whole = False

    def sample(
        self, logits: Tensor, sampling_metadata: SamplingMetadata, logprobs_mode_override: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        temperature = sampling_metadata.temperature
        if not self.whole or temperature is None:
            sampled: tuple[Tensor, Tensor | None] = super().sample(logits, sampling_metadata, logprobs_mode_override)
            return sampled
        divisor = torch.where(temperature < GREEDY_BELOW, 1.0, temperature)
        logprobs = self.compute_logprobs(logits / divisor[:, None])
        return super().sample(logits, sampling_metadata, logprobs_mode_override)[0], logprobs


class WorkerExtension(RoutesExtension):
    """Methods of vLLM's worker that the engine calls by name."""

    def rlstab_seed(self, seed: int) -> None:
        """Seed the generators that requests without a seed of their own are sampled with."""
        torch.manual_seed(seed)

    def rlstab_whole_log_probs(self, whole: bool) -> None:
        """From now on, log-probs are those of the whole distribution, or of the one that is sampled from."""
        sampler = self.model_runner.sampler
        if not isinstance(sampler, Sampler):
            raise ConfigError(
                "VLLMEngine: truncation='ignore_tail' needs the sampler of vLLM's model runner V1; expected "
                f"{Sampler.__name__}, found {type(sampler).__name__}: use truncation='renormalise'"
            )
        if not isinstance(sampler, WholeSampler):
            sampler = self.model_runner.sampler = WholeSampler(sampler.logprobs_mode, sampler.use_fp64_gumbel)
        sampler.whole = whole
