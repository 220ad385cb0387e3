"""Every host symbol that rlstab relies on, checked when `rlstab.trainers` is imported."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.metadata import version as installed_version
from typing import Any

from packaging.version import Version

from rlstab.errors import HostError

SUPPORTED = (Version("1.16"), Version("1.17"))


def check_version(version: str) -> None:
    """Raise `HostError` unless this version of TRL is one that rlstab was tested with.

    >>> check_version("1.15.0")
    Traceback (most recent call last):
    ...
    rlstab.errors.HostError: trl 1.15.0 is installed, rlstab needs trl >= 1.16, < 1.17: pip install 'trl>=1.16,<1.17'
    """
    low, high = SUPPORTED
    if not low <= Version(version) < high:
        raise HostError(
            f"trl {version} is installed, rlstab needs trl >= {low}, < {high}: pip install 'trl>={low},<{high}'"
        )


check_version(installed_version("trl"))  # before the imports: another version may lack what they name

from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import (
    FusedCausalLMOutput,
    RepeatSampler,
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    maybe_gather_lm_head_ctx,
    split_pixel_values_by_grid,
    use_adapter,
)

__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "FusedCausalLMOutput",
    "GRPOConfig",
    "GRPOTrainer",
    "RepeatSampler",
    "SFTConfig",
    "SFTTrainer",
    "SyncRefModelCallback",
    "add_fused_lm_head",
    "check_seams",
    "check_version",
    "create_model_from_path",
    "disable_dropout_in_model",
    "disable_gradient_checkpointing",
    "load_balancing_loss_func",
    "maybe_gather_lm_head_ctx",
    "prepare_deepspeed",
    "prepare_fsdp",
    "split_pixel_values_by_grid",
    "use_adapter",
]

SEAMS: dict[str, tuple[str, ...]] = {
    "_compute_loss": ("model", "inputs"),
    "_prepare_inputs": ("generation_batch",),
    "_generate": ("prompts",),
    "_generate_and_score_completions": ("inputs",),
    "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"),
    "_tool_call_loop": ("prompts", "prompt_ids", "completion_ids", "completions", "logprobs"),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
    "_get_grad_norm": ("model", "grad_norm"),
    "_get_train_sampler": ("dataset",),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_save_checkpoint": ("model", "trial"),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
}


def check_seams(trainer: type[Any], seams: Mapping[str, tuple[str, ...]] = SEAMS) -> None:
    """Raise `HostError` unless the host's trainer has every method that rlstab overrides, with its parameters.

    >>> check_seams(GRPOTrainer)
    """
    for name, parameters in seams.items():
        method = inspect.getattr_static(trainer, name, None)
        if method is None:
            raise HostError(f"trl's {trainer.__name__} has no method {name!r}, which rlstab overrides")
        found = inspect.signature(inspect.unwrap(method)).parameters
        missing = [parameter for parameter in parameters if parameter not in found]
        if missing:
            raise HostError(f"trl's {trainer.__name__}.{name} lacks the parameters {missing}, which rlstab relies on")


check_seams(GRPOTrainer)
