"""`Watch`: signals, detectors, alarms and actions on any trainer of transformers, as a callback or attached whole."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple, Self

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from rlstab.errors import ConfigError
from rlstab.losses import Objective
from rlstab.monitors import Alarm, Due, Monitor, Notify, RollBack, Rule, Scale, SkipStep, Stop, default_rules
from rlstab.probes import Probe
from rlstab.record import RunFolder
from rlstab.schema import signal
from rlstab.trainers._actions import Messenger, Scaling, alert_trackers, check_scale
from rlstab.trainers._births import trace
from rlstab.trainers._grpo import StableGRPOTrainer
from rlstab.trainers._guard import Guard, Ring, restore, take
from rlstab.trainers._health import HostMetrics, adam_health, schema_key
from rlstab.trainers._observer import Diversity, Observer, SamplerMismatch
from rlstab.trainers._skip import drop_gradients
from rlstab.trainers._taps import Taps, gradient_norms
from rlstab.trainers._watch_host import ExportableState, GeneratingTrainer, TrainerCallback

__all__ = ["Watch", "watch"]

logger = logging.getLogger("rlstab")

LEVELS = {"note": logging.INFO, "warning": logging.WARNING, "critical": logging.ERROR}
HOST_LOGS = {"train/grad_norm"}
JOINED: dict[str, Callable[[list[float]], float]] = {
    "mean": fmean,
    "sum": sum,
    "max": max,
    "min": min,
    "last": operator.itemgetter(-1),
}


class _Run(NamedTuple):
    """What the host hands to a callback, as far as actions need it."""

    control: Any
    model: nn.Module
    optimizer: Any
    scheduler: Any

    @classmethod
    def of(cls, control: Any, given: Mapping[str, Any]) -> Self:
        return cls(control, given["model"], given["optimizer"], given["lr_scheduler"])


class Watch(TrainerCallback, ExportableState):
    """Watches a run: measures, looks with detectors, raises one alarm per cause, and does what the rules say.

    As a callback it sees the gradient and the model at every step and the host's numbers when they are logged.
    `watch(trainer)` attaches it whole, so that it also sees every loss call and every rollout; the guide's table says
    which signal comes at which level. Watching changes no bit of the training, until a rule asks for an action.

    Args:
        rules: what is looked for; default: `default_rules()`, which act if there is a guard and only note if not.
        guard: keep snapshots to go back to; needed by rules that roll back.
        run: run folder for what is measured and for alarms; default: that of a `StableGRPOTrainer`, if it has one.
        every: optimizer steps between measurements that cost something (optimizer, probes).
        budget: false alarms per 1000 steps that all rules together may give.
        probes: measurements inside the model (`rlstab.probes`).
        observers: measurements of your own on loss calls and rollouts; only `watch(trainer)` can show them any.

    Raises:
        ConfigError: a rule asks for what cannot be done here.

    Example:
        ```python
        trainer.add_callback(rlstab.Watch(run=run))  # or, to see all: rlstab.watch(trainer, run=run)
        trainer.train()
        ```
    """

    def __init__(
        self,
        rules: Sequence[Rule] | None = None,
        *,
        guard: Guard | None = None,
        run: RunFolder | None = None,
        every: int = 10,
        budget: float = 1.0,
        probes: Sequence[Probe] = (),
        observers: Sequence[Observer] = (),
    ) -> None:
        if every < 1:
            raise ConfigError(f"Watch.every: expected at least 1, got {every}")
        self.monitor = Monitor(default_rules(act=guard is not None) if rules is None else rules, budget=budget)
        if guard is None and any(isinstance(rule.action, RollBack) for rule in self.monitor.rules):
            raise ConfigError("Watch.rules: a rule rolls back, and there is no guard: pass guard=Guard()")
        self.alarms: list[Alarm] = []
        self._guard, self._ring = guard, Ring(guard.keep if guard else 1)
        self._run, self._every = run, every
        self._probes, self._observers = tuple(probes), tuple(observers)
        self._trainer: Any = None
        self._main = True
        self._taps: Taps | None = None
        self._host: HostMetrics | None = None
        self._scaling: Scaling | None = None
        self._messenger = Messenger()
        self._due: list[Due] = []
        self._rollbacks = 0
        self._values: dict[str, float] = {}
        self._held: dict[str, Tensor] = {}
        self._window: dict[str, list[float]] = {}

    def attach(self, trainer: Any) -> None:
        """Attach to a trainer whole; `watch` does this.

        Args:
            trainer: any trainer of transformers, before or between its trainings.

        Raises:
            ConfigError: a rule asks for what this trainer cannot do.
        """
        _check(trainer, self.monitor.rules, self._guard)
        self._trainer = trainer
        if self._run is None and isinstance(trainer, StableGRPOTrainer):
            self._run = trainer._recorder._run
        own: list[Observer] = []
        if isinstance(trainer, GeneratingTrainer):
            own.append(Diversity(trainer.accelerator))
            own += [] if isinstance(trainer, StableGRPOTrainer) else [SamplerMismatch(trainer.accelerator)]
        self._observers = (*own, *self._observers)
        self._host = HostMetrics(trainer)
        self._taps = Taps(trainer, self._observers, self._add_to_log)
        self._taps.attach()
        trainer.add_callback(self)

    def detach(self) -> None:
        """Leave the trainer as it was."""
        if self._taps is not None:
            self._taps.detach()
            self._trainer.remove_callback(self)
        for probe in self._probes:
            probe.detach()

    # ------------------------------------------------------------------ a run begins and ends

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up a resumed run where its checkpoint left it, and the first snapshot."""
        run = _Run.of(control, kwargs)
        self._main = args.process_index == 0
        _check_sharding(self._guard, bool(args.deepspeed or args.fsdp))
        if self._trainer is None:
            _check_scales(self.monitor.rules, None)
        products = self._scaling.products if self._scaling is not None else {}
        self._scaling = Scaling(run.optimizer, run.scheduler, self._trainer)
        self._scaling.products = products
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("watch")
        if state.global_step > 0 and saved is not None:
            self._take_up(saved)
        state.stateful_callbacks[type(self).__name__] = self.state()
        for probe in self._probes:
            probe.attach(run.model)
        self._snapshot(state.global_step, run)

    def _take_up(self, saved: Mapping[str, Any]) -> None:
        """The optimizer and its schedule come back with the checkpoint as they were turned, coefficients do not."""
        assert self._scaling is not None
        self.monitor.load_state_dict(saved["monitor"])
        self._rollbacks = saved["rollbacks"]
        products = saved["products"]
        self._scaling.products = {target: value for target, value in products.items() if target == "learning_rate"}
        self._scaling.turn(products)
        for probe, held in zip(self._probes, saved["probes"], strict=True):
            probe.load_state_dict(held)

    def state(self) -> dict[str, Any]:
        """What the host writes into a checkpoint: detectors, open alarms, factors, and how often the run went back."""
        held = {
            "monitor": self.monitor.state_dict(),
            "rollbacks": self._rollbacks,
            "products": dict(self._scaling.products) if self._scaling is not None else {},
            "probes": [probe.state_dict() for probe in self._probes],
        }
        return {"args": {}, "attributes": {}, "watch": held}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for messages on their way."""
        self._messenger.close()
        for probe in self._probes:
            probe.detach()

    # ------------------------------------------------------------------ a step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the last step; let the probes see this one if it is their turn."""
        if self._taps is not None and self._host is not None:
            self._taps.open_step()
            self._host.open_step()
        if self._is_turn(state.global_step + 1):
            for probe in self._probes:
                probe.arm()

    def _is_turn(self, step: int) -> bool:
        return (step - 1) % self._every == 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure and look, while the step can still be left out."""
        step, model = state.global_step + 1, kwargs["model"]
        values = self._measure(model, args)
        if values.get("step/bad_gradients", 0) > 0 or not math.isfinite(values.get("step/loss", 0.0)):
            self._trace(step, model)
        if self._look(step, values, args):
            drop_gradients(model, scaled=False)  # a scaler has looked already: gradients are unscaled when clipped

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the update that was made; its numbers leave the device with those of the next step."""
        if self._is_turn(state.global_step + 1):
            self._held = adam_health(kwargs["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do what is due, write down the step, and keep a snapshot if the run is healthy and it is time."""
        run = _Run.of(control, kwargs)
        due, self._due = self._due, []
        for item in due:
            self._act(item, state.global_step, run)
        self._write(state)
        if self._guard is not None and state.global_step % self._guard.every == 0 and self.monitor.healthy:
            self._snapshot(state.global_step, run)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As a plain callback, take the numbers that the host logs; attached whole they are known at every step."""
        if self._taps is None:
            named = {schema_key(key): value for key, value in kwargs["logs"].items() if isinstance(value, int | float)}
            numbers = {key: float(value) for key, value in named.items() if key}
            self._look(state.global_step, numbers, args, open_step=False)

    # ------------------------------------------------------------------ signals

    def _measure(self, model: nn.Module, args: Any) -> dict[str, float]:
        """The numbers of the step: one wait for the device, and the same on all ranks."""
        tensors: dict[str, Tensor] = {}
        for probe in self._probes:
            tensors |= probe.collect()
        for observer in self._observers:
            tensors |= observer.collect()
        tensors |= self._held
        self._held = {}
        tensors |= self._of_host() if self._taps is not None else _of_gradient(gradient_norms(model))
        own = _numbers(tensors, args.device)
        values = {**(self._host.collect() if self._host is not None else {}), **own}
        if args.world_size > 1:
            held = [values]
            broadcast_object_list(held)
            values = held[0]
        for key in own.keys() - HOST_LOGS:
            self._window.setdefault(key, []).append(values[key])
        self._values = {key: values[key] for key in own} if self._recorded_elsewhere else values
        return values

    def _of_host(self) -> dict[str, Tensor]:
        """Loss and gradient norm of the step, before the host hides what is not finite."""
        assert self._taps is not None
        accelerator: Accelerator = self._trainer.accelerator
        loss = torch.stack([loss.float() for loss in self._taps.losses]).sum()
        tensors = {"step/loss": accelerator.reduce(loss, reduction="mean"), **_of_gradient(self._taps.gradients)}
        if self._taps.grad_norm is not None:
            tensors["train/grad_norm"] = torch.as_tensor(self._taps.grad_norm)
        return tensors

    @property
    def _recorded_elsewhere(self) -> bool:
        """Whether a recorder writes the host's numbers into the same run folder."""
        return isinstance(self._trainer, StableGRPOTrainer) and self._trainer._recorder._run is self._run

    def _look(self, step: int, values: Mapping[str, float], args: Any, *, open_step: bool = True) -> bool:
        """Let the rules see the numbers; whether the step is to be left out, which one that is over cannot be."""
        observed = self.monitor.observe(step, values)
        for alarm in observed.alarms:
            self._announce(alarm, args)
        skips = [item for item in observed.due if isinstance(item.action, SkipStep)]
        self._due += [item for item in observed.due if not isinstance(item.action, SkipStep)]
        if skips and open_step:
            self._event("step_skipped", step, reason="; ".join(item.finding for item in skips))
            self._say(logging.WARNING, f"step {step}: its update is left out: {skips[0].finding}")
        return bool(skips) and open_step

    def _trace(self, step: int, model: nn.Module) -> None:
        """Say where a number that is not finite was born."""
        forward, gradients = (self._taps.forward, self._taps.gradients) if self._taps is not None else (None, {})
        birth = trace(model, forward, gradients or gradient_norms(model))
        if birth is not None:
            self._event("not_finite", step, where=birth.where, names=list(birth.names))
            self._say(logging.ERROR, f"step {step}: not finite, {birth}")

    # ------------------------------------------------------------------ alarms and actions

    def _announce(self, alarm: Alarm, args: Any) -> None:
        self.alarms.append(alarm)
        self._event("alarm", alarm.step, **alarm.fields())
        self._say(logging.INFO if alarm.change == "cleared" else LEVELS[alarm.severity], str(alarm))
        if self._main and alarm.change != "cleared":
            alert_trackers(alarm, list(args.report_to))

    def _act(self, due: Due, step: int, run: _Run) -> None:
        """Do what a rule asks for once per alarm."""
        assert self._scaling is not None
        match due.action:
            case Notify() as action:
                if self._main:
                    message = {"step": step, "signal": due.rule.signal, "finding": due.finding}
                    self._messenger.send(action, {**message, "cause": due.rule.cause, "severity": due.rule.severity})
            case Scale() as action:
                product = self._scaling.apply(action)
                self._event("scaled", step, target=action.target, product=product, reason=due.finding)
            case RollBack(remedy=remedy):
                self._roll_back(due, step, remedy, run)
            case Stop(save=save):
                self._stop(step, save, due.finding, run.control)

    def _stop(self, step: int, save: bool, reason: str, control: Any) -> None:
        control.should_training_stop = True
        control.should_save = control.should_save or save
        self._event("stopped", step, reason=reason)
        self._say(logging.ERROR, f"step {step}: the run is stopped: {reason}")

    def _roll_back(self, due: Due, step: int, remedy: Scale | None, run: _Run) -> None:
        """Go back to before the evidence began, apply the remedy, and let the data go on."""
        assert self._guard is not None
        assert self._scaling is not None
        if self._rollbacks >= self._guard.most:
            self._stop(step, True, f"{due.finding}, after {self._rollbacks} rollbacks (Guard.most)", run.control)
            return
        self._rollbacks += 1
        snapshot = self._ring.before(due.since - 1)  # what a step measures, the update before it has done
        products = dict(self._scaling.products)
        restore(snapshot, run.model, run.optimizer, run.scheduler)
        self._scaling.products = dict(snapshot.extra["products"])
        self._restore_extra(snapshot.extra)
        self._scaling.turn(products)
        if remedy is not None:
            self._scaling.apply(remedy)
        self._due = []
        self._event("rolled_back", step, to=snapshot.step, reason=due.finding, products=dict(self._scaling.products))
        self._say(logging.ERROR, f"step {step}: back to the weights of step {snapshot.step}: {due.finding}")

    def _restore_extra(self, extra: Mapping[str, Any]) -> None:
        self.monitor.load_state_dict(extra["monitor"])
        for probe, held in zip(self._probes, extra["probes"], strict=True):
            probe.load_state_dict(held)
        if isinstance(self._trainer, StableGRPOTrainer):
            self._trainer.objective.load_state_dict(extra["objective"])
        if isinstance(self._trainer, GeneratingTrainer):
            self._trainer._buffered_inputs = None  # rollouts of weights that are gone

    def _snapshot(self, step: int, run: _Run) -> None:
        if self._guard is None:
            return
        assert self._scaling is not None
        extra = {**self.state()["watch"]}
        if isinstance(self._trainer, StableGRPOTrainer):
            extra["objective"] = self._trainer.objective.state_dict()
        self._ring.add(take(step, run.model, run.optimizer, run.scheduler, extra))

    # ------------------------------------------------------------------ what is left behind

    def _say(self, level: int, message: str) -> None:
        if self._main:
            logger.log(level, message)

    def _event(self, kind: str, step: int, **fields: Any) -> None:
        if self._run is not None and self._main:
            self._run.append_event(kind, step=step, **fields)

    def _write(self, state: Any) -> None:
        """One line of the run folder: what was measured at this step and nobody else writes."""
        if self._run is not None and self._main and self._values:
            self._run.append_metrics(state.global_step, self._values)

    def _add_to_log(self, logs: dict[str, float]) -> None:
        """What was measured since the last line of the log, joined as the schema says."""
        window, self._window = self._window, {}
        for key, values in window.items():
            logs.setdefault(key, JOINED[signal(key).reduction](values))


def watch(
    trainer: Any,
    rules: Sequence[Rule] | None = None,
    *,
    guard: Guard | None = None,
    run: RunFolder | None = None,
    every: int = 10,
    budget: float = 1.0,
    probes: Sequence[Probe] = (),
    observers: Sequence[Observer] = (),
) -> Watch:
    """Watch a trainer: every loss call, every rollout, gradients, optimizer and model.

    Args:
        trainer: any trainer of transformers or TRL; its own loss stays.
        rules: what is looked for; default: `default_rules()`, which act if there is a guard and only note if not.
        guard: keep snapshots to go back to.
        run: run folder for what is measured and for alarms; default: that of a `StableGRPOTrainer`, if it has one.
        every: optimizer steps between measurements that cost something.
        budget: false alarms per 1000 steps that all rules together may give.
        probes: measurements inside the model (`rlstab.probes`).
        observers: measurements of your own.

    Returns:
        The watch, attached: its `alarms`, and `detach()`.

    Raises:
        ConfigError: a rule asks for what this trainer cannot do.

    Example:
        ```python
        trainer = GRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=prompts)
        rlstab.watch(trainer, guard=Guard())
        trainer.train()
        ```
    """
    watcher = Watch(rules, guard=guard, run=run, every=every, budget=budget, probes=probes, observers=observers)
    watcher.attach(trainer)
    return watcher


def _check(trainer: Any, rules: Sequence[Rule], guard: Guard | None) -> None:
    """Refuse what this trainer cannot do."""
    if trainer.args.restore_callback_states_from_checkpoint:
        raise ConfigError(
            "args.restore_callback_states_from_checkpoint=True makes callbacks anew and detaches the watch: leave it "
            "at False, the watch takes up its own state"
        )
    if any(isinstance(callback, Watch) for callback in trainer.callback_handler.callbacks):
        raise ConfigError("this trainer is watched already: detach the other watch first")
    if trainer.is_deepspeed_enabled and any(isinstance(rule.action, SkipStep) for rule in rules):
        raise ConfigError("SkipStep: DeepSpeed makes its update within the backward pass: use Stop or RollBack")
    _check_sharding(guard, trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)
    _check_scales(rules, trainer.objective if isinstance(trainer, StableGRPOTrainer) else None)


def _check_sharding(guard: Guard | None, sharded: bool) -> None:
    if guard is not None and sharded:
        raise ConfigError("guard: weights that are spread over ranks cannot be put back in place: use Stop, and resume")


def _check_scales(rules: Sequence[Rule], objective: Objective | None) -> None:
    for rule in rules:
        remedy = rule.action.remedy if isinstance(rule.action, RollBack) else rule.action
        if isinstance(remedy, Scale):
            check_scale(remedy, objective)


def _numbers(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, float]:
    """The values of 0-dim tensors, with one wait for the device."""
    values = [value.detach().float().to(device) for value in tensors.values()]
    return dict(zip(tensors, torch.stack(values).tolist(), strict=True)) if values else {}


def _of_gradient(norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How many gradients are not finite; nothing where there are none, as when the step was left out already."""
    if not norms:
        return {}
    return {"step/bad_gradients": (~torch.stack(list(norms.values())).isfinite()).sum()}
