"""Draws tokens from logits: a random stream per request, so that nobody's sample depends on its neighbours."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlstab.rollouts._kept import KeptSets
from rlstab.rollouts._request import Sampling

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


class Draw(NamedTuple):
    """One token per row, its log-prob, and what each row could have drawn, if that is to be recorded."""

    token_ids: Int[Tensor, "B"]
    logprobs: Float[Tensor, "B"]
    kept: KeptSets | None


def stream_keys(seeds: Int[Tensor, "B"], places: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
    """The key of the random stream at each place of the family that a seed names."""
    return splitmix64(splitmix64(seeds, torch.zeros_like(places)), places)


def uniforms(keys: Int[Tensor, "B"], counters: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Number `counters` of each stream: uniform in [0, 1), in float64, with 52 random bits."""
    return _shift(splitmix64(keys, counters), 12).double() * 2.0**-52


def splitmix64(keys: Int[Tensor, "B"], counters: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
    """Output number `counters` of the generator SplitMix64 seeded with `keys`, as signed integers.

    Reference:
        Fast Splittable Pseudorandom Number Generators, https://doi.org/10.1145/2660193.2660195
    """
    state = keys + (counters + 1) * _GOLDEN
    state = (state ^ _shift(state, 30)) * _FIRST
    state = (state ^ _shift(state, 27)) * _SECOND
    return state ^ _shift(state, 31)


def _shift(bits: Tensor, places: int) -> Tensor:
    return (bits >> places) & ((1 << (64 - places)) - 1)


def draw(logits: Float[Tensor, "B V"], uniform: Float[Tensor, "B"], sampling: Sampling) -> Draw:
    """Draw one token per row by inverting the cumulative distribution, and return its log-prob in float32.

    The distribution is summed in float64: in float32 tokens of probability below 1e-7 would be lost in rounding.
    A row with a logit that is NaN has log-prob NaN.
    """
    greedy = sampling.temperature == 0
    logprobs = torch.log_softmax(logits.float() if greedy else logits.float() / sampling.temperature, -1)
    possible = logprobs
    if sampling.forbidden_ids:
        possible = logprobs.index_fill(-1, torch.tensor(sampling.forbidden_ids, device=logits.device), -torch.inf)
    if sampling.truncated:
        possible = possible.masked_fill(~_kept(possible, sampling), -torch.inf)
    token_ids = possible.argmax(-1) if greedy else _invert(possible, uniform)
    chosen = logprobs.gather(-1, token_ids[:, None]).squeeze(-1)
    if sampling.truncated and sampling.truncation == "renormalise":
        kept = possible > -torch.inf
        sets = KeptSets(kept.nonzero()[:, 1].cpu(), kept.sum(-1).cpu())
        return Draw(token_ids, chosen - possible.logsumexp(-1), sets)
    return Draw(token_ids, chosen, None)


def _invert(logprobs: Tensor, uniform: Tensor) -> Tensor:
    # 52 random bits keep uniform · total below total in float64, so that the token found has positive mass.
    cumulative = logprobs.double().exp().cumsum(-1)
    target = uniform * cumulative[:, -1]
    found = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)
    return found.clamp(max=logprobs.shape[-1] - 1)


def _kept(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """Top-k, then top-p among what is left, then min-p; the most probable token always stays."""
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_k:
        keep[:, sampling.top_k :] = False
    if sampling.top_p < 1:
        mass = ordered.masked_fill(~keep, -torch.inf).softmax(-1, dtype=torch.float64)
        keep &= mass.cumsum(-1) - mass < sampling.top_p
    if sampling.min_p:
        keep &= ordered >= ordered[:, :1] + math.log(sampling.min_p)
    return torch.zeros_like(keep).scatter_(-1, order, keep)
