"""Taps: what the watcher hangs on one trainer object. Each calls the host's own method and hands its result on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from rlstab.trainers import _batches
from rlstab.trainers._lag import VERSION, row_versions
from rlstab.trainers._observer import LossCall, Observer
from rlstab.trainers._watch_host import FusedCausalLMOutput, GeneratingTrainer, GRPOTrainer, RewardedTrainer

__all__ = ["Taps"]

HUNG_ON = (
    "training_step",
    "compute_loss",
    "_get_grad_norm",
    "log",
    "_generate_and_score_completions",
    "_calculate_rewards",
    "_save_checkpoint",
    "_load_optimizer_and_scheduler",
)
SCORES = ("log_probs", "entropy", "label_mask", "logits")


class Taps:
    """The host's training step, loss calls, gradient norm, generations and log lines, seen as they pass.

    Nothing is copied and nothing is waited for: what is kept are references to detached tensors of the step.

    Args:
        trainer: any trainer of transformers.
        observers: what is told.
        on_log: may add numbers to a line before the host logs it.
        on_checkpoint: told the folder of a checkpoint before the host writes it.
        on_resume: told the folder of a checkpoint that the host loads.
    """

    def __init__(
        self,
        trainer: Any,
        observers: Sequence[Observer],
        *,
        on_log: Callable[[dict[str, float]], None],
        on_checkpoint: Callable[[str], None],
        on_resume: Callable[[str], None],
    ) -> None:
        self._trainer = trainer
        self._observers = tuple(observers)
        self._on_log, self._on_checkpoint, self._on_resume = on_log, on_checkpoint, on_resume
        self._call: dict[str, Tensor] | None = None
        self._hidden: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self._rewards: Tensor | None = None
        self.losses: list[Tensor] = []
        self.last_loss: Tensor | None = None
        self.gradients: dict[str, Tensor] = {}
        self.grad_norm: Tensor | float | None = None
        self.forward: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def attach(self) -> None:
        """Hang them on."""
        trainer = self._trainer
        trainer.training_step = self._training_step(trainer.training_step)
        trainer.compute_loss = self._compute_loss(trainer.compute_loss)
        trainer._get_grad_norm = self._get_grad_norm(trainer._get_grad_norm)
        trainer.log = self._log(trainer.log)
        trainer._save_checkpoint = self._save_checkpoint(trainer._save_checkpoint)
        trainer._load_optimizer_and_scheduler = self._load(trainer._load_optimizer_and_scheduler)
        if isinstance(trainer, GeneratingTrainer):
            trainer._generate_and_score_completions = self._generate(trainer._generate_and_score_completions)
        if isinstance(trainer, RewardedTrainer):
            trainer._calculate_rewards = self._calculate_rewards(trainer._calculate_rewards)
        self._handles = [trainer.model.register_forward_hook(self._see_forward, with_kwargs=True)]
        if (whole := next((m for m in trainer.model.modules() if isinstance(m, PreTrainedModel)), None)) is not None:
            self._handles.append(whole.base_model.register_forward_hook(self._see_hidden))

    def detach(self) -> None:
        """Take them off: the trainer is as it was."""
        for name in HUNG_ON:
            vars(self._trainer).pop(name, None)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def open_step(self) -> None:
        """Forget the last step."""
        self.losses, self.gradients, self.grad_norm, self.forward = [], {}, None, None

    def _training_step(self, host: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def training_step(*args: Any, **kwargs: Any) -> Tensor:
            loss = host(*args, **kwargs)
            self.losses.append(loss)
            if self._trainer.accelerator.sync_gradients and not self.gradients:
                self.gradients = gradient_norms(self._trainer.model)
            return loss

        return training_step

    def _compute_loss(self, host: Callable[..., Any]) -> Callable[..., Any]:
        def compute_loss(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not model.training:
                return host(model, inputs, *args, **kwargs)
            self._call = {}
            try:
                result = host(model, inputs, *args, **kwargs)
            finally:
                outputs, self._call = self._call, None
                hidden, self._hidden = self._hidden, None
            loss = result[0] if isinstance(result, tuple) else result
            self.last_loss = loss.detach()
            call = LossCall(inputs=inputs, outputs=outputs, loss=loss.detach(), hidden=hidden)
            for observer in self._observers:
                observer.on_loss(call)
            return result

        return compute_loss

    def _see_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep what the forward with gradient of a loss call gives; references score without one."""
        if self._call is None or not torch.is_grad_enabled():
            return
        if not args:  # distillation calls the model by positions, through a forward of its own
            self.forward = (args, kwargs)
        if isinstance(output, FusedCausalLMOutput | Mapping):
            found = {name: output.get(name) for name in SCORES}
            self._call |= {name: value.detach() for name, value in found.items() if isinstance(value, Tensor)}

    def _see_hidden(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Keep a reference to the last hidden states until the loss call ends, which keeps them anyway."""
        if self._call is not None and torch.is_grad_enabled() and isinstance(output, Mapping):
            states = output.get("last_hidden_state")
            self._hidden = states.detach() if isinstance(states, Tensor) else None

    def _get_grad_norm(self, host: Callable[..., Any]) -> Callable[..., Any]:
        def get_grad_norm(*args: Any, **kwargs: Any) -> Any:
            self.grad_norm = host(*args, **kwargs)
            return self.grad_norm

        return get_grad_norm

    def _generate(self, host: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def generate(inputs: list[dict[str, Any]]) -> dict[str, Any]:
            output = host(inputs)
            if self._trainer.model.training:
                self._mark(output)
                for observer in self._observers:
                    observer.on_rollout(inputs, output)
            return output

        return generate

    def _calculate_rewards(self, host: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def calculate_rewards(*args: Any, **kwargs: Any) -> Tensor:
            self._rewards = host(*args, **kwargs)
            return self._rewards

        return calculate_rewards

    def _mark(self, output: dict[str, Any]) -> None:
        """Let reward, prompt and version of the sampler travel with each row: the host shuffles rows and forgets."""
        trainer, ids = self._trainer, output["completion_ids"]
        if self._rewards is not None and "rlstab_rewards" not in output:
            weights = trainer.reward_weights.to(self._rewards.device)
            rewards = torch.where(self._rewards.isnan().all(1), torch.nan, (self._rewards * weights).nansum(1))
            output["rlstab_rewards"] = _batches.own_rows(rewards, trainer.accelerator, len(ids), 0)
        if not isinstance(trainer, GRPOTrainer) or "rlstab_group" in output:
            return
        first = (trainer._step * trainer.accelerator.num_processes + trainer.accelerator.process_index) * len(ids)
        output["rlstab_group"] = (first + torch.arange(len(ids), device=ids.device)) // trainer.num_generations
        output[_batches.PART + VERSION] = row_versions((), ids, trainer.state.global_step)

    def _log(self, host: Callable[..., None]) -> Callable[..., None]:
        def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            self._on_log(logs)
            host(logs, *args, **kwargs)

        return log

    def _save_checkpoint(self, host: Callable[..., None]) -> Callable[..., None]:
        def save_checkpoint(model: nn.Module, trial: Any) -> None:
            trainer = self._trainer
            self._on_checkpoint(f"{trainer._get_output_dir(trial=trial)}/checkpoint-{trainer.state.global_step}")
            host(model, trial)

        return save_checkpoint

    def _load(self, host: Callable[..., None]) -> Callable[..., None]:
        def load_optimizer_and_scheduler(checkpoint: str | None) -> None:
            host(checkpoint)
            if checkpoint is not None:
                self._on_resume(checkpoint)

        return load_optimizer_and_scheduler


@torch.no_grad()
def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """Norm of every gradient, on its device; of the shard of this rank where weights are sharded.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer.weight.grad = torch.tensor([[3.0, 4.0]])
    >>> gradient_norms(layer)
    {'weight': tensor(5.)}
    """
    named = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    return {name: torch.linalg.vector_norm(local(grad).float()) for name, grad in named}


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be spread over ranks."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over ranks, which then all ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
