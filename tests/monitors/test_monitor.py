"""The monitor: one alarm per cause, its life, the actions that are due, the shared budget, exact resume."""

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from rlstab.errors import ConfigError, SchemaError
from rlstab.monitors import (
    Alarm,
    Cusum,
    Drift,
    Level,
    Monitor,
    NonFinite,
    Note,
    Notify,
    Observed,
    RollBack,
    Rule,
    Scale,
    SkipStep,
    Spike,
    Stop,
    default_rules,
)
from rlstab.schema import signal

K3 = "mismatch/k3"
WARN = Rule(signal=K3, detector=Level(above=0.2, steps=1))
CRITICAL = Rule(signal=K3, detector=Level(above=0.5, steps=1), severity="critical", action=RollBack())


def observed(monitor: Monitor, rows: Sequence[Mapping[str, float]]) -> list[Observed]:
    return [monitor.observe(step, row) for step, row in enumerate(rows, 1)]


def alarms(monitor: Monitor, rows: Sequence[Mapping[str, float]]) -> list[Alarm]:
    return [alarm for seen in observed(monitor, rows) for alarm in seen.alarms]


def test_an_alarm_opens_escalates_and_is_over_once_each() -> None:
    monitor = Monitor([WARN, CRITICAL], cooldown=5)
    found = alarms(monitor, [{K3: value} for value in (0.1, 0.3, 0.3, 0.6, 0.7, *[0.1] * 10)])
    assert [(alarm.step, alarm.change, alarm.severity) for alarm in found] == [
        (2, "opened", "warning"),
        (4, "escalated", "critical"),
        (10, "cleared", "critical"),
    ]
    assert [item.finding for item in found[1].evidence] == [
        "0.3 is above 0.2 (step 1 in a row)",
        "0.6 is above 0.5 (step 1 in a row)",
    ]


def test_a_signal_that_flaps_is_one_alarm() -> None:
    found = alarms(Monitor([WARN]), [{K3: 0.3 if step % 4 else 0.1} for step in range(100)])
    assert [alarm.change for alarm in found] == ["opened"]


def test_signals_of_one_cause_are_one_alarm() -> None:
    rules = [WARN, Rule(signal="mismatch/f2", detector=Level(above=0.1, steps=1))]
    found = alarms(Monitor(rules), [{K3: 0.3, "mismatch/f2": 0.2}])
    assert len(found) == 1
    assert [item.signal for item in found[0].evidence] == [K3, "mismatch/f2"]


def test_an_alarm_says_what_since_when_and_what_to_do() -> None:
    text = str(alarms(Monitor([CRITICAL]), [{K3: 0.6}])[0])
    assert text.startswith("step 1: critical: mismatch: trainer and sampler have come apart (mismatch/k3 0.6 is above")
    assert "since step 1). sync the sampler's weights" in text
    fields = alarms(Monitor([CRITICAL]), [{K3: 0.6}])[0].fields()
    assert json.loads(json.dumps(fields))["evidence"][0]["since"] == 1


def test_an_action_is_due_once_per_alarm() -> None:
    monitor = Monitor([WARN, CRITICAL], cooldown=3)
    due = [len(seen.due) for seen in observed(monitor, [{K3: value} for value in (0.6, 0.7, *[0.0] * 6, 0.8)])]
    assert due == [1, 0, 0, 0, 0, 0, 0, 0, 1]


def test_an_action_that_was_put_off_is_due_again_while_its_rule_is_raised() -> None:
    monitor, due = Monitor([CRITICAL]), []
    for step, value in enumerate((0.6, 0.6, 0.6, 0.1, 0.1), 1):
        due.append(list(monitor.observe(step, {K3: value}).due))
        for item in due[-1]:
            monitor.postpone(item)
    assert [len(items) for items in due] == [1, 1, 1, 0, 0]
    assert {items[0].since for items in due[:3]} == {1}


