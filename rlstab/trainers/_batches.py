"""From the host's dictionary of tensors to the `TokenBatch` that losses see."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlstab.batch import COLUMNS, Count, TokenBatch, as_numbers

__all__ = ["MODEL_KEYS", "completion_masks", "gather_batch", "model_inputs", "token_batch"]

MODEL_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
TEXT_KEYS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
HOST_LOGPS = {
    "old_per_token_logps": "old",
    "sampling_per_token_logps": "sampler",
}
REFERENCE_LOGPS = "rlstab_logps:"
PART = "rlstab_part:"
COMPLETE = "rlstab_complete:"
MASK, LOSS_MASK, WEIGHT = "rlstab_mask", "rlstab_loss_mask", "rlstab_weight"
WHOLE_IDS, WHOLE_MASK = "rlstab_input_ids", "rlstab_attention_mask"
"""What every pass over a part of a generation needs, made once: `completion_masks`, the second of them as numbers, and
prompts and completions as one text."""


def completion_masks(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Real completion tokens, and those of them that the policy wrote (no tool output)."""
    if LOSS_MASK in inputs:
        return inputs[MASK], inputs[LOSS_MASK]
    mask = inputs["completion_mask"].bool()
    return mask, mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


class Carried(NamedTuple):
    """What travels with a generation, by key: the sources of log-probs, the names of parts, the complete sources."""

    logps: Mapping[str, str]
    parts: Mapping[str, str]
    complete: frozenset[str]


@lru_cache(maxsize=16)  # the keys change from run to run, not from batch to batch
def carried(keys: tuple[str, ...]) -> Carried:
    """What the keys of a host dictionary say.

    >>> carried(("completion_ids", "old_per_token_logps", "rlstab_complete:old", "rlstab_part:version"))
    Carried(logps={'old_per_token_logps': 'old'}, parts={'rlstab_part:version': 'version'}, complete=frozenset({'old'}))
    """

    def named(prefix: str) -> dict[str, str]:
        return {key: key.removeprefix(prefix) for key in keys if key.startswith(prefix)}

    host = {key: source for key, source in HOST_LOGPS.items() if key in keys}
    return Carried(host | named(REFERENCE_LOGPS), named(PART), frozenset(named(COMPLETE).values()))


def model_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the host's scoring call: ids, attention, how many tokens to score, images."""
    ids, mask = (inputs[WHOLE_IDS], inputs[WHOLE_MASK]) if WHOLE_IDS in inputs else whole_text(inputs)
    images = {key: inputs[key] for key in MODEL_KEYS if key in inputs}
    return {"input_ids": ids, "attention_mask": mask, "logits_to_keep": inputs["completion_ids"].size(1), **images}


def whole_text(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Prompts and completions side by side: their ids, and which of them are real."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    return ids, torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)


def token_batch(
    inputs: Mapping[str, Any],
    *,
    logps: Mapping[str, Tensor] | None = None,
    vocab: Mapping[str, Tensor] | None = None,
    counts: Mapping[str, Count] | None = None,
    router_log_ratios: Tensor | None = None,
    zeroed: bool = False,
) -> TokenBatch:
    """The token batch of a host dictionary: what it carries, plus what was computed for this pass.

    `zeroed` says that what was computed is zero outside the loss, as what is carried is (`zero_outside_loss`).
    """
    mask, loss_mask = completion_masks(inputs)
    sources, parts, complete = carried(tuple(inputs))
    return TokenBatch(
        mask=mask,
        loss_mask=loss_mask,
        logps={**{source: inputs[key] for key, source in sources.items()}, **(logps or {})},
        advantages=inputs.get("advantages"),
        rewards=inputs.get("rlstab_rewards"),
        group=inputs.get("rlstab_group"),
        truncated=inputs.get("rlstab_truncated"),
        token_ids=inputs["completion_ids"],
        vocab=vocab or {},
        parts={name: inputs[key] for key, name in parts.items()},
        counts=counts or {},
        router_log_ratios=router_log_ratios,
        zeroed=zeroed,
        complete=complete,
        readable=mask.is_cpu,
        weights=inputs.get(WEIGHT),
    )


def zero_outside_loss(output: dict[str, Any]) -> None:
    """Set the log-probs that travel with a generation to zero where there is no loss, and note which are all finite.

    Done once for all micro-batches, with what else they all need; a note is a key without a value, which the host's
    shuffle and split let pass.
    """
    mask, loss_mask = completion_masks(output)
    output.update({MASK: mask, LOSS_MASK: loss_mask, WEIGHT: as_numbers(loss_mask)})
    output[WHOLE_IDS], output[WHOLE_MASK] = whole_text(output)
    sources = carried(tuple(output)).logps
    output.update({key: torch.where(loss_mask, output[key], 0.0) for key in sources})
    if sources:
        finite = torch.stack([output[key].isfinite().all() for key in sources]).tolist()
        output.update(
            {COMPLETE + source: None for source, whole in zip(sources.values(), finite, strict=True) if whole}
        )


def gather_batch(batch: TokenBatch, accelerator: Any) -> TokenBatch:
    """The rows of all ranks, in rank order, padded to the longest."""
    if accelerator.num_processes == 1:
        return batch

    def rows(value: Tensor | None) -> Tensor | None:
        if value is None or not value.dim():
            return value
        sent = value.int() if value.dtype == torch.bool else value  # padding makes numbers of bools, where it pads
        if value.dim() > 1:
            sent = accelerator.pad_across_processes(sent.contiguous(), dim=1)
        gathered: Tensor = accelerator.gather(sent.contiguous())
        return gathered.to(value.dtype)

    return batch.replace(
        mask=rows(batch.mask),
        loss_mask=rows(batch.loss_mask),
        logps={k: rows(v) for k, v in batch.logps.items()},
        vocab={k: rows(v) for k, v in batch.vocab.items()},
        parts={k: rows(v) for k, v in batch.parts.items()},
        **{k: rows(batch.__dict__[k]) for k in COLUMNS},
        counts={},
    )


def own_rows(value: Tensor, accelerator: Any, rows: int, width: int) -> Tensor:
    """This rank's part of a result over the rows of all ranks, cut back to its own width."""
    if not value.dim():
        return value
    start = accelerator.process_index * rows
    value = value[start : start + rows]
    return value[:, :width].contiguous() if value.dim() > 1 else value.contiguous()


def join(batches: list[TokenBatch]) -> TokenBatch:
    """The rows of the micro-batches of one generation, which share their width, as one batch."""

    def together(values: list[Tensor | None]) -> Tensor | None:
        first = values[0]
        if first is None or not first.dim():
            return first
        return torch.cat([value for value in values if value is not None])

    first = batches[0]
    return first.replace(
        **{name: together([b.__dict__[name] for b in batches]) for name in ("mask", "loss_mask", *COLUMNS)},
        **{
            name: {key: together([b.__dict__[name][key] for b in batches]) for key in first.__dict__[name]}
            for name in ("logps", "vocab", "parts")
        },
        counts={},
    )
