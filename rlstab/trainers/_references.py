"""Frozen policies that terms and signals compare with: loaded only when something asks for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rlstab.errors import ConfigError
from rlstab.trainers._host import (
    GRPOConfig,
    SyncRefModelCallback,
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    prepare_deepspeed,
    prepare_fsdp,
    use_adapter,
)

__all__ = ["References"]


class References:
    """The policies behind the sources `initial` and `moving`.

    `initial` is the policy as passed to the trainer: under PEFT the same model with its adapter off (or its adapter as
    passed), otherwise a copy. `moving` follows the policy as `sync_ref_model`, `ref_model_sync_steps` and
    `ref_model_mixup_alpha` of the host's arguments say.

    Args:
        sources: the references that terms run at every step.
        parked: those that only signals run now and then: they wait on the CPU.
        model: the policy as passed to the trainer.
        peft: whether adapters are trained.
    """

    def __init__(self, sources: set[str], parked: set[str], model: str | nn.Module, *, peft: bool) -> None:
        self.sources = sources | parked
        self.parked = set() if peft else parked - sources
        self.peft = peft
        #: Entered while a reference runs, by whoever has changed how the policy's forward works.
        self.aside: Callable[[], AbstractContextManager[None]] = nullcontext
        self._models: dict[str, Any] = {}
        if not peft and isinstance(model, nn.Module):
            self._models = {source: _copy(model, park=source in self.parked) for source in sorted(self.sources)}

    def prepare(self, trainer: Any, model: str | nn.Module, attach: Callable[[Any], None]) -> None:
        """Load what is missing, patch and place the copies like the policy; `attach` patches one for streaming."""
        if self.peft:
            return
        args: GRPOConfig = trainer.args
        for source in sorted(self.sources):
            if source not in self._models:
                self._models[source] = _load_like(trainer, str(model))
            reference = self._models[source].requires_grad_(False).eval()
            if source in self.parked:
                attach(reference)
                self._models[source] = reference.to("cpu")
                continue
            if args.disable_dropout:
                disable_dropout_in_model(reference)
            add_fused_lm_head(reference, temperature=args.temperature, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32)
            attach(reference)
            self._models[source] = _place(reference, trainer)
        if "moving" in self._models:
            trainer.add_callback(
                SyncRefModelCallback(ref_model=self._models["moving"], accelerator=trainer.accelerator)
            )

    @contextmanager
    def use(self, source: str, policy: nn.Module, accelerator: Any) -> Iterator[nn.Module]:
        """The model to run for `source`; under PEFT the policy, with its adapter switched while the block runs."""
        if source not in self.sources:
            raise ConfigError(f"no reference {source!r} was loaded: the trainer holds {sorted(self.sources)}")
        unwrapped = accelerator.unwrap_model(policy)
        adapter: Any = nullcontext()
        if self.peft:
            adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        with adapter, torch.no_grad(), self.aside():
            if source in self.parked:
                yield self._models[source].to(accelerator.device)
                self._models[source].to("cpu")
            else:
                yield policy if self.peft else self._models[source]

    def give_up_parked(self) -> set[str]:
        """Drop the parked references, where the policy's weights are spread over ranks; returns which."""
        dropped, self.parked = self.parked, set()
        self.sources -= dropped
        for source in dropped:
            self._models.pop(source, None)
        return dropped

    def load_trained_adapter(self, checkpoint: str, policy: Any) -> None:
        """Load the policy's own adapter: where there is a reference adapter, the host loads that one only."""
        if self.peft and "ref" in policy.peft_config:
            policy.load_adapter(checkpoint, policy.active_adapter, is_trainable=True)

    def state_dict(self, accelerator: Any) -> dict[str, Tensor]:
        """The weights of the moving reference, which no other file of a checkpoint holds."""
        if "moving" not in self._models:
            return {}
        return dict(accelerator.unwrap_model(self._models["moving"]).state_dict())

    def load_state_dict(self, state: dict[str, Tensor], accelerator: Any) -> None:
        """Put the moving reference back to where the checkpoint left it."""
        if "moving" in self._models:
            accelerator.unwrap_model(self._models["moving"]).load_state_dict(state, strict=False)


def _copy(model: nn.Module, *, park: bool) -> nn.Module:
    """A copy that runs its own weights.

    Trainers patch `forward` of a model they are given, and in a copy such a patch still calls the original's. So
    references are copied before the host patches the policy, and without the patch of a trainer that had it before.
    """
    memo: dict[int, Tensor] = {}
    if park:  # given to deepcopy as copies made already, tensors never double on the device
        memo = {id(buffer): buffer.cpu().clone() for buffer in model.buffers()}
        memo |= {id(p): nn.Parameter(p.detach().cpu().clone(), p.requires_grad) for p in model.parameters()}
    copied = copy.deepcopy(model, memo)
    if "_hf_hook" not in vars(copied):  # accelerate's hooks, which move inputs between devices, are copied rightly
        vars(copied).pop("forward", None)
    return copied


def _load_like(trainer: Any, path: str) -> Any:
    kwargs = {"dtype": trainer.model.dtype, "attn_implementation": trainer.model.config._attn_implementation}
    kwargs |= dict(trainer.args.model_init_kwargs or {})
    kwargs.setdefault("trust_remote_code", trainer.args.trust_remote_code)
    if trainer.args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    return create_model_from_path(path, **kwargs)


def _place(reference: Any, trainer: Any) -> Any:
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(reference, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(reference, trainer.accelerator)
    return trainer.accelerator.prepare_model(reference, evaluation_mode=True)