def test_a_run_that_goes_on_at_a_later_step_counts_calm_steps_from_there() -> None:
    first, second = (Monitor([WARN, CRITICAL], cooldown=5) for _ in range(2))
    assert observed(first, [{K3: 0.6}, {K3: 0.3}])[0].due
    second.load_state_dict(first.state_dict(), step=100)
    assert second.observe(101, {K3: 0.6}).due == ()  # it has asked already, and was not calm for long since
    assert second.observe(103, {K3: 0.1}).alarms == ()
    assert [alarm.change for alarm in second.observe(107, {K3: 0.1}).alarms] == ["cleared"]


def test_skipping_is_due_at_each_bad_step() -> None:
    rule = Rule(signal="step/loss", detector=NonFinite(), action=SkipStep(), cause="numerics")
    monitor = Monitor([rule])
    found = observed(monitor, [{"step/loss": value} for value in (1.0, math.nan, math.nan, 1.0)])
    assert [len(seen.due) for seen in found] == [0, 1, 1, 0]
    assert [len(seen.alarms) for seen in found] == [0, 1, 0, 0]


def test_an_action_waits_for_the_agreement_of_families() -> None:
    rules = [
        Rule(signal=K3, detector=Level(above=0.5, steps=1), action=Stop(), cause="collapse", agreement=2),
        Rule(signal="mismatch/f2", detector=Level(above=0.1, steps=1), cause="collapse"),
        Rule(signal="train/reward", detector=Level(below=0.1, steps=1), cause="collapse"),
    ]
    rows = [{K3: 0.6, "mismatch/f2": 0.5, "train/reward": 0.9}, {K3: 0.6, "train/reward": 0.0}]
    found = observed(Monitor(rules), rows)
    assert [len(seen.alarms) for seen in found] == [1, 0]
    assert [len(seen.due) for seen in found] == [0, 1]


def test_signals_of_a_step_may_come_apart() -> None:
    rules = [WARN, Rule(signal="train/grad_norm", detector=NonFinite(), cause="numerics")]
    monitor = Monitor(rules)
    assert monitor.observe(1, {"train/grad_norm": math.inf}).alarms[0].cause == "numerics"
    assert monitor.observe(1, {K3: 0.4}).alarms[0].cause == "mismatch"


def test_only_what_condemns_the_weights_makes_a_run_unhealthy() -> None:
    """A warning that stays open is no reason to keep no snapshot; a rule that goes back, stops or skips is."""
    for action, healthy in ((Note(), True), (Scale(), True), (RollBack(), False), (Stop(), False), (SkipStep(), False)):
        rule = Rule(signal=K3, detector=Level(above=0.2, steps=1), severity="critical", action=action)
        monitor = Monitor([rule])
        assert monitor.observe(1, {K3: 0.4}).alarms
        assert monitor.healthy == healthy, action
        monitor.observe(2, {K3: 0.1})
        assert monitor.healthy


def test_an_action_counts_from_what_its_own_rule_found() -> None:
    """A warning of the same cause that has been open for long says nothing about when the harm began."""
    found = observed(Monitor([WARN, CRITICAL]), [{K3: 0.3 if step < 200 else 0.6} for step in range(1, 202)])
    (due,) = found[199].due
    assert (due.since, found[199].alarms[0].since) == (200, 1)
    assert "since step 200" in due.finding
    assert found[200].due == ()


def test_a_rule_may_ask_again_once_it_has_been_calm_though_another_keeps_the_alarm_open() -> None:
    values = [0.6, *[0.3] * 3, 0.6, *[0.3] * 5, 0.6, 0.6]
    found = observed(Monitor([WARN, CRITICAL], cooldown=5), [{K3: value} for value in values])
    assert [step for step, seen in enumerate(found, 1) if seen.due] == [1, 11]
    assert found[10].due[0].since == 11
    assert not any(seen.alarms for seen in found[1:])


