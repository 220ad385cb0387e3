"""Log-probs, entropy and exact divergences from hidden states and LM heads, without the logits of all tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from itertools import chain
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from rlstab.batch import ExactDivergence, Requirement
from rlstab.errors import ConfigError, MissingFieldError, ShapeError
from rlstab.losses._checks import check_choice
from rlstab.losses._divergence import Divergence
from rlstab.losses._streamed_forms import Estimated, form_of
from rlstab.losses._streamed_head import Head, dtypes
from rlstab.losses._streamed_passes import Entry, Models, Plan, backward, forward, gather

#: What is known of the policy's distribution at each token, besides divergences.
Statistic = Literal["logp", "entropy", "log_z", "sum_squares", "top1"]
LOGP: tuple[Statistic, ...] = ("logp",)
Reference = tuple[Float[Tensor, "N _"], Head]  # as wide as its own head


def streamed_statistics(
    hidden: Float[Tensor, "N D"],
    head: Head,
    labels: Int[Tensor, "N"],
    *,
    statistics: Collection[Statistic] = LOGP,
    requirements: Iterable[Requirement] = (),
    references: Mapping[str, Reference] | None = None,
    candidates: Int[Tensor, "N K"] | None = None,
    ignore_index: int = -100,
) -> dict[str, Shaped[Tensor, "N *K"]]:
    r"""Statistics of the policy at each token and its exact divergences from references, for the price of few matmuls.

    Logits exist for one stripe of tokens at a time: never for all of them, whatever the number of divergences, forward
    or backward. Each model's head is applied once forward and, for the gradient, once more backward; all divergences
    share these passes. Sums are held in float32 (float64 for float64 inputs). Gradients are those of closed form,

    $$\frac{\partial}{\partial z_v} \log\pi_y = 1_{v=y} - \pi_v, \quad
    \frac{\partial H}{\partial z_v} = -\pi_v (\log\pi_v + H), \quad
    \frac{\partial D}{\partial z_v} = \pi_v (f'(u_v) - E_\pi f'(u)),$$

    and reach `hidden`, `head.weight` and `head.bias`; references have none. There are no second derivatives.

    Args:
        hidden: hidden states of the policy, one per token.
        head: the policy's head.
        labels: the token whose log-prob is asked for, or `ignore_index` for tokens to skip.
        statistics: which of these to return: `logp`, the log-prob of the label in nats; `entropy` in nats; `log_z`, the
            log of the softmax's denominator; `sum_squares`, the sum of all squared probabilities; `top1`, whether the
            label is the (first) most likely token, as bool.
        requirements: every `ExactDivergence` among them is returned under its key; others are passed over.
        references: hidden states of the same tokens and the head, by source. Where the head is the policy's (LoRA),
            pass that very object.
        candidates: tokens whose log-probs to return as `candidates`, such as those that a remote reference returned
            (see `top_k_divergence`).
        ignore_index: tokens with this label are skipped: they cost nothing, and all their values are 0.

    Returns:
        Values per token by name. A divergence that does not fit the dtype, or from a reference that excludes what the
        policy does not, is `+inf`; its gradient is held at a large number. Never NaN for finite hidden states.

    Raises:
        ConfigError: for an unknown statistic, a label beyond the vocabulary, or a divergence that is not a sum over it.
        MissingFieldError: if a source of a divergence is not among the references.
        ShapeError: if shapes do not fit, or the vocabularies differ.

    >>> import torch
    >>> from rlstab.losses import Head, ReverseKL, streamed_statistics
    >>> head = Head(weight=torch.eye(2))
    >>> policy, reference = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> streamed_statistics(
    ...     policy,
    ...     head,
    ...     torch.tensor([1]),
    ...     statistics=["logp", "entropy"],
    ...     requirements=ReverseKL(form="exact").requires,
    ...     references={"initial": (reference, head)},
    ... )
    {'logp': tensor([-0.6931]), 'entropy': tensor([0.6931]), 'reverse_kl() from initial': tensor([0.1438])}
    """
    references = references or {}
    for name in statistics:
        check_choice("statistics", name, get_args(Statistic))
    names = [*statistics, *(() if candidates is None else ("candidates",))]
    plan = _plan(hidden, head, names, requirements, references)
    ids = labels.unsqueeze(-1) if candidates is None else torch.cat([labels.unsqueeze(-1), candidates], dim=-1)
    with ExitStack() as whole:
        gather(whole, plan)
        _check_shapes(hidden, labels, plan, references)
        keep = labels != ignore_index
        _check_ids(ids[keep], head.weight.shape[0])
        models = [
            (head, hidden),
            *((its_head, references[source][0].detach()) for source, its_head in plan.heads.items()),
        ]
        everything = bool(keep.all())
        if not everything:
            ids, models = ids[keep], [(its_head, states[keep]) for its_head, states in models]
        tensors = chain.from_iterable((its_head.weight, its_head.bias, states) for its_head, states in models)
        values = _Streamed.apply(plan, ids, *tensors)  # type: ignore[no-untyped-call]
    found = dict(zip(plan.names, values, strict=True))
    if not everything:
        found = {name: _spread(value, keep) for name, value in found.items()}
    return {name: value.T if value.dim() == 2 else value for name, value in found.items()}


def _spread(values: Shaped[Tensor, "*K M"], keep: Bool[Tensor, "N"]) -> Shaped[Tensor, "*K N"]:
    return values.new_zeros(*values.shape[:-1], len(keep)).masked_scatter(keep, values)


def _plan(
    hidden: Tensor,
    head: Head,
    statistics: Collection[str],
    requirements: Iterable[Requirement],
    references: Mapping[str, Reference],
) -> Plan:
    by_key = {need.key: need for need in requirements if isinstance(need, ExactDivergence)}
    missing = sorted({need.source for need in by_key.values()} - set(references))
    if missing:
        raise MissingFieldError(f"exact divergences need hidden states of {missing}, got those of {sorted(references)}")
    entries = tuple(_entry(by_key[key]) for key in sorted(by_key))
    heads = {source: references[source][1] for source in sorted({entry.source for entry in entries})}
    return Plan(head, heads, tuple(dict.fromkeys(statistics)), entries, dtypes(hidden, head.weight))


def _entry(need: ExactDivergence) -> Entry:
    form = form_of(need.generator)
    careful = Estimated(need.generator) if isinstance(need.generator, Divergence) else form
    return Entry(need.key, need.source, form, careful)


def _check_shapes(hidden: Tensor, labels: Tensor, plan: Plan, references: Mapping[str, Reference]) -> None:
    states = {"hidden": (hidden, plan.head)}
    states |= {f"references[{source!r}]": references[source] for source in plan.heads}
    vocabulary = plan.head.weight.shape[0]
    for name, (state, head) in states.items():
        if head.weight.shape[0] != vocabulary:
            raise ShapeError(
                f"{name}: expected a head over the policy's vocabulary of {vocabulary}, got {head.weight.shape[0]}"
            )
        expected = [*labels.shape, head.weight.shape[1]]
        if labels.dim() != 1 or list(state.shape) != expected:
            raise ShapeError(f"{name}: expected [N, D] = {expected} to fit labels and head, got {list(state.shape)}")


def _check_ids(ids: Int[Tensor, "N M"], vocabulary: int) -> None:
    wrong = (ids < 0) | (ids >= vocabulary)
    if wrong.any():
        raise ConfigError(f"labels and candidates: expected ids from 0 to {vocabulary - 1}, got {ids[wrong][0].item()}")


class _Streamed(torch.autograd.Function):
    """Statistics whose gradient recomputes the logits, tile by tile."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, ids: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        with torch.autocast(ids.device.type, enabled=False):
            values, ctx.saved = forward(Models(plan, ids, tensors))
        ctx.plan = plan
        ctx.save_for_backward(ids, *tensors)
        ctx.mark_non_differentiable(*(value for value in values.values() if not value.is_floating_point()))
        return tuple(values[name] for name in plan.names)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ids, *tensors = ctx.saved_tensors
        given = {name: g for name, g in zip(ctx.plan.names, gradients, strict=True) if g is not None}
        with ExitStack() as whole, torch.autocast(ids.device.type, enabled=False):
            gather(whole, ctx.plan)
            ours = backward(Models(ctx.plan, ids, tensors), ctx.saved, given, ctx.needs_input_grad[2:5])
        return None, None, *ours, *(None for _ in tensors[3:])
