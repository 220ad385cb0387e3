"""The monitor: rules at work on the signals of a run, one alarm per cause."""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from rlstab.errors import ConfigError
from rlstab.monitors._actions import Note, RollBack, SkipStep, Stop
from rlstab.monitors._alarm import Alarm, Change, Due, Evidence, Observed
from rlstab.monitors._checks import check
from rlstab.monitors._detectors import Reading, Tracker
from rlstab.monitors._rules import SEVERITIES, Rule, default_rules


@dataclass
class _Open:
    """An alarm that is not over: since when, how bad, which rules said so, when any was last raised."""

    since: int
    severity: int
    last: int
    evidence: list[Evidence] = field(default_factory=list)
    rules: list[int] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)


class Monitor:
    """Watches signals by rules; says when something is out of order, once, and when it is over.

    All rules that chance could raise share one budget of false alarms: with more of them at work the limits of each are
    further out. Rules of one cause make one alarm. It opens with the first rule raised, escalates when a worse rule is
    raised, and is over when none has been raised for `cooldown` steps. A rule asks for its action once, and again only
    after it has been calm for as long itself, whatever keeps the alarm open.

    Args:
        rules: what is watched; default: `default_rules()`.
        budget: false alarms per 1000 steps that all statistical rules together may give.
        cooldown: calm steps after which an alarm is over, and after which a rule may ask for its action again.

    Raises:
        ConfigError: a number is out of its range.

    >>> from rlstab.monitors import Level
    >>> monitor = Monitor([Rule(signal="mismatch/k3", detector=Level(above=0.5, steps=1))])
    >>> print(monitor.observe(7, {"mismatch/k3": 0.75}).alarms[0])  # doctest: +ELLIPSIS
    step 7: warning: mismatch: trainer and sampler have come apart (mismatch/k3 0.75 is above 0.5 ...
    >>> monitor.observe(8, {"mismatch/k3": 0.8}).alarms
    ()
    """

    def __init__(self, rules: Sequence[Rule] | None = None, *, budget: float = 1.0, cooldown: int = 25) -> None:
        check(0 < budget < math.inf, "Monitor.budget", "false alarms per 1000 steps > 0", budget)
        check(cooldown >= 1, "Monitor.cooldown", "at least 1 step", cooldown)
        self._rules = tuple(default_rules() if rules is None else rules)
        self._budget, self._cooldown = budget, cooldown
        self._trackers: list[Tracker] = [rule.detector.track() for rule in self._rules]
        self._seen = [False] * len(self._rules)
        self._last: list[int | None] = [None] * len(self._rules)
        self._open: dict[str, _Open] = {}

    @property
    def rules(self) -> tuple[Rule, ...]:
        """What is watched."""
        return self._rules

    @property
    def healthy(self) -> bool:
        """Whether the weights are worth keeping: no rule is raised that skips steps, goes back or stops.

        A warning may stay open for the rest of a run and says nothing against a snapshot.
        """
        condemning = (SkipStep, RollBack, Stop)
        pairs = zip(self._rules, self._trackers, strict=True)
        return not any(tracker.raised and isinstance(rule.action, condemning) for rule, tracker in pairs)

    def observe(self, step: int, values: Mapping[str, float]) -> Observed:
        """Take signals of a step; a step's signals may come in several calls, each signal once.

        Args:
            step: optimizer step; never less than in the last call.
            values: number by schema key; what no rule names is ignored.

        Returns:
            What opened, got worse or is over, and the actions that are due.
        """
        due: list[Due] = []
        changes: dict[str, Change] = {}
        for i, (rule, tracker) in enumerate(zip(self._rules, self._trackers, strict=True)):
            if rule.signal not in values:
                continue
            self._seen[i] = True
            reading = tracker.update(step, float(values[rule.signal]), self._share)
            if reading.raised and (change := self._enter(i, step, reading)):
                changes.setdefault(rule.cause, change)
            if reading.beyond and rule.action.urgent:
                finding = f"{rule.signal} {reading.evidence}"
                due.append(Due(action=rule.action, rule=rule, since=step, finding=finding))
        due += self._once(step)
        opened = [self._alarm(cause, step, change) for cause, change in changes.items()]
        return Observed(alarms=(*opened, *self._over(step)), due=tuple(due))

    @property
    def _share(self) -> float:
        """False alarms per 1000 steps that each statistical rule at work may give."""
        at_work = sum(seen and rule.detector.statistical for seen, rule in zip(self._seen, self._rules, strict=True))
        return self._budget / max(at_work, 1)

    def _enter(self, i: int, step: int, reading: Reading) -> Change | None:
        """Enter a raised rule under its cause; what that changes, if anything is to be said."""
        rule = self._rules[i]
        severity, since = SEVERITIES.index(rule.severity), step if reading.since is None else reading.since
        known = self._open.get(rule.cause)
        alarm = known or _Open(since=since, severity=severity, last=step)
        self._open[rule.cause] = alarm
        evidence = Evidence(signal=rule.signal, since=since, finding=reading.evidence)
        if i not in alarm.rules:
            alarm.rules.append(i)
            alarm.evidence.append(evidence)
        elif alarm.evidence[alarm.rules.index(i)].since != since:  # it was calm, and is raised anew
            alarm.evidence[alarm.rules.index(i)] = evidence
        alarm.since, worse = min(alarm.since, since), severity > alarm.severity
        alarm.severity = max(alarm.severity, severity)
        return "opened" if known is None else "escalated" if worse else None

    def _once(self, step: int) -> list[Due]:
        """The actions that are taken once, where enough families agree; each counts from what its own rule found."""
        due: list[Due] = []
        raised = [i for i, tracker in enumerate(self._trackers) if tracker.raised]
        for i in raised:
            rule, alarm = self._rules[i], self._open[self._rules[i].cause]
            alarm.last, last, self._last[i] = step, self._last[i], step
            if i in alarm.taken and last is not None and step - last >= self._cooldown:
                alarm.taken.remove(i)
            families = {self._rules[j].family for j in raised if self._rules[j].cause == rule.cause}
            if i in alarm.taken or rule.action.urgent or len(families) < rule.agreement:
                continue
            alarm.taken.append(i)
            found = alarm.evidence[alarm.rules.index(i)]
            due.append(Due(action=rule.action, rule=rule, since=found.since, finding=str(found)))
        return [item for item in due if not isinstance(item.action, Note)]

    def _over(self, step: int) -> list[Alarm]:
        """Close the alarms whose rules have been calm for long enough."""
        over = [cause for cause, alarm in self._open.items() if step - alarm.last >= self._cooldown]
        alarms = [self._alarm(cause, step, "cleared") for cause in over]
        for cause in over:
            del self._open[cause]
        return alarms

    def _alarm(self, cause: str, step: int, change: Change) -> Alarm:
        alarm = self._open[cause]
        return Alarm(
            cause=cause,
            change=change,
            severity=SEVERITIES[alarm.severity],
            step=step,
            since=alarm.since,
            evidence=tuple(alarm.evidence),
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on as if it had not stopped; made of JSON's types."""
        alarms = {
            cause: {**vars(alarm), "evidence": [vars(item) for item in alarm.evidence]}
            for cause, alarm in self._open.items()
        }
        return {
            "rules": [repr(rule) for rule in self._rules],
            "trackers": [tracker.state_dict() for tracker in self._trackers],
            "seen": list(self._seen),
            "last": list(self._last),
            "open": deepcopy(alarms),
        }

    def postpone(self, due: Due) -> None:
        """Let the rule ask again at the next step, if it is still raised then."""
        alarm = self._open.get(due.rule.cause)
        if alarm is not None:
            alarm.taken = [i for i in alarm.taken if self._rules[i] != due.rule]

    def load_state_dict(self, state: Mapping[str, Any], *, step: int | None = None) -> None:
        """Go on from a saved state.

        Args:
            state: what `state_dict` gave.
            step: the step after which the run goes on, where it is not the one that was saved: calm steps are counted
                from there.

        Raises:
            ConfigError: the state is that of other rules.
        """
        mine = [repr(rule) for rule in self._rules]
        if state["rules"] != mine:
            changed = sorted(set(state["rules"]) ^ set(mine)) or mine
            raise ConfigError(
                f"Monitor.rules: the state was saved with other rules (first difference {changed[0]}): resume with the "
                "same rules, or without the monitor's state"
            )
        for tracker, saved in zip(self._trackers, state["trackers"], strict=True):
            tracker.load_state_dict(saved)
        self._seen, self._last = list(state["seen"]), list(state["last"])
        self._open = {
            cause: _Open(**{**deepcopy(dict(saved)), "evidence": [Evidence(**item) for item in saved["evidence"]]})
            for cause, saved in state["open"].items()
        }
        if step is not None:
            self._last = [None if last is None else step for last in self._last]
            for alarm in self._open.values():
                alarm.last = step
