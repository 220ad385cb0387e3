"""What is done about an alarm: telling people, and turning the learning rate or a coefficient."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.request import Request, urlopen

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rlstab.errors import ConfigError
from rlstab.losses import Controller, Objective
from rlstab.monitors import Notify, Scale

__all__ = ["Messenger", "Scaling", "check_scale"]

logger = logging.getLogger("rlstab")


class Messenger:
    """Runs commands and posts to addresses, one after the other, beside the training. What fails is logged."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def send(self, action: Notify, message: Mapping[str, Any]) -> None:
        """Hand a message over as JSON, without waiting for it to arrive."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rlstab-notify")
        self._pool.submit(_deliver, action, json.dumps(message, ensure_ascii=False).encode())

    def close(self) -> None:
        """Wait for what is on its way; each part of it has a time limit of its own."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None


def _deliver(action: Notify, body: bytes) -> None:
    try:
        if action.command:
            subprocess.run(action.command, input=body, timeout=action.timeout, check=True, capture_output=True)
        if address := action.address():
            request = Request(address, body, {"Content-Type": "application/json"})
            urlopen(request, timeout=action.timeout).close()
    except (OSError, subprocess.SubprocessError, ConfigError) as error:
        logger.warning("an alarm could not be handed on: %s", error)


class Scaling:
    """Factors on the learning rate and on coefficients: their products, and turning the run to them.

    Args:
        optimizer: whose groups hold the learning rate.
        scheduler: whose base rates are what it will be set from.
        trainer: one with an objective, for coefficients.
    """

    def __init__(self, optimizer: Optimizer, scheduler: Any, trainer: Any = None) -> None:
        self._optimizer, self._scheduler, self._trainer = optimizer, scheduler, trainer
        self.products: dict[str, float] = {}

    def apply(self, action: Scale) -> float:
        """Multiply once more, within bounds.

        Returns:
            The product of all factors on this target.
        """
        self.turn({**self.products, action.target: action.applied(self.products.get(action.target, 1.0))})
        return self.products[action.target]

    def turn(self, products: Mapping[str, float]) -> None:
        """Set the run to these products, from the ones it is at."""
        for target in {**self.products, **products}:
            ratio = products.get(target, 1.0) / self.products.get(target, 1.0)
            if target == "learning_rate":
                self._turn_learning_rate(ratio)
            else:
                _turn_coefficient(self._trainer, target.partition("/")[2], ratio)
        self.products = dict(products)

    def _turn_learning_rate(self, ratio: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] *= ratio
            if "initial_lr" in group:
                group["initial_lr"] *= ratio
        if isinstance(self._scheduler, LRScheduler):
            self._scheduler.base_lrs = [rate * ratio for rate in self._scheduler.base_lrs]
            self._scheduler._last_lr = [group["lr"] for group in self._optimizer.param_groups]


def _turn_coefficient(trainer: Any, name: str, ratio: float) -> None:
    objective = trainer.objective
    terms = {**objective.terms, name: ratio * objective.terms[name]}
    trainer.objective = Objective(terms, advantage=objective.advantage)


def check_scale(action: Scale, objective: Objective | None) -> None:
    """Raise `ConfigError` unless there is such a coefficient to turn.

    >>> check_scale(Scale(target="coefficient/drift"), None)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    rlstab.errors.ConfigError: Scale.target='coefficient/drift': this trainer has no objective, only ...
    """
    if not action.term:
        return
    if objective is None:
        raise ConfigError(
            f"Scale.target={action.target!r}: this trainer has no objective, only the learning rate can be turned; "
            "use StableGRPOTrainer for coefficients"
        )
    if action.term not in objective.terms:
        raise ConfigError(f"Scale.target={action.target!r}: expected one of the terms {sorted(objective.terms)}")
    if isinstance(objective.terms[action.term].coef, Controller):
        raise ConfigError(f"Scale.target={action.target!r}: the coefficient is a controller's, which sets it itself")
