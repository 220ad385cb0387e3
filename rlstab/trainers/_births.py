"""Where a number that is not finite was born."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Birth", "first_bad_output", "trace"]


class Birth(NamedTuple):
    """Where values stopped being finite.

    Args:
        where: "weights", "forward" or "gradient".
        names: for weights and gradient, the tensors that hold such a value, five at most; for forward, the first
            module that gave one while what it was given was finite.
    """

    where: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"born in the {self.where}: {', '.join(self.names)}"


def trace(
    model: nn.Module,
    forward: tuple[tuple[Any, ...], Mapping[str, Any]] | None,
    gradients: Mapping[str, Tensor],
) -> Birth | None:
    """Find where a step's numbers stopped being finite; runs the last forward of the step again, without gradient.

    Args:
        model: the policy in training.
        forward: positional and named arguments of the forward to look into, if there was one.
        gradients: norm of every gradient, before it was clipped.

    Returns:
        The first of weights, forward, gradient that is not finite; None if all are, as when only the loss was not.

    >>> layer = nn.Linear(1, 1)
    >>> _ = layer.weight.data.fill_(torch.inf)
    >>> print(trace(layer, None, {}))
    born in the weights: weight
    """
    if bad := _bad({name: parameter.detach() for name, parameter in model.named_parameters()}):
        return Birth("weights", bad)
    if forward is not None and (module := first_bad_output(model, *forward)):
        return Birth("forward", (module,))
    bad = _bad(gradients)
    return Birth("gradient", bad) if bad else None


def first_bad_output(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Name of the first module, innermost first, whose output is not finite though its inputs are.

    The model keeps its mode, and the generators of random numbers go on as if nothing had been run.
    """
    found: list[str] = []
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}

    def look(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        if not found and _finite((inputs, named)) and not _finite(output):
            found.append(f"{names[module]} ({type(module).__name__})")

    handles = [module.register_forward_hook(look, with_kwargs=True) for module in model.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _bad(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    return tuple(name for name, tensor in tensors.items() if not bool(tensor.isfinite().all()))[:5]


def _finite(value: Any) -> bool:
    """Whether no float tensor in it is NaN or +inf; −inf is how attention masks say no."""
    match value:
        case Tensor():
            return not value.is_floating_point() or not bool((value.isnan() | value.isposinf()).any())
        case Mapping():
            return all(map(_finite, value.values()))
        case tuple() | list():
            return all(map(_finite, value))
    return True
