"""What decides on the gradient of an optimizer step from its norm: leave it, scale it down, or drop it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from rlstab.errors import ConfigError


def whole(value: Tensor) -> Tensor:
    """A number of all shards as a plain tensor: sharded sums and extremes are joined over their ranks."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """The shard of this rank, sharing memory; a tensor that is not sharded is that itself."""
    return value.to_local() if isinstance(value, DTensor) else value


def global_norm(parameters: Iterable[Tensor]) -> float:
    """The 2-norm of all gradients together, over all shards of all ranks.

    Args:
        parameters: parameters, sharded (`DTensor`, as FSDP2 makes them) or not; those without a gradient count 0.

    Returns:
        The norm; NaN or infinite if a gradient is.

    Example:
        >>> import torch
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> global_norm([weight])
        5.0
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    return float(whole(get_total_norm(gradients))) if gradients else 0.0


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is done with the gradient of a step.

    Args:
        norm: its norm as it came.
        limit: the norm it is scaled down to; None leaves it.
        skip: whether the step is left out.
        reason: why, for the log; empty where nothing is done.

    Example:
        >>> Decision(norm=5.0, limit=1.0, reason="z = 28.7 > 2.5").applied_norm
        1.0
    """

    norm: float
    limit: float | None = None
    skip: bool = False
    reason: str = ""

    @property
    def applied_norm(self) -> float:
        """The norm of what reaches the optimizer."""
        if self.skip:
            return 0.0
        return self.norm if self.limit is None else min(self.norm, self.limit)


class GradientStabiliser(ABC):
    """Decides on each optimizer step from the norm of its gradient. Abstract: `decide` holds the rule.

    It must see gradients before anything else has clipped them. Every rank comes to the same decision, because the norm
    is that of all shards.

    Example:
        >>> import torch
        >>> class Halve(GradientStabiliser):
        ...     def decide(self, norm: float) -> Decision:
        ...         return Decision(norm=norm, limit=norm / 2, reason="as an example")
        ...
        ...     def state_dict(self) -> dict[str, Any]:
        ...         return {}
        ...
        ...     def load_state_dict(self, state: dict[str, Any]) -> None:
        ...         pass
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> decision = Halve().apply([weight])
        >>> weight.grad
        tensor([1.5000, 2.0000])
    """

    @abstractmethod
    def decide(self, norm: float) -> Decision:
        """What to do with a gradient of this norm; takes note of it."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""

    def apply(self, parameters: Iterable[Tensor]) -> Decision:
        """Scale the gradients in place, or drop them (`grad = None`), as decided.

        With all gradients dropped an optimizer leaves weights, moments and counters as they are.
        """
        parameters = list(parameters)
        decision = self.decide(global_norm(parameters))
        if decision.skip:
            for parameter in parameters:
                parameter.grad = None
        elif decision.limit is not None:
            share = min(1.0, decision.limit / (decision.norm + 1e-6))
            for parameter in parameters:
                if parameter.grad is not None:
                    local(parameter.grad).mul_(share)
        return decision


class Chain(GradientStabiliser):
    """Several stabilisers on the same norm: one that skips decides, else the lowest limit holds.

    A step that one of them leaves out is not shown to those after it, so that they do not learn from it.

    Args:
        parts: the stabilisers, in their order.

    Raises:
        ConfigError: without any, or for something else.

    Example:
        >>> from rlstab.optim import SkipSpikes, ZClip
        >>> Chain([SkipSpikes(), ZClip(max_norm=1.0)]).decide(2.0).limit
        1.0
    """

    def __init__(self, parts: Sequence[GradientStabiliser]) -> None:
        strangers = [part for part in parts if not isinstance(part, GradientStabiliser)]
        if not parts or strangers:
            raise ConfigError(f"Chain.parts: expected stabilisers such as [SkipSpikes(), ZClip()], got {parts!r}")
        self.parts = tuple(parts)

    def decide(self, norm: float) -> Decision:
        """The first to skip, or the lowest limit."""
        lowest = Decision(norm=norm)
        for part in self.parts:
            decision = part.decide(norm)
            if decision.skip:
                return decision
            if (math.inf if decision.limit is None else decision.limit) < (lowest.limit or math.inf):
                lowest = decision
        return lowest

    def state_dict(self) -> dict[str, Any]:
        """The states of the parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same parts."""
        if len(state["parts"]) != len(self.parts):
            raise ConfigError(
                f"the checkpoint holds {len(state['parts'])} gradient stabilisers, this chain {len(self.parts)}: "
                "resume with the chain that was saved"
            )
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