def ar1(rng: np.random.Generator, rho: float, steps: int, signals: int) -> np.ndarray:
    noise = rng.standard_normal((signals, steps))
    values = noise.copy()
    for t in range(1, steps):
        values[:, t] = rho * values[:, t - 1] + math.sqrt(1 - rho**2) * noise[:, t]
    return values


KEYS = [f"rewards/function{i}/mean" for i in range(8)]


def many_rules() -> list[Rule]:
    """Sixteen rules that chance could raise, each a cause of its own."""
    charts = [Rule(signal=key, detector=Drift(), cause=f"drift of {key}") for key in KEYS]
    return charts + [Rule(signal=key, detector=Spike(), cause=f"spike of {key}") for key in KEYS]


def false_alarms(rho: float, budget: float, runs: int, steps: int) -> float:
    """Alarms per 1000 steps of a monitor of many rules over noise without any change."""
    rng = np.random.default_rng(int(10 * rho))
    count = 0
    for _ in range(runs):
        values = ar1(rng, rho, steps, len(KEYS))
        rows = [dict(zip(KEYS, column, strict=True)) for column in values.T.tolist()]
        count += sum(alarm.change == "opened" for alarm in alarms(Monitor(many_rules(), budget=budget), rows))
    return 1000 * count / (runs * steps)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_false_alarms_stay_within_the_budget(rho: float) -> None:
    """All signals together; 3 000 steps, so that one alarm more or less is 0.33."""
    assert false_alarms(rho, budget=1.0, runs=3, steps=1000) <= 1.0


def test_ignoring_autocorrelation_would_break_the_budget() -> None:
    """The same noise under the textbook's chart: σ known, no correction, the limit of 360 steps between alarms."""
    values = ar1(np.random.default_rng(5), 0.8, 1000, 8)
    textbook = [max(Cusum(k=0.5).statistics(series)) for series in values]
    assert sum(statistic > 4.77 for statistic in textbook) == 8


def test_more_rules_at_work_move_limits_out() -> None:
    shift = [*np.zeros(100) + 0.1 * np.random.default_rng(1).standard_normal(100), *[0.4] * 60]

    def delay(rules: list[Rule]) -> int:
        row = dict.fromkeys(KEYS, 0.0)
        rows = [{**row, KEYS[0]: value} for value in shift]
        return next(alarm.step for alarm in alarms(Monitor(rules, budget=0.2), rows))

    alone = [Rule(signal=KEYS[0], detector=Drift(), cause="shift")]
    assert delay(alone) < delay(alone + many_rules()[1:])


def test_a_resumed_monitor_goes_on_exactly() -> None:
    rules = [WARN, CRITICAL, Rule(signal="train/reward", detector=Drift(side="low", window=40), cause="reward")]
    rng = np.random.default_rng(2)
    rows = [
        {K3: 0.1 if step < 40 else 0.01 * step, "train/reward": float(rng.normal()) - 3 * (step > 60)}
        for step in range(120)
    ]
    whole = [repr(seen) for seen in observed(Monitor(rules), rows)]
    assert sum("Alarm" in seen for seen in whole) >= 3
    for stop in (1, 45, 70):
        first, second = Monitor(rules), Monitor(rules)
        observed(first, rows[:stop])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [repr(second.observe(step, rows[step - 1])) for step in range(stop + 1, 121)] == whole[stop:]


def test_a_state_of_other_rules_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Monitor.rules: the state was saved with other rules"):
        Monitor([CRITICAL]).load_state_dict(Monitor([WARN]).state_dict())


def test_the_default_rules_only_note_unless_they_may_act() -> None:
    assert {rule.action for rule in default_rules()} == {Note()}
    acting = {type(rule.action) for rule in default_rules(act=True)}
    assert acting == {Note, Scale, SkipStep, RollBack}
    assert all(signal(rule.signal).key == rule.signal for rule in default_rules())


