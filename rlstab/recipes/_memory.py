"""How much memory of a device a run will need, roughly, before anything is loaded."""

import os
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from rlstab.recipes._models import LoRA
from rlstab.trainers import GRPOConfig, SFTConfig

__all__ = ["Device", "Memory", "ModelSize", "Sharding", "amount", "sampling_memory", "training_memory"]

GIB, MIB = 2**30, 2**20
PROMPT_TOKENS = 256
UNCUT = 1024
VALUES_PER_TOKEN = 17

#: Values that an optimizer keeps per trained parameter, in the precision of the parameter; two for all others (Adam).
MOMENTS = {"sgd": 0.0, "adafactor": 0.0, "adagrad": 1.0, "lion": 1.0, "rmsprop": 1.0}


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What memory depends on in a model.

    Args:
        parameters: number of parameters, adapters included.
        trained: how many of them are trained.
        bytes_each: bytes of a parameter.
        layers: number of transformer blocks.
        hidden: width of the residual stream.
        cached: values that a block keeps of each token while it samples: keys and values.
    """

    parameters: int
    trained: int
    bytes_each: int
    layers: int
    hidden: int
    cached: int

    @classmethod
    def of(cls, model: PreTrainedModel, adapter: LoRA | None = None) -> Self:
        """That of a model, on the meta device or on another, with the adapter that will be trained.

        Example:
            >>> from rlstab.recipes import TinyModel
            >>> from rlstab.tasks import SortDigits
            >>> model = TinyModel().outline(SortDigits())
            >>> ModelSize.of(model).trained, ModelSize.of(model, LoRA(rank=2)).trained
            (83520, 4352)
        """
        config: dict[str, Any] = model.config.get_text_config().to_dict()
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        bytes_each = next(model.parameters()).element_size()
        trained: nn.Module = model
        if adapter is not None:
            outline: Any = deepcopy(model)
            with torch.device("meta"):
                trained = get_peft_model(outline.to("meta"), adapter.config())
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in trained.parameters()]
        return cls(
            parameters=sum(size for size, _ in sizes),
            trained=sum(size for size, learns in sizes if learns),
            bytes_each=bytes_each,
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            cached=2 * (config.get("num_key_value_heads") or heads) * width,
        )


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Over how many processes a run spreads what it holds.

    Args:
        weights: those that share the weights.
        gradients: those that share the gradients.
        optimizer: those that share the optimizer's state.
    """

    weights: int = 1
    gradients: int = 1
    optimizer: int = 1

    @classmethod
    def of_launch(cls) -> Self:
        """As `accelerate launch` has set it up: FSDP and ZeRO-3 share all, ZeRO-2 does not share the weights."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
            return cls(weights=world, gradients=world, optimizer=world)
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
            stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
            return cls(
                weights=world if stage >= 3 else 1,
                gradients=world if stage >= 2 else 1,
                optimizer=world if stage >= 1 else 1,
            )
        return cls()


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a process computes on.

    Args:
        name: what it is.
        memory: its memory in bytes.
    """

    name: str
    memory: int

    @classmethod
    def here(cls) -> Self:
        """The GPU of this process, or the machine's own memory, of which each process has its part."""
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
            return cls(name=properties.name, memory=properties.total_memory)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return cls(name="this machine", memory=memory // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclass(frozen=True, kw_only=True)
class Memory:
    r"""Bytes that a process needs on its device, by what for; a rough estimate, about right within a factor of two.

    With $P$ parameters of $b$ bytes, $T$ of them trained, $L$ blocks of width $h$, $R$ rows of a forward pass, and
    $S = $ `max_completion_length` + 256 tokens of a row (256 stand for the prompt, whose length is not known before the
    data is; in supervised training $S = $ `max_length`, 1024 where nothing is cut):

    - `weights`: $P b$ over the processes that share them;
    - `gradients`: $T b$ likewise;
    - `optimizer`: $m T b$ likewise, with $m = 2$ moments for Adam (1 for Lion, 0 for SGD and Adafactor), $2 T$ for
      optimizers of 8 bits;
    - `references`: $P b$ for each model beside the policy, over the processes that share weights; none where an adapter
      is switched off instead, for earlier weights of the policy, which wait in the CPU's memory, and for servers;
    - `activations`: $17\,a\,h\,L\,R\,S$ with $a$ bytes of an activation: 17 values of width $h$ are kept per token and
      block (34 bytes in half precision), attention itself computing in blocks. With gradient checkpointing
      $a\,h\,(L + 17)\,R\,S$: the input of each block, and one block at a time. Logits are computed in portions and
      not counted;
    - `sampling`: $a\,c\,L\,G\,S$ of keys and values ($c$ per token and block) for the $G$ completions sampled at once,
      and the weights of an engine's own copy of the policy; or the share of the device that vLLM takes.

    Args:
        weights: bytes of the policy's weights.
        gradients: bytes of gradients.
        optimizer: bytes of the optimizer's state.
        references: bytes of the models compared with.
        activations: bytes kept from forward to backward.
        sampling: bytes that are needed to sample.

    Reference: Reducing Activation Recomputation in Large Transformer Models, https://arxiv.org/abs/2205.05198 (its
    table 2 without the attention scores).
    """

    weights: float
    gradients: float
    optimizer: float
    references: float
    activations: float
    sampling: float

    @property
    def total(self) -> float:
        """What is held at the same time: sampling and training take turns."""
        return self.weights + self.optimizer + self.references + max(self.gradients + self.activations, self.sampling)

    def __str__(self) -> str:
        parts = [f"{name} {amount(size)}" for name, size in vars(self).items() if size]
        return f"about {amount(self.total)} ({', '.join(parts)})"


def amount(size: float) -> str:
    """Bytes as people read them.

    >>> amount(83_520 * 4), amount(15e9)
    ('0.32 MiB', '14 GiB')
    """
    value, unit = (size / GIB, "GiB") if size >= GIB else (size / MIB, "MiB")
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"


def training_memory(
    size: ModelSize, args: GRPOConfig | SFTConfig, sharding: Sharding, *, references: float
) -> dict[str, float]:
    """The parts of `Memory` that training needs.

    Args:
        size: the policy.
        args: the host's arguments.
        sharding: what is spread over processes.
        references: bytes of the models compared with, over all processes.
    """
    per_token = VALUES_PER_TOKEN * size.layers
    if args.gradient_checkpointing:
        per_token = VALUES_PER_TOKEN + size.layers
    tokens = args.per_device_train_batch_size * _row_tokens(args)
    return {
        "weights": size.parameters * size.bytes_each / sharding.weights,
        "gradients": size.trained * size.bytes_each / sharding.gradients,
        "optimizer": _optimizer_bytes(size, args) / sharding.optimizer,
        "references": references / sharding.weights,
        "activations": per_token * tokens * size.hidden * activation_bytes(size, args),
    }


def sampling_memory(
    size: ModelSize, args: GRPOConfig, *, slots: int, copied: Literal["float32", "bfloat16", "float16"] | None = None
) -> float:
    """What sampling with transformers needs: keys and values, and a copy of the policy in another precision.

    Args:
        size: the policy.
        args: the host's arguments.
        slots: completions that are sampled at a time.
        copied: precision of the copy, if there is one.
    """
    each = activation_bytes(size, args) if copied is None else vars(torch)[copied].itemsize
    tokens = slots * _row_tokens(args)
    weights = 0 if copied is None else size.parameters * each
    return float(weights + tokens * size.cached * size.layers * each)


def _row_tokens(args: GRPOConfig | SFTConfig) -> int:
    """The longest row, roughly."""
    if isinstance(args, SFTConfig):
        return args.max_length or UNCUT
    return int(args.max_completion_length) + PROMPT_TOKENS


def activation_bytes(size: ModelSize, args: GRPOConfig | SFTConfig) -> int:
    """Bytes of an activation: two in mixed or half precision."""
    return min(size.bytes_each, 2 if args.bf16 or args.fp16 else 4)


def _optimizer_bytes(size: ModelSize, args: GRPOConfig | SFTConfig) -> float:
    name = str(args.optim).lower()
    if "8bit" in name:
        return 2.0 * size.trained
    moments = next((count for start, count in MOMENTS.items() if start in name), 2.0)
    return moments * size.trained * size.bytes_each
