"""`Watch`: signals, detectors, alarms and actions on any trainer of transformers, as a callback or attached whole."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import DistributedType, PartialState
from torch import nn

from rlstab.errors import ConfigError, RecordError
from rlstab.losses import Objective
from rlstab.monitors import Alarm, Due, Monitor, Notify, RollBack, Rule, Scale, SkipStep, Stop, default_rules
from rlstab.probes import Probe
from rlstab.record import RunFolder, diagnosis_of
from rlstab.schema import signal
from rlstab.trainers._actions import Messenger, Scaling, check_scale
from rlstab.trainers._belongings import check_belongings
from rlstab.trainers._births import trace
from rlstab.trainers._grpo import StableGRPOTrainer
from rlstab.trainers._guard import Guard
from rlstab.trainers._health import schema_key
from rlstab.trainers._keeper import Keeper, Run, drop_rollouts
from rlstab.trainers._measure import Measuring, broadcast
from rlstab.trainers._observer import Observer
from rlstab.trainers._recorder import StepReader
from rlstab.trainers._skip import drop_gradients
from rlstab.trainers._taps import gradient_norms
from rlstab.trainers._trackers import Trackers, alert_trackers
from rlstab.trainers._watch_host import ExportableState, TrainerCallback

__all__ = ["Watch", "watch"]

logger = logging.getLogger("rlstab")

HELD_OUT = "eval/"
LEVELS = {"note": logging.INFO, "warning": logging.WARNING, "critical": logging.ERROR}


class Watch(TrainerCallback, ExportableState, StepReader):
    """Watches a run: measures, looks with detectors, raises one alarm per cause, and does what the rules say.

    As a callback it sees the gradient and the model at every step and the host's numbers when they are logged.
    `watch(trainer)` attaches it whole, so that it also sees every loss call and every rollout; the guide's table says
    which signal comes at which level. Watching changes no bit of the training, until a rule asks for an action.

    Args:
        rules: what is looked for; default: `default_rules()`, which act if there is a guard and only note if not, and
            leave no step out under DeepSpeed.
        guard: keep snapshots to go back to; needed by rules that roll back.
        run: run folder for what is measured and for alarms; default: that of a `StableGRPOTrainer`, if it has one.
        every: optimizer steps between measurements that cost something (optimizer, probes, single gradients); spectra
            of gradients are looked at every five times as many.
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
        self._rules, self._budget = rules, budget
        self.monitor = Monitor(default_rules(act=guard is not None) if rules is None else rules, budget=budget)
        if guard is None and (back := [r.signal for r in self.monitor.rules if isinstance(r.action, RollBack)]):
            raise ConfigError(
                f"Watch.rules: that of {back[0]} rolls back, and there is no guard: pass guard=Guard(), in a recipe "
                "guard: {}"
            )
        self.alarms: list[Alarm] = []
        self._guard, self._keeper = guard, Keeper(guard)
        self._run = run
        self._measuring = Measuring(every, probes, observers)
        self._trainer: Any = None
        self._main, self._report_to = True, list[str]()
        self._scaling: Scaling | None = None
        self._messenger = Messenger()
        self._trackers: Trackers | None = None
        self._values: dict[str, float] = {}
        self._due: list[Due] = []

    def attach(self, trainer: Any) -> None:
        """Attach to a trainer whole; `watch` does this.

        Args:
            trainer: any trainer of transformers, before or between its trainings.

        Raises:
            ConfigError: a rule asks for what this trainer cannot do.
        """
        if self._rules is None and trainer.is_deepspeed_enabled:
            rules = default_rules(act=self._guard is not None, skips=False)
            self.monitor = Monitor(rules, budget=self._budget)
        _check(trainer, self.monitor.rules)
        if self._guard is not None:
            check_belongings(trainer)
        self._trainer = trainer
        if self._run is None and isinstance(trainer, StableGRPOTrainer):
            self._run = trainer._recorder._run
        self._measuring.attach(trainer, self._keeper.save, self._keeper.resumes)
        trainer.add_callback(self)
        if not isinstance(trainer, StableGRPOTrainer):
            self._trackers = Trackers(trainer)
            trainer.add_callback(self._trackers)

    def detach(self) -> None:
        """Leave the trainer as it was."""
        self._measuring.detach()
        if self._trainer is not None:
            self._trainer.remove_callback(self)
        if self._trackers is not None:
            self._trackers.leave(self._trainer)

    # ------------------------------------------------------------------ a run begins and ends

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up a resumed run where its checkpoint left it, and the first snapshot."""
        run = Run.of(control, kwargs)
        self._main, self._report_to = args.process_index == 0, list(args.report_to)
        if self._trainer is None:
            _check_skips(self.monitor.rules, deepspeed=PartialState().distributed_type == DistributedType.DEEPSPEED)
            _check_scales(self.monitor.rules, None)
        products = self._scaling.products if self._scaling is not None else {}
        self._scaling = Scaling(run.optimizer, run.scheduler, self._trainer)
        self._scaling.products = products
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("watch")
        if state.global_step > 0 and saved is not None:
            self._take_up(saved)
        state.stateful_callbacks[type(self).__name__] = self.state()
        self._measuring.begin(run.model)
        if not self._keeper.begin(args, state.global_step, run, self._trainer):
            self._snapshot(state.global_step, run)

    def _take_up(self, saved: Mapping[str, Any]) -> None:
        """The optimizer and its schedule come back with the checkpoint as they were turned, coefficients do not."""
        assert self._scaling is not None
        self.monitor.load_state_dict(saved["monitor"])
        self._keeper.rollbacks, self._keeper.last_back = saved["rollbacks"], saved["last_back"]
        self._keeper.standing.load_state_dict(saved["standing"])
        products = saved["products"]
        self._scaling.products = {target: value for target, value in products.items() if target == "learning_rate"}
        self._scaling.turn(products)
        self._measuring.load_state_dict(saved["signals"])

    def state(self) -> dict[str, Any]:
        """What the host writes into a checkpoint: detectors, open alarms, factors, and how often the run went back."""
        held = {
            "monitor": self.monitor.state_dict(),
            "rollbacks": self._keeper.rollbacks,
            "last_back": self._keeper.last_back,
            "standing": self._keeper.standing.state_dict(),
            "products": dict(self._scaling.products) if self._scaling is not None else {},
            "signals": self._measuring.state_dict(),
        }
        return {"args": {}, "attributes": {}, "watch": held}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As a plain callback, add the ring to the checkpoint once it is there; attached whole it is there before."""
        if self._trainer is None:
            self._keeper.save(f"{args.output_dir}/checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for messages on their way, and remove snapshots that were kept for this run alone."""
        self._messenger.close()
        self._keeper.close()
        self._measuring.let_go()

    # ------------------------------------------------------------------ a step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the last step; let the probes see this one if it is their turn; keep a policy that was evaluated."""
        if self._keeper.evaluated and self.monitor.healthy:
            self._snapshot(state.global_step, Run.of(control, kwargs))
        self._measuring.open_step(state.global_step + 1)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure and look, while the step can still be left out."""
        step, model = state.global_step + 1, kwargs["model"]
        values = self._measuring.close_step(step, model, args)
        self._values = self._measuring.new if self._recorded_elsewhere else values
        if values.get("step/bad_gradients", 0) > 0 or not math.isfinite(values.get("step/loss", 0.0)):
            self._trace(step, model)
        if self._look(step, values):
            drop_gradients(model, scaled=False)  # a scaler has looked already: gradients are unscaled when clipped

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the update that was made."""
        self._measuring.see_update(state.global_step + 1, kwargs["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do what is due, write down the step, and keep a snapshot if the run is healthy and it is time."""
        run = Run.of(control, kwargs)
        while self._due:  # empty once the run has gone back: what else was due speaks of weights that are gone
            self._act(self._due.pop(0), state.global_step, run)
        self._write(state)
        if self._keeper.is_time(state.global_step) and self.monitor.healthy:
            self._snapshot(state.global_step, run)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the numbers that the host logs; attached whole those of evaluations, others are known at every step."""
        named = {schema_key(key): value for key, value in kwargs["logs"].items() if isinstance(value, int | float)}
        numbers = {key: float(value) for key, value in named.items() if key}
        held_out = {key: value for key, value in numbers.items() if key.startswith(HELD_OUT)}
        if self._run is not None and self._main and held_out:
            self._run.append_metrics(state.global_step, held_out)
        if self._trainer is None or held_out:
            self._show(state.global_step, numbers if self._trainer is None else held_out)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show the rules numbers that the host does not know, as those of an evaluation of your own.

        Args:
            step: the optimizer step that has ended; 0 before the first one.
            values: by schema key, on every process.

        Raises:
            SchemaError: a key is not in the schema.

        Example:
            ```python
            watcher = rlstab.watch(trainer, guard=rlstab.Guard())
            watcher.show(trainer.state.global_step, {"eval/pass@1": examine(trainer.model)})
            ```
        """
        self._show(step, {signal(key).key: value for key, value in values.items()})

    def _show(self, step: int, numbers: dict[str, float]) -> None:
        """Let the rules see numbers from outside a step, and what follows from those of an evaluation."""
        if PartialState().num_processes > 1:
            numbers = broadcast(numbers)
        derived = self._measuring.examined(numbers)
        if self._run is not None and self._main and derived:
            self._run.append_metrics(step, derived)
        self._look(step, numbers | derived, open_step=False)

    def _look(self, step: int, values: Mapping[str, float], *, open_step: bool = True) -> bool:
        """Let the rules see the numbers; whether the step is to be left out, which one that is over cannot be."""
        observed = self.monitor.observe(step, values)
        causes = self._causes() if any(alarm.change != "cleared" for alarm in observed.alarms) else []
        self._keeper.standing.observe(values)
        for alarm in observed.alarms:
            self._announce(alarm, causes if alarm.change != "cleared" else [])
        skips = [item for item in observed.due if isinstance(item.action, SkipStep)]
        self._due += [item for item in observed.due if not isinstance(item.action, SkipStep)]
        if skips and open_step:
            self._event("step_skipped", step, reason="; ".join(item.finding for item in skips))
            self._say(logging.WARNING, f"step {step}: its update is left out: {skips[0].finding}")
        return bool(skips) and open_step

    def _trace(self, step: int, model: nn.Module) -> None:
        """Say where a number that is not finite was born."""
        taps = self._measuring.taps
        forward, gradients = (taps.forward, taps.gradients) if taps is not None else (None, {})
        birth = trace(model, forward, gradients or gradient_norms(model))
        if birth is not None:
            self._event("not_finite", step, where=birth.where, names=list(birth.names))
            self._say(logging.ERROR, f"step {step}: not finite, {birth}")

    # ------------------------------------------------------------------ alarms and actions

    def _announce(self, alarm: Alarm, causes: Sequence[str]) -> None:
        """Say what is out of order and, where a run folder tells what came before, the causes that fit."""
        self.alarms.append(alarm)
        over = alarm.change == "cleared"
        self._event("alarm", alarm.step, **alarm.fields(), causes=list(causes))
        self._say(logging.INFO if over else LEVELS[alarm.severity], "\n  ".join([str(alarm), *causes]))
        if self._main and not over:
            alert_trackers(alarm, causes, self._report_to)

    def _causes(self) -> list[str]:
        if self._run is None or not self._main:
            return []
        try:
            return [str(claim) for claim in diagnosis_of(self._run).claims]
        except RecordError as error:
            return [f"no diagnosis: {error}"]

    def _act(self, due: Due, step: int, run: Run) -> None:
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
            case RollBack() if self._keeper.settles(step):
                self.monitor.postpone(due)
            case RollBack() as action:
                self._roll_back(due, step, action, run)
            case Stop(save=save):
                self._stop(step, save, due.finding, run.control)

    def _stop(self, step: int, save: bool, reason: str, control: Any) -> None:
        control.should_training_stop = True
        control.should_save = control.should_save or save
        self._event("stopped", step, reason=reason)
        self._say(logging.ERROR, f"step {step}: the run is stopped: {reason}")

    def _roll_back(self, due: Due, step: int, action: RollBack, run: Run) -> None:
        """Go back to before the evidence began, apply the remedy, and let the data go on; or stop there."""
        assert self._scaling is not None
        used_up = self._keeper.used_up
        ends = used_up or action.stop
        products = dict(self._scaling.products)
        # What a step measures is of the policy before its update, what an evaluation measures of the one after it.
        before = due.since if due.rule.signal.startswith(HELD_OUT) else due.since - 1
        snapshot = self._keeper.go_back(step, before, run, self._trainer, best=ends)
        self._scaling.products = dict(snapshot.extra["products"])
        self.monitor.load_state_dict(snapshot.extra["monitor"], step=step)
        self._measuring.load_state_dict(snapshot.extra["signals"])
        drop_rollouts(self._trainer)
        self._scaling.turn(products)
        if action.remedy is not None and not used_up:
            self._scaling.apply(action.remedy)
        self._due = []
        self._event("rolled_back", step, to=snapshot.step, reason=due.finding, products=dict(self._scaling.products))
        self._say(logging.ERROR, f"step {step}: back to the weights of step {snapshot.step}: {due.finding}")
        if ends:
            times = f", after {self._keeper.rollbacks - 1} rollbacks (Guard.most)" if used_up else ""
            self._stop(step, True, due.finding + times, run.control)

    def _snapshot(self, step: int, run: Run) -> None:
        if self._guard is not None:
            self._keeper.keep(step, run, self._trainer, self.state()["watch"])

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

    @property
    def _recorded_elsewhere(self) -> bool:
        """Whether a recorder writes the host's numbers into the same run folder."""
        return isinstance(self._trainer, StableGRPOTrainer) and self._trainer._recorder._run is self._run


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


def _check(trainer: Any, rules: Sequence[Rule]) -> None:
    """Refuse what this trainer cannot do."""
    if trainer.args.restore_callback_states_from_checkpoint:
        raise ConfigError(
            "args.restore_callback_states_from_checkpoint=True makes callbacks anew and detaches the watch: leave it "
            "at False, the watch takes up its own state"
        )
    if any(isinstance(callback, Watch) for callback in trainer.callback_handler.callbacks):
        raise ConfigError("this trainer is watched already: detach the other watch first")
    _check_skips(rules, deepspeed=trainer.is_deepspeed_enabled)
    for rule in rules:
        if isinstance(rule.action, Notify):
            rule.action.address()
    _check_scales(rules, trainer.objective if isinstance(trainer, StableGRPOTrainer) else None)


def _check_skips(rules: Sequence[Rule], *, deepspeed: bool) -> None:
    skipping = [rule.signal for rule in rules if isinstance(rule.action, SkipStep)]
    if deepspeed and skipping:
        raise ConfigError(
            f"SkipStep: the rule of {skipping[0]} leaves steps out, and DeepSpeed makes its update within the backward "
            "pass: use RollBack or Stop"
        )


def _check_scales(rules: Sequence[Rule], objective: Objective | None) -> None:
    for rule in rules:
        remedy = rule.action.remedy if isinstance(rule.action, RollBack) else rule.action
        if isinstance(remedy, Scale):
            check_scale(remedy, objective)