def test_the_default_rules_leave_a_quiet_run_alone() -> None:
    """A run that learns: reward rises, entropy falls by half, mismatch is rounding noise that grows."""
    rng = np.random.default_rng(4)
    rows = [
        {
            "train/reward": 0.9 - 0.4 * math.exp(-step / 100) + 0.03 * rng.normal(),
            "policy/entropy": 0.3 + 0.3 * math.exp(-step / 200) + 0.01 * rng.normal(),
            "train/grad_norm": math.exp(0.2 * rng.normal()),
            K3: 1e-10 * math.exp(step / 100 + rng.normal()),
            "mismatch/f2": 0.0,
            "completions/mean_length": 100 + step / 50 + rng.normal(),
            "train/frac_reward_zero_std": 0.3,
            "step/loss": float(rng.normal()),
        }
        for step in range(600)
    ]
    assert alarms(Monitor(), rows) == []


def test_the_default_rules_tell_new_ground_from_sharpening() -> None:
    """Surprise above the noise for five steps is a drift; a policy that sharpens what it could do goes below 0."""

    def opened(values: list[float]) -> list[tuple[int, str]]:
        return [
            (alarm.step, alarm.cause) for alarm in alarms(Monitor(), [{"drift/initial/surprise": x} for x in values])
        ]

    assert opened([0.0] * 10 + [0.1, 0.1, 0.1, 0.1, 0.0] * 4 + [-0.3] * 20) == []
    assert opened([0.0] * 10 + [0.06] * 10)[0][1] == "drift"


def test_the_default_rules_foresee_spent_entropy() -> None:
    """Two forecasts in a row; one alone, or a trend that has ended, says nothing."""
    rows = [{"forecast/policy/entropy": left} for left in (90.0, 60.0, 70.0, 40.0, math.inf, 60.0, 59.0)]
    found = alarms(Monitor(), rows)
    assert [(alarm.cause, alarm.since) for alarm in found] == [("exploration", found[0].step - 1)]


def test_rules_are_data() -> None:
    assert Rule(signal=K3, detector=Level(above=0.5)) == Rule(signal=K3, detector=Level(above=0.5))
    assert len({WARN, CRITICAL, WARN}) == 2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Rule(signal="mismatch/k33", detector=NonFinite()), SchemaError, "did you mean mismatch/k3"),
        (lambda: Rule(signal=K3, detector=NonFinite), ConfigError, "Rule.detector: expected a detector"),  # type: ignore[arg-type]
        (lambda: Rule(signal=K3, detector=NonFinite(), severity="bad"), ConfigError, "Rule.severity"),  # type: ignore[arg-type]
        (lambda: Rule(signal=K3, detector=NonFinite(), agreement=0), ConfigError, "Rule.agreement: expected at least"),
        (lambda: Monitor(budget=0.0), ConfigError, "Monitor.budget: expected false alarms per 1000 steps > 0"),
        (lambda: Monitor(cooldown=0), ConfigError, "Monitor.cooldown"),
        (lambda: Notify(), ConfigError, "Notify: expected a command, or a webhook or its variable, or both, got"),
        (
            lambda: Notify(webhook="https://secret.example", webhook_variable="HOOK"),
            ConfigError,
            r"got \['webhook', 'webhook_variable'\]",
        ),
        (lambda: Notify(command="mail me"), ConfigError, "Notify.command: expected a list"),  # type: ignore[arg-type]
        (lambda: Notify(webhook="file:///etc/passwd"), ConfigError, "Notify.webhook: expected an http or https"),
        (lambda: Scale(target="lr"), ConfigError, "Scale.target: expected 'learning_rate' or 'coefficient/TERM'"),
        (lambda: Scale(factor=0.0), ConfigError, "Scale.factor: expected a number > 0"),
        (lambda: Scale(least=2.0), ConfigError, "Scale: expected least ≤ 1 ≤ most"),
    ],
)
def test_bad_rules_are_refused(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]
