"""What may be done about an alarm, as data. Doing it is the business of the trainers."""

import math
import os
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import urlsplit

from rlstab.errors import ConfigError
from rlstab.monitors._checks import check


@dataclass(frozen=True, kw_only=True)
class Action:
    """Base of what may be done when a rule is raised. An alarm is noted in the run folder and the log in any case."""

    urgent: ClassVar[bool] = False
    """Whether it is due at each step that is out of order, before the optimizer moves, and not once per alarm."""


@dataclass(frozen=True, kw_only=True)
class Note(Action):
    """Nothing beside the alarm itself: an event in the run folder, a line in the log.

    >>> Note().urgent
    False
    """


def is_address(text: str) -> bool:
    """Whether something can be posted to it.

    >>> is_address("file:///etc/passwd")
    False
    """
    return urlsplit(text).scheme in ("http", "https")


@dataclass(frozen=True, kw_only=True)
class Notify(Action):
    """Tell somebody: run a command, or post to an address. The alarm is handed over as JSON.

    Args:
        command: program and arguments, run without a shell; the alarm is its standard input.
        webhook: http or https address to post the alarm to.
        webhook_variable: environment variable that holds such an address: one that is a secret stands in no file then.
        timeout: seconds after which neither is waited for.

    Raises:
        ConfigError: none is given, or the address is none of http.

    >>> Notify(command=("mail", "-s", "rlstab", "me@example.org")).timeout
    10.0
    """

    command: tuple[str, ...] = ()
    webhook: str | None = None
    webhook_variable: str | None = None
    timeout: float = 10.0

    def __post_init__(self) -> None:
        check(not isinstance(self.command, str), "Notify.command", "a list of program and arguments", self.command)
        object.__setattr__(self, "command", tuple(self.command))
        given = [name for name in ("command", "webhook", "webhook_variable") if vars(self)[name]]
        one_address = not {"webhook", "webhook_variable"} <= set(given)
        check(bool(given) and one_address, "Notify", "a command, or a webhook or its variable, or both", given)
        check(not self.webhook or is_address(self.webhook), "Notify.webhook", "an http or https address", self.webhook)
        check(0 < self.timeout < math.inf, "Notify.timeout", "seconds > 0", self.timeout)

    def address(self) -> str | None:
        """Where alarms are posted to, if anywhere.

        Raises:
            ConfigError: the environment variable that should hold it does not.
        """
        if self.webhook_variable is None:
            return self.webhook
        held = os.environ.get(self.webhook_variable, "")
        if not is_address(held):
            raise ConfigError(
                f"Notify.webhook_variable: expected the environment variable {self.webhook_variable} to hold an http "
                "or https address; export it"
            )
        return held


@dataclass(frozen=True, kw_only=True)
class Scale(Action):
    """Multiply the learning rate, or the coefficient of a term of the objective.

    Args:
        target: "learning_rate", or "coefficient/TERM".
        factor: what it is multiplied by, each time.
        least: lower bound of the product of all factors.
        most: upper bound of the product of all factors.

    >>> Scale(target="coefficient/drift", factor=2.0).most
    10.0
    """

    target: str = "learning_rate"
    factor: float = 0.5
    least: float = 0.05
    most: float = 10.0

    def __post_init__(self) -> None:
        known = self.target == "learning_rate" or bool(self.term)
        check(known, "Scale.target", "'learning_rate' or 'coefficient/TERM'", self.target)
        check(0 < self.factor < math.inf, "Scale.factor", "a number > 0", self.factor)
        check(0 < self.least <= 1 <= self.most < math.inf, "Scale", "least ≤ 1 ≤ most", (self.least, self.most))

    @property
    def term(self) -> str:
        """Name of the term whose coefficient is meant; empty for the learning rate."""
        return self.target.removeprefix("coefficient/") if self.target.startswith("coefficient/") else ""

    def applied(self, product: float) -> float:
        """The product of all factors after this one, within its bounds.

        >>> Scale(factor=0.5, least=0.4).applied(0.5)
        0.4
        """
        return min(max(product * self.factor, self.least), self.most)


@dataclass(frozen=True, kw_only=True)
class SkipStep(Action):
    """Leave the weights and the optimizer's moments as they are at this step.

    Only signals that are known before the optimizer moves can ask for it: the loss, the gradient, and what is measured
    on the way.

    >>> SkipStep().urgent
    True
    """

    urgent: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class RollBack(Action):
    """Go back to the last healthy snapshot, while the data goes forward; needs a guard.

    Args:
        remedy: what is changed after going back, so that the same does not come again; None for nothing.
        stop: go back to the best of the healthy snapshots and end the training there, with a checkpoint: for what comes
            again whatever is changed.

    >>> RollBack().remedy.factor
    0.5
    """

    remedy: Scale | None = Scale()
    stop: bool = False


@dataclass(frozen=True, kw_only=True)
class Stop(Action):
    """End the training after this step.

    Args:
        save: write a checkpoint first.

    >>> Stop().save
    True
    """

    save: bool = True
