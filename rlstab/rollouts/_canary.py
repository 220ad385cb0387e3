"""Visible changes of a policy that are undone exactly, to see whether an engine follows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlstab.models import isolated_rng
from rlstab.rollouts._weights import base_model

__all__ = ["perturbed", "weight_groups"]

NOISE = 0.2
"""Size of the change, in units of the root mean square of each tensor."""

SMALLEST = 0.02
"""Root mean square that tensors are taken to have at least, such as those of adapters that start at zero."""


@contextmanager
def perturbed(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Noise on the parameters inside the block, always the same; their very bits come back after it."""
    before = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        with isolated_rng(0), torch.no_grad():
            for parameter in parameters:
                noise = torch.randn(parameter.shape).to(parameter)
                scale = parameter.float().square().mean().sqrt().clamp(min=SMALLEST)
                parameter.add_(NOISE * scale.to(parameter) * noise)
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data.copy_(value)


def weight_groups(model: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """The parameters by how an engine may come to lose them; those that are most easily lost first.

    Quantised ones, which are not trained, are left out.
    """
    base = base_model(model)
    head = base.get_output_embeddings()
    heads: list[nn.Parameter] = [] if head is None else list(head.parameters())
    embedding: set[int] = {id(parameter) for parameter in base.get_input_embeddings().parameters()}
    tied = [parameter for parameter in heads if id(parameter) in embedding]
    groups: dict[str, list[nn.Parameter]] = {"tied head": tied, "experts": [], "adapters": [], "head": [], "layers": []}
    for name, parameter in model.named_parameters():
        if any(parameter is one for one in tied) or not parameter.is_floating_point():
            continue
        kind = "experts" if ".experts." in name else "adapters" if "lora_" in name else "layers"
        groups["head" if any(parameter is one for one in heads) else kind].append(parameter)
    return {name: parameters for name, parameters in groups.items() if parameters}


def share_followed(trainer: Tensor, engine: Tensor) -> float:
    """How much of a change of the trainer's log-probs is found in the engine's: 1 is all of it, at most 0 none."""
    return float(1 - (engine - trainer).square().mean().sqrt() / trainer.square().mean().sqrt())
