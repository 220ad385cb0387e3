"""Spectral alignment: have the inputs of a layer come to lie on one side of its leading singular vector?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rlstab.errors import ConfigError
from rlstab.probes._probe import Probe, decoder_layers, evenly

PROJECTIONS = ("q_proj", "k_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
FIRST_ITERATIONS, LATER_ITERATIONS = 100, 2
ONE_SIDED, RISE = 0.95, 0.2


class SpectralAlignment(Probe):
    r"""Sign diversity of the alignment between a layer's inputs and its leading input-side singular vector.

    $$\mathrm{SA}(h) = \cos(h, v_1), \qquad W v_1 = \sigma_1 u_1$$

    In a healthy layer both signs occur. `spectral/sign_collapse` is the mean over sampled layers of
    max(p₊, 1 − p₊); `spectral/one_sided` is the share of layers where it is above 0.95 and at least 0.2 above the
    layer's own start, so that layers which were one-sided from the first do not count; `spectral/alignment` is the mean
    size of the mean cosine.

    $v_1$ is followed by power iteration that goes on from where it stood: 100 products at first, two at each later
    measurement. It means little where σ₂/σ₁ is close to 1. Of an adapter's layer only the base weight is looked at.

    Args:
        layers: how many decoder layers are sampled, evenly; of each, its linear projections.

    Raises:
        ConfigError: on `attach`, if the sampled layers have no linear projections.

    Reference: Spectral Alignment as Predictor of Loss Explosion in Neural Network Training,
    https://arxiv.org/abs/2510.04202 (the statistic; the bounds here are ours, as it gives none).

    >>> SpectralAlignment(layers=4).state_dict()
    {'start': {}}
    """

    def __init__(self, *, layers: int = 4) -> None:
        super().__init__()
        self._layers = layers
        self._start: dict[str, float] = {}
        self._directions: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}

    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        """Hooks on the inputs of the sampled projections."""
        sampled = {
            f"{name}.{inner}": module
            for name, layer in evenly(list(decoder_layers(model).items()), self._layers)
            for inner, module in layer.named_modules()
            if isinstance(module, nn.Linear) and any(kind in inner.split(".") for kind in PROJECTIONS)
        }
        if not sampled:
            raise ConfigError(f"SpectralAlignment: expected linear layers named {', '.join(PROJECTIONS)}, found none")
        return [module.register_forward_pre_hook(self._looker(name)) for name, module in sampled.items()]

    def _looker(self, name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not self._wants(name):
                return
            assert isinstance(module, nn.Linear)
            weight = module.weight.detach().float()
            known = self._directions.get(name)
            self._directions[name] = leading_direction(weight, known)
            cosines = alignment(self._sampled(inputs[0]), self._directions[name])
            self._found[name] = torch.stack([one_sidedness(cosines), cosines.mean().abs()])

        return look

    def summary(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Means over the sampled layers, and the share of those that have become one-sided."""
        sides, means = torch.stack(list(found.values())).unbind(-1)
        self._settle_start()
        if not self._start:
            self._pending = {name: values[0] for name, values in found.items()}
        device = sides.device
        start = torch.tensor([self._start.get(name, 1.0) for name in found], device=device)
        collapsed = (sides > ONE_SIDED) & (sides > start + RISE)
        return {
            "spectral/one_sided": collapsed.float().mean(),
            "spectral/sign_collapse": sides.mean(),
            "spectral/alignment": means.mean(),
        }

    def _settle_start(self) -> None:
        """Take the first measurement as each layer's start; it is long computed, so that nothing waits."""
        if self._pending:
            self._start = {name: float(value) for name, value in self._pending.items()}
            self._pending = {}

    def state_dict(self) -> dict[str, Any]:
        """Where each layer started; the directions are found anew."""
        self._settle_start()
        return {"start": dict(self._start)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._start, self._pending = dict(state["start"]), {}


@torch.no_grad()
def leading_direction(weight: Float[Tensor, "out in"], known: Float[Tensor, "in"] | None = None) -> Float[Tensor, "in"]:
    """The input-side singular vector of the largest singular value, by power iteration on WᵀW.

    Args:
        weight: the matrix.
        known: the vector of a little while ago, which takes two steps; without, it takes a hundred from a fixed start.

    >>> leading_direction(torch.tensor([[3.0, 0.0], [0.0, 1.0]])).abs()
    tensor([1., 0.])
    """
    if known is None:
        start = torch.Generator().manual_seed(0)
        vector = torch.randn(weight.shape[1], generator=start).to(weight.device)
    else:
        vector = known
    for _ in range(FIRST_ITERATIONS if known is None else LATER_ITERATIONS):
        vector = torch.mv(weight.T, torch.mv(weight, vector))
        vector = vector / vector.norm().clamp(min=1e-30)
    return vector


def alignment(inputs: Float[Tensor, "N in"], direction: Float[Tensor, "in"]) -> Float[Tensor, "N"]:
    """Cosine of every input with a direction of length 1.

    >>> alignment(torch.tensor([[2.0, 0.0], [0.0, -1.0]]), torch.tensor([1.0, 0.0]))
    tensor([1., 0.])
    """
    along = torch.mv(inputs, direction)
    length: Tensor = torch.linalg.vector_norm(inputs, dim=-1)
    return along / length.clamp(min=1e-30)


def one_sidedness(cosines: Float[Tensor, "N"]) -> Float[Tensor, ""]:
    """Share of the majority sign among cosines that are not zero, in [1/2, 1]; 1/2 where all are.

    >>> one_sidedness(torch.tensor([0.5, 0.1, -0.2, 0.0]))
    tensor(0.6667)
    """
    positive, negative = (cosines > 1e-6).sum(), (cosines < -1e-6).sum()
    both = positive + negative
    return torch.where(both > 0, torch.maximum(positive, negative) / both.clamp(min=1), 0.5)
