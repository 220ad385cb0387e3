"""Policies that terms and signals compare with, none of which is trained: kept only when something asks for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

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
from rlstab.trainers._snapshots import Snapshots
from rlstab.trainers._teacher import TeacherServer
from rlstab.trainers._under import under

__all__ = ["OWN", "References", "Teacher"]

OWN = ("initial", "moving")  # made of the policy as passed

#: What answers for a source of the user's own: a model, its path, or a server.
Teacher = str | nn.Module | TeacherServer


class References:
    """The policies behind all sources but the policy's own passes.

    `initial` is the policy as passed to the trainer: under PEFT the same model with its adapter off (or its adapter as
    passed), otherwise a copy. `moving` follows the policy as `sync_ref_model`, `ref_model_sync_steps` and
    `ref_model_mixup_alpha` of the host's arguments say. `anchor` and `previous(k)` are earlier weights of the policy
    (`Snapshots`); teachers are models of their own, or servers.

    Args:
        sources: the references that terms run at every step.
        parked: those that only signals run now and then: they wait on the CPU.
        model: the policy as passed to the trainer.
        peft: whether adapters are trained.
        teachers: who answers for the sources of other names.
    """

    def __init__(
        self,
        sources: set[str],
        parked: set[str],
        model: str | nn.Module,
        *,
        peft: bool,
        teachers: Mapping[str, Teacher] | None = None,
    ) -> None:
        self.sources = sources | parked
        self.parked = set() if peft else parked - sources
        self.peft = peft
        teachers = {name: teacher for name, teacher in (teachers or {}).items() if name in sources}
        #: Teachers that are asked for log-probs over HTTP.
        self.servers = {name: teacher for name, teacher in teachers.items() if isinstance(teacher, TeacherServer)}
        self._teachers: dict[str, Any] = {k: teacher for k, teacher in teachers.items() if k not in self.servers}
        self.snapshots = Snapshots(self.sources)
        #: Entered while a reference runs, by whoever has changed how the policy's forward works.
        self.aside: Callable[[], AbstractContextManager[None]] = nullcontext
        self._models: dict[str, Any] = {}
        if not peft and isinstance(model, nn.Module):
            self._models = {source: _copy(model, park=source in self.parked) for source in sorted(self.own)}

    @property
    def own(self) -> set[str]:
        """Those that are the policy as passed, or follow it."""
        return self.sources & set(OWN)

    def prepare(self, trainer: Any, model: str | nn.Module, attach: Callable[[Any], None]) -> None:
        """Load what is missing, patch and place the copies like the policy; `attach` patches one for streaming."""
        self._check_teachers(trainer)
        self.snapshots.prepare(trainer)
        paths: dict[str, Any] = {} if self.peft else dict.fromkeys(sorted(self.own), model)
        for source, path in (paths | self._teachers).items():
            if source not in self._models:
                self._models[source] = _load_like(trainer, path) if isinstance(path, str) else path
            self._models[source] = self._prepared(source, trainer, attach)
        if "moving" in self._models:
            trainer.add_callback(
                SyncRefModelCallback(ref_model=self._models["moving"], accelerator=trainer.accelerator)
            )

    def _prepared(self, source: str, trainer: Any, attach: Callable[[Any], None]) -> Any:
        args: GRPOConfig = trainer.args
        reference = self._models[source].requires_grad_(False).eval()
        if source in self.parked:
            attach(reference)
            return reference.to("cpu")
        if args.disable_dropout:
            disable_dropout_in_model(reference)
        add_fused_lm_head(reference, temperature=args.temperature, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32)
        attach(reference)
        return _place(reference, trainer)

    def _check_teachers(self, trainer: Any) -> None:
        """Refuse teachers over other tokens than the policy's, and servers that do not answer."""
        for server in self.servers.values():
            server.check(trainer._tokenizer, temperature=trainer.args.temperature)
        own = trainer._tokenizer.get_vocab()
        # A tokenizer may know a token that its own model lacks, and never use it.
        used = min(len(own), trainer.model.get_input_embeddings().num_embeddings)
        for name, teacher in self._teachers.items():
            if isinstance(teacher, str):
                theirs = AutoTokenizer.from_pretrained(teacher).get_vocab()
                differing = [token for token, index in own.items() if theirs.get(token) != index]
                if differing:
                    raise ConfigError(
                        f"teachers[{name!r}]: {teacher} has another vocabulary, {differing[0]!r} is token "
                        f"{theirs.get(differing[0])} there and {own[differing[0]]} here; expected the policy's tokens"
                    )
            elif teacher.get_input_embeddings().num_embeddings < used:
                raise ConfigError(
                    f"teachers[{name!r}]: has {teacher.get_input_embeddings().num_embeddings} tokens, the policy's "
                    f"tokenizer {used}; expected a model with the policy's tokens"
                )

    @contextmanager
    def use(self, source: str, policy: nn.Module, accelerator: Any) -> Iterator[nn.Module]:
        """The model to run for `source`; under PEFT the policy, with its adapter switched while the block runs."""
        if source not in self.sources:
            raise ConfigError(f"no reference {source!r} was loaded: the trainer holds {sorted(self.sources)}")
        with self._in_place(source, accelerator.unwrap_model(policy)), torch.no_grad(), self.aside():
            if source in self.parked:
                yield self._models[source].to(accelerator.device)
                self._models[source].to("cpu")
            else:
                yield self._models.get(source, policy)

    def _in_place(self, source: str, policy: Any) -> AbstractContextManager[Any]:
        """While a reference that is the policy itself, with other weights, runs."""
        if source in self.snapshots.sources:
            return self.snapshots.use(source, policy)
        if source in self._models:
            return nullcontext()
        adapter: AbstractContextManager[Any] = use_adapter(
            policy, adapter_name="ref" if "ref" in policy.peft_config else None
        )
        return adapter

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
        """The weights of references that have moved, which no other file of a checkpoint holds."""
        moving: dict[str, Tensor] = {}
        if "moving" in self._models:
            moving = accelerator.unwrap_model(self._models["moving"]).state_dict()
        return {f"moving/{name}": value for name, value in moving.items()} | self.snapshots.state_dict()

    def load_state_dict(self, state: dict[str, Tensor], accelerator: Any) -> None:
        """Put the references that have moved back to where the checkpoint left them."""
        if "moving" in self._models:
            moving = under("moving/", state)
            accelerator.unwrap_model(self._models["moving"]).load_state_dict(moving, strict=False)
        self.snapshots.load_state_dict(state)


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
