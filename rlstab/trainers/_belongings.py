"""What belongs to a run beside weights and optimizer: controllers, resets, and references that have moved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from rlstab.errors import ConfigError
from rlstab.trainers._grpo import StableGRPOTrainer
from rlstab.trainers._guard import Snapshot
from rlstab.trainers._sft import TrustRegionSFTTrainer
from rlstab.trainers._taps import local
from rlstab.trainers._under import under

__all__ = ["belongings_of", "check_belongings", "put_back"]

MOVING = "moving/"


def check_belongings(trainer: Any) -> None:
    """Raise `ConfigError` where a reference has moved by the time of going back, and cannot be moved back in place.

    Args:
        trainer: any; it need not be prepared.
    """
    in_parts = is_deepspeed_zero3_enabled() or (trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2)
    if in_parts and isinstance(trainer, StableGRPOTrainer) and "moving" in trainer._references.own:
        raise ConfigError(
            "guard: the reference 'moving' (args.sync_ref_model) is in parts that FSDP1 or ZeRO-3 alone put together, "
            "and would stay where it has moved to: use ZeRO-2 or DDP, or compare with 'initial'"
        )


def belongings_of(trainer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, on the CPU, and values made of JSON's types; nothing for a trainer of another kind."""
    if isinstance(trainer, StableGRPOTrainer):
        values = {"objective": trainer.objective.state_dict()}
        if trainer._reset is not None:
            values["reset"] = trainer._reset.state_dict()
        tensors = trainer._references.state_dict(trainer.accelerator)
        # Earlier policies (`Snapshots`) are on the CPU and never written to: snapshots may share them.
        return {name: _copied(t) if name.startswith(MOVING) else t for name, t in tensors.items()}, values
    if isinstance(trainer, TrustRegionSFTTrainer):
        kept = trainer._snapshots.items()
        tensors = {f"{source}/{name}": t for source, policy in kept for name, t in policy.state_dict().items()}
        return {name: _copied(t) for name, t in tensors.items()}, {"objective": trainer.objective.state_dict()}
    return {}, {}


@torch.no_grad()
def put_back(trainer: Any, snapshot: Snapshot) -> None:
    """Give a trainer what `belongings_of` took."""
    tensors, values = snapshot.beside, snapshot.extra
    if isinstance(trainer, StableGRPOTrainer):
        trainer.objective.load_state_dict(values["objective"])
        if trainer._reset is not None:
            trainer._reset.load_state_dict(values["reset"])
        for name, tensor in trainer._references.state_dict(trainer.accelerator).items():
            if name.startswith(MOVING):
                local(tensor).copy_(tensors[name])
        trainer._references.snapshots.load_state_dict(tensors)
        trainer._drift.forget()
    if isinstance(trainer, TrustRegionSFTTrainer):
        trainer.objective.load_state_dict(values["objective"])
        for source, policy in trainer._snapshots.items():
            policy.load_state_dict(under(f"{source}/", tensors))


def _copied(tensor: Tensor) -> Tensor:
    return local(tensor).detach().to("cpu", copy=True)
