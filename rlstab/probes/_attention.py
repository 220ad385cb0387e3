"""Entropy and logits of attention, through the registered attention function: the output is the stock one's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlstab.errors import ConfigError
from rlstab.probes._probe import Probe, decoder_layers, evenly

ROWS = 16
STOCK = ("sdpa", "eager")
_looking: WeakKeyDictionary[nn.Module, Callable[..., None]] = WeakKeyDictionary()


class Attention(Probe):
    r"""How widely attention spreads, and how large its logits grow.

    For a sampled row with logits $z$ over the $n$ keys it sees, $H = -\sum_j A_j \log A_j$, $A = \mathrm{softmax}(z)$:
    `attention/entropy` is the mean of $H / \log n$ over sampled rows, heads and layers, `attention/entropy_min` the
    mean over rows of the narrowest head, and `attention/logit_max` the largest $z$. Rows that see one key are left out.

    The model's attention is called through a registered function that looks and then calls the stock one, so that the
    output is the same bit for bit. For models whose attention is "sdpa" (the default on most machines).

    Args:
        layers: how many layers are sampled, evenly over the depth.
        heads: how many heads of each.

    Raises:
        ConfigError: on `attach`, if the model's attention is another one.

    Reference: Zhai et al., Stabilizing Transformer Training by Preventing Attention Entropy Collapse,
    https://arxiv.org/abs/2303.06296; Wortsman et al., Small-scale proxies for large-scale Transformer training
    instabilities, https://arxiv.org/abs/2309.14322.

    >>> Attention(layers=2, heads=2).collect()
    {}
    """

    def __init__(self, *, layers: int = 8, heads: int = 2) -> None:
        super().__init__()
        self._layers, self._heads = layers, heads
        self._model: PreTrainedModel | None = None

    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        """Let the sampled layers' attention be looked at; the rest goes straight through."""
        own = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        if not own or own[0].config._attn_implementation != "sdpa":
            found = own[0].config._attn_implementation if own else type(model).__name__
            raise ConfigError(f"Attention: expected a model with attn_implementation='sdpa', got {found!r}")
        for name, layer in evenly(list(decoder_layers(model).items()), self._layers):
            for child_name, child in layer.named_modules():
                if "scaling" in vars(child) and "layer_idx" in vars(child):
                    _looking[child] = self._looker(f"{name}.{child_name}")
        self._model = own[0]
        self._model.set_attn_implementation(NAME)
        return []

    def detach(self) -> None:
        """Give the model its own attention back."""
        super().detach()
        if self._model is not None:
            self._model.set_attn_implementation("sdpa")
            for module in self._model.modules():
                _looking.pop(module, None)
            self._model = None

    def _looker(self, name: str) -> Callable[..., None]:
        def look(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
            if self._wants(name) and self._rows is not None:
                rows = self._rows[:: len(self._rows) // ROWS]
                logits, visible = row_logits(query, key, mask, scaling, rows=rows, heads=self._heads)
                self._found[name] = of_rows(logits, visible)

        return look

    def summary(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean, narrowest and largest over the sampled layers."""
        mean, narrowest, largest = torch.stack(list(found.values())).unbind(-1)
        return {
            "attention/entropy": mean.mean(),
            "attention/entropy_min": narrowest.amin(),
            "attention/logit_max": largest.amax(),
        }


@torch.no_grad()
def row_logits(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, *, rows: Tensor, heads: int
) -> tuple[Float[Tensor, "N H K"], Bool[Tensor, "N H K"]]:
    """Attention logits of sampled rows and heads, and which keys each row sees.

    Args:
        query: `[B, Hq, S, D]`, after rotation.
        key: `[B, Hkv, T, D]`, of which each serves Hq / Hkv heads.
        mask: `[B, 1, S, T]`, bool or additive; None for causal attention.
        scaling: factor of the scores.
        rows: flat indices into `[B, S]`.
        heads: how many heads are sampled, evenly.
    """
    length, keys = query.shape[2], key.shape[2]
    row, position = rows // length, rows % length
    chosen = evenly(list(range(query.shape[1])), heads)
    of_key = [head * key.shape[1] // query.shape[1] for head in chosen]
    q, k = query[row, :, position][:, chosen].float(), key[row][:, of_key].float()
    logits = torch.einsum("nhd,nhkd->nhk", q, k) * scaling
    if mask is None:
        seen = torch.arange(keys, device=rows.device) <= position.unsqueeze(-1) + keys - length
    else:
        line = mask[row.clamp(max=mask.shape[0] - 1), 0].gather(
            1, position.view(-1, 1, 1).expand(-1, 1, mask.shape[-1])
        )
        seen = line.squeeze(1) if mask.dtype == torch.bool else line.squeeze(1) > torch.finfo(mask.dtype).min / 2
    return logits, seen[:, None, :keys].expand_as(logits)


def of_rows(logits: Float[Tensor, "N H K"], visible: Bool[Tensor, "N H K"]) -> Float[Tensor, "3"]:
    """Mean normalised entropy, that of the narrowest head, and the largest logit; NaN where no row sees two keys."""
    count = visible.sum(-1)
    share = attention_entropy(logits, visible) / count.clamp(min=2).log()
    share = torch.where(count > 1, share, torch.nan)
    return torch.stack([share.nanmean(), share.nanmean(0).amin(), logits.masked_fill(~visible, -torch.inf).amax()])


def attention_entropy(
    logits: Float[Tensor, "*rows K"], visible: Bool[Tensor, "*rows K"] | None = None
) -> Float[Tensor, "*rows"]:
    """Entropy of the softmax over the visible keys, in nats; 0 where none is visible.

    >>> attention_entropy(torch.zeros(4))
    tensor(1.3863)
    """
    if visible is not None:
        logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    log_p = logits.log_softmax(-1)
    terms = log_p.exp() * log_p
    return -(terms if visible is None else terms.masked_fill(~visible, 0.0)).sum(-1)


def entropy_bound(sigma: float, keys: int) -> float:
    r"""The least entropy that logits of a given norm can have.

    $$H \ge \log(1 + (T-1)\beta) + \frac{\sigma\sqrt{T(T-1)}\,\beta}{1 + (T-1)\beta},
    \qquad \beta = e^{-\sigma\sqrt{T/(T-1)}}$$

    Attained by one logit of $\sigma\sqrt{(T-1)/T}$ and the rest at $-\sigma/\sqrt{T(T-1)}$.

    Args:
        sigma: norm of the row of logits, at most scaling · ‖q‖ · σ_max(K).
        keys: number T of visible keys, at least 2.

    Returns:
        The bound in nats.

    Reference: Zhai et al., Stabilizing Transformer Training by Preventing Attention Entropy Collapse, theorem 3.1,
    https://arxiv.org/abs/2303.06296

    >>> round(entropy_bound(0.0, 4), 4)
    1.3863
    """
    beta = math.exp(-sigma * math.sqrt(keys / (keys - 1)))
    whole = 1 + (keys - 1) * beta
    return math.log(whole) + sigma * math.sqrt(keys * (keys - 1)) * beta / whole


NAME = "rlstab_sdpa"


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, Tensor | None]:
    """The stock function, after whoever looks at this module has looked."""
    if (look := _looking.get(module)) is not None:
        look(query, key, attention_mask, others.get("scaling") or query.shape[-1] ** -0.5)
    result: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, **others
    )
    return result


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
