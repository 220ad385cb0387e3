"""Everything that a watch measures: what hooks, taps and observers give, and what follows from it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from rlstab.errors import ConfigError
from rlstab.probes import Probe, gradient_spectra
from rlstab.schema import signal
from rlstab.trainers._completions import Completions, Writing
from rlstab.trainers._derived import Derived
from rlstab.trainers._grpo import StableGRPOTrainer
from rlstab.trainers._health import HostMetrics, adam_health
from rlstab.trainers._observer import ImplicitReward, Observer, SamplerMismatch
from rlstab.trainers._sample_gradients import SampleGradients
from rlstab.trainers._signals import is_empty
from rlstab.trainers._taps import Taps, gathered, gradient_norms
from rlstab.trainers._watch_host import DPOTrainer, GeneratingTrainer, RewardedTrainer

__all__ = ["Measuring"]

HOST_LOGS = {"train/grad_norm"}
SPECTRA = 5  # turns from one look at the gradients' spectra to the next
JOINED: dict[str, Callable[[list[float]], float]] = {
    "mean": fmean,
    "sum": sum,
    "max": max,
    "min": min,
    "last": operator.itemgetter(-1),
}


class Measuring:
    """The signals of a run, step by step; the same numbers on all ranks.

    Args:
        every: optimizer steps between measurements that cost something.
        probes: measurements inside the model.
        observers: measurements on loss calls and rollouts.
    """

    def __init__(self, every: int, probes: Sequence[Probe], observers: Sequence[Observer]) -> None:
        self._every = every
        self._probes, self._observers = tuple(probes), tuple(observers)
        self._trainer: Any = None
        self.taps: Taps | None = None
        self._host: HostMetrics | None = None
        self._derived = Derived()
        self._held: dict[str, Tensor] = {}
        self._window: dict[str, list[float]] = {}
        self.new: dict[str, float] = {}

    def attach(self, trainer: Any, on_checkpoint: Callable[[str], None], on_resume: Callable[[str], None]) -> None:
        """See a trainer whole.

        Args:
            trainer: any trainer of transformers.
            on_checkpoint: told the folder of a checkpoint before the host writes it.
            on_resume: told the folder of a checkpoint that the host loads.
        """
        self._trainer = trainer
        self._observers = (*_own_observers(trainer), *self._observers)
        self._host = HostMetrics(trainer)
        self.taps = Taps(
            trainer, self._observers, on_log=self.add_to_log, on_checkpoint=on_checkpoint, on_resume=on_resume
        )
        self.taps.attach()
        if isinstance(trainer, StableGRPOTrainer):
            trainer._beside = self._inside

    def detach(self) -> None:
        """Leave trainer and model as they were."""
        if self.taps is not None:
            self.taps.detach()
        if isinstance(self._trainer, StableGRPOTrainer):
            self._trainer._beside = None
        self.let_go()

    def begin(self, model: nn.Module) -> None:
        """Look into the model that is trained."""
        for probe in self._probes:
            probe.attach(model)

    def let_go(self) -> None:
        """Look into the model no longer."""
        for probe in self._probes:
            probe.detach()

    def open_step(self, step: int) -> None:
        """Forget the last step; what costs something gets ready if it is its turn."""
        if self.taps is not None and self._host is not None:
            self.taps.open_step()
            self._host.open_step()
        if self._is_turn(step):
            for probe in self._probes:
                probe.arm()
            for observer in self._observers:
                observer.arm()

    def _is_turn(self, step: int, turns: int = 1) -> bool:
        return (step - 1) % (self._every * turns) == 0

    def see_update(self, step: int, optimizer: Any) -> None:
        """Look at the update that was made; its numbers leave the device with those of the next step."""
        if self._is_turn(step):
            self._held = adam_health(optimizer)

    def close_step(self, step: int, model: nn.Module, args: Any) -> dict[str, float]:
        """The numbers of the step: one wait for the device, and the same on all ranks."""
        brought = self._host.collect() if self._host is not None else {}
        own = _numbers(self._left(step, model, brought), args.device)
        values = {**brought, **own}
        if args.world_size > 1:
            values = broadcast(values)
        derived = self._derived.update(step, values, turn=self._is_turn(step))
        values |= derived
        mine = own.keys() | derived.keys()
        for key in mine - HOST_LOGS:
            self._window.setdefault(key, []).append(values[key])
        self.new = {key: values[key] for key in mine}
        return values

    def examined(self, values: Mapping[str, float]) -> dict[str, float]:
        """What follows from the numbers of an evaluation."""
        return self._derived.examined(values)

    def _left(self, step: int, model: nn.Module, brought: dict[str, float]) -> dict[str, Tensor]:
        """What is still on the device: nothing, as a rule, where the trainer has brought it with its own numbers."""
        if not isinstance(self._trainer, StableGRPOTrainer):
            return self._tensors(step, model)
        self._trainer._metrics["train"].pop("train/grad_norm", None)  # the host logs its own
        return {} if "train/grad_norm" in brought else self._norm_of_host()

    def _norm_of_host(self) -> dict[str, Tensor]:
        norm = self.taps.grad_norm if self.taps is not None else None
        return {} if norm is None else {"train/grad_norm": torch.as_tensor(norm)}

    def _inside(self) -> dict[str, Tensor]:
        """The tensors of the step that a `StableGRPOTrainer` is about to close, within its training step."""
        trainer = self._trainer
        assert self.taps is not None
        assert self.taps.last_loss is not None
        self.taps.losses.append(self.taps.last_loss)
        self.taps.gradients = gradient_norms(trainer.model)
        tensors = self._tensors(trainer.state.global_step + 1, trainer.model)
        self.taps.losses.pop()
        whole = trainer.accelerator.scaler is None and not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)
        if whole and (norms := list(self.taps.gradients.values())):
            tensors["train/grad_norm"] = torch.linalg.vector_norm(torch.stack(norms))
        else:
            tensors.pop("train/grad_norm", None)
        return tensors

    def _tensors(self, step: int, model: nn.Module) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for probe in self._probes:
            tensors |= probe.collect()
        for observer in self._observers:
            tensors |= observer.collect()
        tensors |= self._held
        self._held = {}
        if self._is_turn(step, SPECTRA):
            tensors |= gradient_spectra(model)
        return tensors | (self._of_host() if self.taps is not None else _of_gradient(gradient_norms(model)))

    def _of_host(self) -> dict[str, Tensor]:
        """Loss and gradient norm of the step, before the host hides what is not finite."""
        assert self.taps is not None
        accelerator: Accelerator = self._trainer.accelerator
        loss = torch.stack([loss.float() for loss in self.taps.losses]).sum()
        tensors = {"step/loss": accelerator.reduce(loss, reduction="mean"), **_of_gradient(self.taps.gradients)}
        return tensors | self._norm_of_host()

    def add_to_log(self, logs: dict[str, float]) -> None:
        """Add what was measured since the last line of the host's log, joined as the schema says."""
        window, self._window = self._window, {}
        for key, values in window.items():
            known = [value for value in values if not math.isnan(value)] or values
            logs.setdefault(key, JOINED[signal(key).reduction](known))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run, or one that goes back, needs to go on; made of JSON's types."""
        return {
            "probes": [probe.state_dict() for probe in self._probes],
            "observers": [observer.state_dict() for observer in self._observers],
            "derived": self._derived.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ConfigError: it is that of other probes or observers.
        """
        for name, parts in (("probes", self._probes), ("observers", self._observers)):
            if len(state[name]) != len(parts):
                raise ConfigError(
                    f"Watch.{name}: the state was saved with {len(state[name])} of them, now there are {len(parts)}: "
                    "resume with the same ones"
                )
        for part, held in zip(self._probes, state["probes"], strict=True):
            part.load_state_dict(held)
        for observer, held in zip(self._observers, state["observers"], strict=True):
            observer.load_state_dict(held)
        self._derived.load_state_dict(state["derived"])


def broadcast(values: dict[str, float]) -> dict[str, float]:
    """The numbers of the first process, on all of them."""
    held = [values]
    broadcast_object_list(held)
    return held[0]


def _own_observers(trainer: Any) -> list[Observer]:
    """What can be seen of a kind of trainer."""
    accelerator, own = trainer.accelerator, list[Observer]()
    if isinstance(trainer, GeneratingTrainer):
        rewarded = isinstance(trainer, RewardedTrainer)
        own.append(Completions(accelerator, trainer.num_generations if rewarded else 1))
        size = trainer.model.config.get_text_config().vocab_size
        own.append(Writing(accelerator, trainer.processing_class, size))
        if not isinstance(trainer, StableGRPOTrainer):
            own.append(SamplerMismatch(accelerator, lambda: trainer.state.global_step))
            own.append(ImplicitReward(accelerator))
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if isinstance(trainer, (*RewardedTrainer, DPOTrainer)) and not sharded:
        own.append(SampleGradients(trainer))
    return own


def _numbers(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, float]:
    """The values of 0-dim tensors, with one wait for the device."""
    values = [gathered(value.detach()).float().to(device) for value in tensors.values()]
    numbers = zip(tensors, torch.stack(values).tolist() if values else [], strict=True)
    return {key: value for key, value in numbers if not is_empty(key, value)}


def _of_gradient(norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How many gradients are not finite; nothing where there are none, as when the step was left out already."""
    if not norms:
        return {}
    return {"step/bad_gradients": (~torch.stack(list(norms.values())).isfinite()).sum()}
