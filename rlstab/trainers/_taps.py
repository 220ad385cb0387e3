"""Taps: what the watcher hangs on one trainer object. Each calls the host's own method and hands its result on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from rlstab.trainers._observer import LossCall, Observer
from rlstab.trainers._watch_host import FusedCausalLMOutput, GeneratingTrainer, GRPOTrainer

__all__ = ["Taps"]

SCORES = ("log_probs", "entropy", "label_mask", "logits")


class Taps:
    """The host's training step, loss calls, gradient norm, generations and log lines, seen as they pass.

    Nothing is copied and nothing is waited for: what is kept are references to detached tensors of the step.

    Args:
        trainer: any trainer of transformers.
        observers: what is told.
        on_log: may add numbers to a line before the host logs it.
    """

    def __init__(
        self, trainer: Any, observers: Sequence[Observer], on_log: Callable[[dict[str, float]], None] | None = None
    ) -> None:
        self._trainer = trainer
        self._observers = tuple(observers)
        self._on_log = on_log
        self._call: dict[str, Tensor] | None = None
        self._handle: RemovableHandle | None = None
        self.losses: list[Tensor] = []
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
        if isinstance(trainer, GeneratingTrainer):
            trainer._generate_and_score_completions = self._generate(trainer._generate_and_score_completions)
        self._handle = trainer.model.register_forward_hook(self._see_forward, with_kwargs=True)

    def detach(self) -> None:
        """Take them off: the trainer is as it was."""
        for name in ("training_step", "compute_loss", "_get_grad_norm", "log", "_generate_and_score_completions"):
            vars(self._trainer).pop(name, None)
        if self._handle is not None:
            self._handle.remove()

    def open_step(self) -> None:
        """Forget the last step."""
        self.losses, self.gradients, self.grad_norm, self.forward = [], {}, None, None

    def _training_step(self, host: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def training_step(*args: Any, **kwargs: Any) -> Tensor:
            loss = host(*args, **kwargs)
            self.losses.append(loss)
            if self._trainer.accelerator.sync_gradients:
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
            loss = result[0] if isinstance(result, tuple) else result
            call = LossCall(inputs=inputs, outputs=outputs, loss=loss.detach())
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

    def _get_grad_norm(self, host: Callable[..., Any]) -> Callable[..., Any]:
        def get_grad_norm(*args: Any, **kwargs: Any) -> Any:
            self.grad_norm = host(*args, **kwargs)
            return self.grad_norm

        return get_grad_norm

    def _generate(self, host: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def generate(inputs: list[dict[str, Any]]) -> dict[str, Any]:
            output = host(inputs)
            if self._trainer.model.training:
                self._mark_groups(output)
                for observer in self._observers:
                    observer.on_rollout(inputs, output)
            return output

        return generate

    def _mark_groups(self, output: dict[str, Any]) -> None:
        """Let the prompt of a row travel with it: the host shuffles rows and forgets."""
        trainer = self._trainer
        if not isinstance(trainer, GRPOTrainer) or "rlstab_group" in output:
            return
        ids = output["completion_ids"]
        first = (trainer._step * trainer.accelerator.num_processes + trainer.accelerator.process_index) * len(ids)
        output["rlstab_group"] = (first + torch.arange(len(ids), device=ids.device)) // trainer.num_generations

    def _log(self, host: Callable[..., None]) -> Callable[..., None]:
        def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if self._on_log is not None:
                self._on_log(logs)
            host(logs, *args, **kwargs)

        return log


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
