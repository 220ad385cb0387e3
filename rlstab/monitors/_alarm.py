"""What the monitor says: alarms, their evidence, and the actions that are due."""

from dataclasses import dataclass
from typing import Any, Literal

from rlstab.monitors._actions import Action
from rlstab.monitors._rules import CAUSES, Rule, Severity

Change = Literal["opened", "escalated", "cleared"]
"""What became of an alarm: it is new, it got worse, it is over."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One rule that was raised.

    Args:
        signal: key of the signal.
        since: step since which it is out of order.
        finding: value and bound in words.
    """

    signal: str
    since: int
    finding: str

    def __str__(self) -> str:
        return f"{self.signal} {self.finding}, since step {self.since}"


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One cause that is out of order, whatever the number of rules and steps that say so.

    Args:
        cause: name of the cause.
        change: "opened", "escalated" or "cleared".
        severity: that of the worst rule raised.
        step: step at which this was said.
        since: first step of the evidence.
        evidence: the rules that were raised so far, in the order in which they were.
    """

    cause: str
    change: Change
    severity: Severity
    step: int
    since: int
    evidence: tuple[Evidence, ...]

    def __str__(self) -> str:
        known = CAUSES.get(self.cause)
        title = f"{self.cause}: {known.title}" if known else self.cause
        if self.change == "cleared":
            return f"step {self.step}: {title}: over"
        findings = "; ".join(map(str, self.evidence))
        return f"step {self.step}: {self.severity}: {title} ({findings})" + (f". {known.remedy}" if known else "")

    def fields(self) -> dict[str, Any]:
        """The alarm as data, for an event."""
        return {
            "cause": self.cause,
            "change": self.change,
            "severity": self.severity,
            "since": self.since,
            "evidence": [vars(item) for item in self.evidence],
            "message": str(self),
        }


@dataclass(frozen=True, kw_only=True)
class Due:
    """An action that is to be taken now.

    Args:
        action: what to do.
        rule: the rule that asks for it.
        since: step since which its signal is out of order.
        finding: why, in words.
    """

    action: Action
    rule: Rule
    since: int
    finding: str


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What one look at the signals led to.

    Args:
        alarms: those that opened, got worse or are over.
        due: the actions to take.
    """

    alarms: tuple[Alarm, ...] = ()
    due: tuple[Due, ...] = ()
