"""Passes of a model that end at its hidden states and head, from which whole distributions are streamed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from rlstab.batch import ExactDivergence
from rlstab.losses import Head, Statistic, streamed_statistics
from rlstab.models import language_head
from rlstab.trainers import _batches
from rlstab.trainers._host import (
    FusedCausalLMOutput,
    disable_gradient_checkpointing,
    load_balancing_loss_func,
    maybe_gather_lm_head_ctx,
)
from rlstab.trainers._references import References

__all__ = ["ExactPass", "States", "Streaming", "completion_labels", "forward_inputs", "logits_of", "whole"]

STRIPE = 4096  # rows of a head that are raised to float32 at a time
IGNORED = -100  # label of positions that are not scored
ROW_COUNTS = ("logits_to_keep", "num_images", "num_tiles")  # how the host splits a batch, nothing a model takes


class States(NamedTuple):
    """Hidden states `[N, D]` that predict the tokens with a label, and the head that makes logits of them."""

    hidden: Tensor
    head: Head


@dataclass(frozen=True)
class Streaming:
    """How hidden states become log-probs, as the host's fused head is told.

    Args:
        temperature: divisor of the logits.
        float32: whether the head works in float32, whatever autocast says.
    """

    temperature: float
    float32: bool = False

    def attach(self, model: Any, *, fused: bool = False) -> None:
        """Have `model(within=work, ...)` call `work(model, ...)` inside the forward, where wrappers gather weights.

        With `fused`, what the host asks its fused head for is streamed too, so that log-probs of all passes agree.
        """
        original = model.forward
        scores = Statistics(self)

        @functools.wraps(type(model).forward)  # generation looks at the signature
        def forward(self: Any, *args: Any, within: Any = None, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            if within is not None:
                return within(self, *args, **kwargs)
            if fused_lm_head and fused:
                found = scores(self, *args, **kwargs)
                return FusedCausalLMOutput(
                    log_probs=found["logp"], entropy=found["entropy"], aux_loss=found.get("aux_loss")
                )
            return original(*args, **({"fused_lm_head": True} if fused_lm_head else {}), **kwargs)

        model.forward = MethodType(forward, model)

    def states(self, model: Any, accelerator: Any, inputs: Mapping[str, Any], labels: Tensor) -> States:
        """Hidden states and head of a reference, without gradient. Its weights may be sharded."""
        with torch.no_grad(), accelerator.autocast():
            hidden = model(within=_labelled_states, labels=labels, **inputs)["hidden"]
        unwrapped = accelerator.unwrap_model(model)
        head = self.head(unwrapped.get_base_model() if is_peft_model(unwrapped) else unwrapped)
        if is_deepspeed_zero3_enabled():  # whose parameters alone know how to be gathered
            return States(hidden, head)
        bias = None if head.bias is None else head.bias.detach()
        # Detached, they stay those of a reference that leaves the policy's place before they are used.
        return States(hidden, replace(head, weight=head.weight.detach(), bias=bias))

    def head(self, model: Any) -> Head:
        """The head of a base model."""
        return language_head(model, temperature=self.temperature, gather=maybe_gather_lm_head_ctx)

    def precision(self, device: torch.device) -> AbstractContextManager[object]:
        """Where the head is applied: under autocast, or not."""
        return torch.autocast(device.type, enabled=False) if self.float32 else nullcontext()


@dataclass(frozen=True, eq=False)
class Statistics:
    """Work for inside a forward: log-prob, entropy and exact divergences at the tokens that have a label.

    Args:
        streaming: how hidden states become log-probs.
        divergences: which exact divergences to return, by their keys.
        references: states of the same tokens, by source.
        names: what to return of the policy's own distribution.
    """

    streaming: Streaming
    divergences: tuple[ExactDivergence, ...] = ()
    references: Mapping[str, States] = field(default_factory=dict)
    names: tuple[Statistic, ...] = ("logp", "entropy")

    def __call__(self, model: Any, *args: Any, labels: Tensor, **inputs: Any) -> dict[str, Tensor]:
        """By name, `[B, L - 1]`: the prediction of each token but the first, 0 where there is no label."""
        outputs = model.base_model(*args, **inputs, use_cache=False)
        hidden, labels, kept = _labelled(outputs.last_hidden_state, labels)
        heads = whole([self.streaming.head(model), *(states.head for states in self.references.values())])
        device = heads[0].weight.device  # of a model in parts it may be another than that of the backbone
        with self.streaming.precision(device):
            found = streamed_statistics(
                hidden.to(device),
                heads[0],
                labels.to(device),
                statistics=self.names,
                requirements=self.divergences,
                references={
                    source: (states.hidden.to(device), head)
                    for (source, states), head in zip(self.references.items(), heads[1:], strict=True)
                },
            )
        kept = kept.to(device)
        spread = {name: value.new_zeros(kept.shape).masked_scatter(kept, value) for name, value in found.items()}
        if inputs.get("output_router_logits"):
            spread["aux_loss"] = _aux_loss(model, outputs.router_logits, inputs.get("attention_mask"))
        return spread


def _labelled_states(model: Any, *args: Any, labels: Tensor, **inputs: Any) -> dict[str, Tensor]:
    outputs = model.base_model(*args, **inputs, use_cache=False)
    return {"hidden": _labelled(outputs.last_hidden_state, labels)[0]}


def _labelled(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States that predict a token with a label, those labels, and where they are."""
    labels = labels[:, 1:].to(hidden.device)
    kept = labels != IGNORED
    return hidden[:, :-1][kept], labels[kept], kept


