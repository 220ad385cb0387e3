"""Size and shape of the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rlstab.probes._probe import Probe, decoder_layers, evenly


class Activations(Probe):
    r"""Kurtosis, root mean square and massive activations of the residual stream, the worst of the sampled layers.

    | signal | of a layer's output $x$ at a position |
    |---|---|
    | `activation/kurtosis` | $\mathrm{mean}_j\, x_j^4 / (\mathrm{mean}_j\, x_j^2)^2$, in $[1, D]$, mean over tokens |
    | `activation/rms` | $\sqrt{\mathrm{mean}\, x^2}$ |
    | `activation/massive` | $\max \lvert x\rvert / \mathrm{median} \lvert x\rvert$ |

    Args:
        layers: how many layers are sampled, evenly over the depth.

    Reference: Hernández-Cano et al., Towards Fully FP8 GEMM LLM Training at Scale,
    https://arxiv.org/abs/2505.20524 (kurtosis); Sun et al., Massive Activations in Large Language Models,
    https://arxiv.org/abs/2402.17762.

    >>> layer_stack = nn.Module()
    >>> layer_stack.layers = nn.ModuleList([nn.Identity()])
    >>> probe = Activations(layers=4)
    >>> probe.attach(layer_stack); probe.detach()
    """

    def __init__(self, *, layers: int = 8) -> None:
        super().__init__()
        self._layers = layers

    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        """Hooks on the outputs of the sampled layers."""
        return [
            layer.register_forward_hook(self._looker(name))
            for name, layer in evenly(list(decoder_layers(model).items()), self._layers)
        ]

    def _looker(self, name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if self._wants(name):
                self._found[name] = shape_of(self._sampled(output[0] if isinstance(output, tuple) else output))

        return look

    def summary(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The largest of each over the layers."""
        kurtosis, rms, massive = torch.stack(list(found.values())).amax(0)
        return {"activation/kurtosis": kurtosis, "activation/rms": rms, "activation/massive": massive}


def shape_of(x: Float[Tensor, "N D"]) -> Float[Tensor, "3"]:
    """Mean kurtosis, root mean square, and the largest value in units of the median size.

    >>> shape_of(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
    tensor([1., 1., 1.])
    """
    square = x.square()
    kurtosis = (square.square().mean(-1) / square.mean(-1).square().clamp(min=1e-30)).mean()
    size = x.abs()
    return torch.stack([kurtosis, square.mean().sqrt(), size.amax() / size.median().clamp(min=1e-30)])
