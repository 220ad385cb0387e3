"""The head of a transformers model, as `rlstab.losses` takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from rlstab.errors import ConfigError
from rlstab.losses import Head

__all__ = ["language_head"]

# Configurations call these by many names.
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere, MPT; Muse Glimmer; Falcon-H1
DIVISOR = "logits_scaling"  # Granite, MiniCPM3
MULTIPLIES_ALL_THE_SAME = ("hyperclovax",)
CAP = "final_logit_softcapping"  # Gemma, NanoChat


def language_head(
    model: Any,
    *,
    temperature: float = 1.0,
    gather: Callable[[Tensor, Tensor | None], AbstractContextManager[object]] | None = None,
) -> Head:
    """The last layer of a causal language model, with what its configuration does to the logits.

    Weight and bias are the model's own: a gradient in them is a gradient in the model, with tied embeddings too.

    Args:
        model: a transformers model with an output embedding, text or multimodal; of a PEFT model, the base model.
        temperature: divisor of the logits, applied last.
        gather: makes sharded weights whole for a while; see `rlstab.losses.Head`.

    Returns:
        The head: bias, scale (Cohere, Granite, Falcon-H1, ...) and soft-cap (Gemma) as the model applies them.

    Raises:
        ConfigError: if the model has no output embedding.

    Example:
        >>> from rlstab.models import tiny_causal_lm, tiny_tokenizer
        >>> model = tiny_causal_lm(tiny_tokenizer("0123456789="))
        >>> language_head(model, temperature=0.7).weight is model.lm_head.weight
        True
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise ConfigError(f"{type(model).__name__} has no output embedding: expected a causal language model")
    config = model.config.get_text_config()
    values = vars(config)
    return Head(
        weight=layer.weight,
        bias=layer.bias,
        temperature=temperature,
        soft_cap=_first(values, (CAP,)),
        logit_scale=_scale(values, config.model_type),
        gather=gather,
    )


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> float | None:
    return next((float(values[name]) for name in names if values.get(name) is not None), None)


def _scale(values: Mapping[str, Any], family: str) -> float:
    factor = _first(values, FACTORS)
    if factor is not None:
        return factor
    scaling = _first(values, (DIVISOR,))
    if scaling is None:
        return 1.0
    return scaling if family in MULTIPLIES_ALL_THE_SAME else 1 / scaling