def whole(heads: list[Head]) -> list[Head]:
    """Heads whose weights are plain tensors; FSDP2 shards them, and shared ones are gathered once."""
    tensors = [tensor for head in heads for tensor in (head.weight, head.bias)]
    full = {id(tensor): tensor.full_tensor() for tensor in tensors if isinstance(tensor, DTensor)}
    return [
        replace(head, weight=full.get(id(head.weight), head.weight), bias=full.get(id(head.bias), head.bias))
        for head in heads
    ]


@torch.no_grad()
def logits_of(states: States) -> Tensor:
    """The logits `[N, V]` of a few positions, divided by the temperature, in float32."""
    (head,) = whole([states.head])
    hidden = states.hidden.to(head.weight.device).float()
    with nullcontext() if head.gather is None else head.gather(head.weight, head.bias):
        products = [hidden @ rows.float().t() for rows in head.weight.split(STRIPE)]
        z = torch.cat(products, dim=-1) if head.bias is None else torch.cat(products, dim=-1) + head.bias.float()
    z = z * head.logit_scale
    if head.soft_cap is not None:
        z = head.soft_cap * (z / head.soft_cap).tanh()
    return z / head.temperature


def _aux_loss(model: Any, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    config = model.config.get_text_config()
    return torch.as_tensor(
        load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, attention_mask)
    )


def forward_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's forward takes of a micro-batch: ids, attention, images."""
    return {key: value for key, value in _batches.model_inputs(inputs).items() if key not in ROW_COUNTS}


def completion_labels(inputs: Mapping[str, Any], scored: Tensor) -> Tensor:
    """Labels `[B, P + C]` of a micro-batch: the completion's tokens where `scored` `[B, C]` holds."""
    completion = inputs["completion_ids"].masked_fill(~scored, IGNORED)
    return torch.cat([torch.full_like(inputs["prompt_ids"], IGNORED), completion], dim=1)


class ExactPass:
    """One pass of the policy, and one of each reference, for everything that an objective reads of whole distributions.

    Args:
        trainer: whose accelerator and policy these are.
        references: what the divergences are measured from.
        streaming: how hidden states become log-probs.
        divergences: what to compute.
        log_z: whether to return log Z, the log of the softmax's denominator, too.
    """

    def __init__(
        self,
        trainer: Any,
        references: References,
        streaming: Streaming,
        divergences: tuple[ExactDivergence, ...],
        *,
        log_z: bool = False,
    ) -> None:
        self._names: tuple[Statistic, ...] = ("logp", "entropy", "log_z") if log_z else ("logp", "entropy")
        self._trainer = trainer
        self._references = references
        self._streaming = streaming
        self._divergences = divergences
        self._sources = sorted({divergence.source for divergence in divergences})

    def __call__(
        self, model: Any, inputs: Mapping[str, Any], *, aux_loss: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Log-probs, entropy with the exact divergences, and the auxiliary loss; 0 where there is no loss."""
        accelerator = self._trainer.accelerator
        _, loss_mask = _batches.completion_masks(inputs)
        labels = completion_labels(inputs, loss_mask)
        call = forward_inputs(inputs)
        references = {source: self._reference(source, call, labels) for source in self._sources}
        call |= {"output_router_logits": True} if aux_loss else {}
        work = Statistics(self._streaming, self._divergences, references, self._names)
        with accelerator.autocast():
            found = dict(model(within=work, labels=labels, **call))
        aux = found.pop("aux_loss", None)
        width = inputs["completion_ids"].size(1)
        found = {name: value[:, -width:] for name, value in found.items()}
        return found.pop("logp"), found, aux

    def _reference(self, source: str, call: Mapping[str, Any], labels: Tensor) -> States:
        trainer = self._trainer
        policy, kwargs = trainer.model, trainer.args.gradient_checkpointing_kwargs
        with (
            disable_gradient_checkpointing(policy, kwargs),
            self._references.use(source, policy, trainer.accelerator) as reference,
        ):
            return self._streaming.states(reference, trainer.accelerator, call, labels)
