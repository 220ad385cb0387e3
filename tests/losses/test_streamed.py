"""Streamed statistics against the logits of all tokens in float64: values, gradients, what they cost and hold.

Under Triton's interpreter all that is float32 goes through the kernels; sizes are smaller then.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from generators import FAMILY
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rlstab.batch import ExactDivergence, Generator, LogProbs
from rlstab.errors import ConfigError, MissingFieldError, ShapeError
from rlstab.losses import (
    CauchySchwarz,
    ForwardKL,
    Head,
    JensenShannon,
    ReverseKL,
    Statistic,
    exact_divergence,
    streamed_statistics,
)
from rlstab.losses._streamed_head import Limits

ALL: tuple[Statistic, ...] = ("logp", "entropy", "log_z", "sum_squares", "top1")
GENERATORS: list[Generator] = [*(term for term, _ in FAMILY), CauchySchwarz()]
EVERY = [ExactDivergence(generator, "initial") for generator in GENERATORS]
INF = math.inf
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOKENS, VOCABULARY = (6, 90) if INTERPRETED else (40, 7000)  # more than one tile in both directions

both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@pytest.fixture(autouse=True)
def small_tiles_for_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr("rlstab.losses._streamed_head.CPU", Limits(2, 64, 180))
        monkeypatch.setattr("rlstab.losses._streamed_triton.BLOCK", 16)


@dataclass
class World:
    """A policy and a reference near it, as tensors of one dtype."""

    hidden: Tensor
    head: Head
    labels: Tensor
    reference: tuple[Tensor, Head]

    @property
    def leaves(self) -> list[Tensor]:
        """What has gradient."""
        return [x for x in (self.hidden, self.head.weight, self.head.bias) if x is not None]

    def streamed(
        self, statistics: tuple[Statistic, ...] = ALL, needs: Any = EVERY, **options: Any
    ) -> dict[str, Tensor]:
        references = {"initial": self.reference} if needs else None
        return streamed_statistics(
            self.hidden,
            self.head,
            self.labels,
            statistics=statistics,
            requirements=needs,
            references=references,
            **options,
        )

    def dense(self) -> dict[str, Tensor]:
        """The same by way of all logits."""
        logits, ref_logits = dense_logits(self.hidden, self.head), dense_logits(*self.reference)
        logp = logits.log_softmax(-1)
        found = {
            "logp": logp.gather(-1, self.labels.unsqueeze(-1)).squeeze(-1),
            "entropy": torch.special.entr(logp.exp()).sum(-1),
            "log_z": logits.logsumexp(-1),
            "sum_squares": logp.exp().square().sum(-1),
            "top1": logp.argmax(-1) == self.labels,
        }
        return found | {need.key: exact_divergence(need.generator, logits, ref_logits) for need in EVERY}

    def to(self, dtype: torch.dtype) -> "World":
        """Leaves of the same numbers."""
        reference, ref_head = self.reference
        return World(
            leaf(self.hidden, dtype),
            converted(self.head, dtype),
            self.labels,
            (reference.detach().to(dtype), converted(ref_head, dtype)),
        )


def leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype, copy=True).requires_grad_()


def converted(head: Head, dtype: torch.dtype) -> Head:
    bias = None if head.bias is None else leaf(head.bias, dtype)
    return Head(
        weight=leaf(head.weight, dtype),
        bias=bias,
        temperature=head.temperature,
        soft_cap=head.soft_cap,
        logit_scale=head.logit_scale,
    )


def dense_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.logit_scale
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    return logits / head.temperature


def world(
    tokens: int = TOKENS,
    vocabulary: int = VOCABULARY,
    width: int = 6,
    *,
    bias: bool = False,
    spread: float = 1.0,
    distance: float = 0.3,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> World:
    """Made in float64, so that it is the same in every dtype."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    hidden, weight, offset = normal(tokens, width), normal(vocabulary, width) * spread, normal(vocabulary)
    head = Head(weight=weight, bias=offset if bias else None, **options)
    moved = weight + distance * spread * normal(vocabulary, width) / 10
    ref_head = Head(weight=moved, bias=offset + distance if bias else None, **options)
    labels = torch.randint(vocabulary, (tokens,), generator=random)
    return World(hidden, head, labels, (hidden + distance * normal(tokens, width), ref_head)).to(dtype)


def gradients(found: dict[str, Tensor], leaves: list[Tensor], name: str) -> list[Tensor]:
    """Of a sum in which each token has its own weight."""
    value = found[name]
    weights = torch.linspace(-1, 2, len(value), dtype=value.dtype)
    return list(torch.autograd.grad((weights * value).sum(), leaves, retain_graph=True))


def total_of(found: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.sum() for value in found.values() if value.is_floating_point()]).sum()


def relative(value: Tensor, truth: Tensor) -> float:
    """Distance over the norm of the truth."""
    return float((value.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-300))


def assert_digits(value: Tensor, truth: Tensor) -> None:
    """What is promised in float32; beyond 1e6 the exponent itself is rounded."""
    finite = truth.abs() < torch.finfo(torch.float32).max
    assert (value[~finite] == INF).all()
    allowed = torch.where(truth < 1e6, 1e-5, 3e-5) * truth.abs() + 1e-7
    assert ((value.double() - truth).abs() <= allowed)[finite].all()


WORLDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "bias": {"bias": True},
    "soft-cap": {"soft_cap": 3.0, "temperature": 1.3},
    "all": {"bias": True, "soft_cap": 5.0, "temperature": 0.8, "logit_scale": 0.5},
    "one tile": {"tokens": 3, "vocabulary": 11},
    "one token": {"tokens": 1, "vocabulary": 11},
}


@both_dtypes
@pytest.mark.parametrize("options", WORLDS.values(), ids=WORLDS.keys())
def test_values_and_gradients_are_those_of_the_logits(options: dict[str, Any], dtype: torch.dtype) -> None:
    here = world(dtype=dtype, **options)
    double = here.to(torch.float64)
    found, truth = here.streamed(), double.dense()
    assert found.keys() == truth.keys()
    assert torch.equal(found.pop("top1"), truth["top1"])
    exact = dtype == torch.float64
    for name, value in found.items():
        rtol, atol = (1e-11, 1e-13) if exact else (1e-5, 1e-6)
        torch.testing.assert_close(value.double(), truth[name], rtol=rtol, atol=atol, msg=name)
        pairs = zip(gradients(found, here.leaves, name), gradients(truth, double.leaves, name), strict=True)
        assert max(relative(*pair) for pair in pairs) < (1e-11 if exact else 1e-4), name


@both_dtypes
def test_gradients_of_several_statistics_add(dtype: torch.dtype) -> None:
    here = world(bias=True, dtype=dtype)
    double = here.to(torch.float64)
    ours = torch.autograd.grad(total_of(here.streamed()), here.leaves)
    theirs = torch.autograd.grad(total_of(double.dense()), double.leaves)
    assert max(map(relative, ours, theirs)) < (1e-11 if dtype == torch.float64 else 1e-5)


def test_finite_differences() -> None:
    small = world(3, 5, 2, bias=True, soft_cap=4.0)

    def values(hidden: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        head = Head(weight=weight, bias=bias, soft_cap=4.0)
        found = World(hidden, head, small.labels, small.reference).streamed(ALL[:-1])
        return list(found.values())

    assert torch.autograd.gradcheck(values, small.leaves)


def test_candidates() -> None:
    """Log-probs of more tokens than the label, among them the label."""
    here = world(bias=True, soft_cap=4.0)
    candidates = torch.stack(
        [here.labels, (here.labels + 1) % VOCABULARY, torch.full_like(here.labels, VOCABULARY - 1)], -1
    )
    found = here.streamed(("logp",), [], candidates=candidates)
    truth = dense_logits(here.hidden, here.head).log_softmax(-1).gather(-1, candidates)
    torch.testing.assert_close(found["candidates"], truth)
    weights = torch.linspace(-1, 1, truth.numel(), dtype=torch.float64).view_as(truth)
    pairs = (((weights * x).sum() + y.sum()) for x, y in ((found["candidates"], found["logp"]), (truth, truth[:, 0])))
    ours, theirs = (torch.autograd.grad(total, here.leaves) for total in pairs)
    for gradient, expected in zip(ours, theirs, strict=True):
        assert relative(gradient, expected) < 1e-11


def test_candidates_of_skipped_tokens() -> None:
    here = world(6, 30)
    candidates = torch.arange(18).view(6, 3)
    whole = here.streamed(("top1",), [], candidates=candidates)["candidates"]
    here.labels[::2] = -100
    found = here.streamed(("top1",), [], candidates=candidates)["candidates"]
    assert not found[::2].any()
    torch.testing.assert_close(found[1::2], whole[1::2])


# --- digits ----------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("highest", [1.0, 20.0, 80.0])
def test_digits_of_float32(highest: float, distance: float) -> None:
    """The head is the identity, so that both dtypes have the same logits."""
    random = torch.Generator().manual_seed(1)
    tokens, vocabulary = (4, 60) if INTERPRETED else (16, 500)
    hidden = highest * (2 * torch.rand(tokens, vocabulary, generator=random) - 1)
    noise = distance * torch.randn(tokens, vocabulary, generator=random)
    head = Head(weight=torch.eye(vocabulary))
    labels = torch.arange(tokens)
    single = World(hidden.requires_grad_(), head, labels, ((hidden + noise).clamp(-80, 80).detach(), head))
    double = single.to(torch.float64)
    found, truth = single.streamed(), double.dense()
    for name, value in found.items():
        if name == "top1":
            continue
        assert_digits(value, truth[name])
        if value.max() < 1e6:
            (ours,), (theirs,) = gradients(found, [single.hidden], name), gradients(truth, [double.hidden], name)
            assert relative(ours, theirs) < 1e-5 + 2e-6 / distance, name


def test_digits_of_bfloat16() -> None:
    """Hidden states and weights are rounded, sums are not."""
    half = world(dtype=torch.bfloat16)
    exact = half.to(torch.float64)
    found, truth = half.streamed(), exact.dense()
    for name, value in found.items():
        if name == "top1":
            continue
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), truth[name], rtol=1e-4, atol=1e-6, msg=name)
        for ours, theirs in zip(gradients(found, half.leaves, name), gradients(truth, exact.leaves, name), strict=True):
            assert ours.dtype == torch.bfloat16
            assert relative(ours, theirs) < 5e-3, name


def test_autocast_does_not_round_the_sums() -> None:
    here = world(dtype=torch.float32)
    truth = here.streamed()
    with torch.autocast("cpu", torch.bfloat16):
        found = here.streamed()
        total = total_of(found)
    for name, value in found.items():
        assert torch.equal(value, truth[name])
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(total, here.leaves))


# --- extremes --------------------------------------------------------------------------


def extreme(policy: list[float], reference: list[float], **options: Any) -> World:
    """One token each, whose logits are given as biases."""
    hidden, weight = torch.zeros(1, 1, requires_grad=True), torch.zeros(len(policy), 1, requires_grad=True)
    heads = [
        Head(weight=weight, bias=torch.tensor(bias, requires_grad=True), **options) for bias in (policy, reference)
    ]
    return World(hidden, heads[0], torch.tensor([0]), (hidden.detach(), heads[1]))


EXTREMES = {
    "far apart": ([3e4, 0.0, -3e4], [-3e4, 0.0, 3e4]),
    "far and equal": ([3e4, 0.0, -3e4], [3e4, 0.0, -3e4]),
    "the reference excludes": ([0.0, 0.0, 0.0], [0.0, 0.0, -INF]),
    "the policy excludes": ([0.0, 0.0, -INF], [0.0, 0.0, 0.0]),
    "both exclude": ([0.0, 1.0, -INF], [1.0, 0.0, -INF]),
    "nothing in common": ([0.0, -INF, -INF], [-INF, 0.0, 0.0]),
}


@pytest.mark.parametrize(("policy", "reference"), EXTREMES.values(), ids=EXTREMES.keys())
def test_extremes_are_those_of_the_logits_and_never_nan(policy: list[float], reference: list[float]) -> None:
    here = extreme(policy, reference)
    found = here.streamed()
    logits, ref_logits = torch.tensor([policy]), torch.tensor([reference])
    for need in EVERY:
        truth = exact_divergence(need.generator, logits, ref_logits)
        torch.testing.assert_close(found[need.key], truth, rtol=1e-5, atol=1e-7, msg=need.key)
    for name, value in found.items():
        assert not value.isnan().any()
        if name != "top1":
            (gradient,) = torch.autograd.grad(value.sum(), [here.leaves[2]], retain_graph=True)
            assert gradient.isfinite().all(), name


def test_what_the_reference_excludes_costs_infinitely_much() -> None:
    found = extreme([0.0, 0.0], [0.0, -INF]).streamed()
    infinite = {name for name, value in found.items() if value.isinf().all()}
    assert {"reverse_kl() from initial", "chi_squared() from initial", "jeffreys() from initial"} <= infinite
    assert {"forward_kl() from initial", "jensen_shannon() from initial"}.isdisjoint(infinite)


def test_a_label_that_the_policy_excludes() -> None:
    here = extreme([-INF, 0.0], [0.0, 0.0])
    found = here.streamed(("logp", "entropy", "top1"), [])
    assert [value.item() for value in found.values()] == [-INF, 0.0, 0.0]


def test_a_soft_cap_readmits_what_a_bias_excludes() -> None:
    found = extreme([-INF, 0.0], [0.0, -INF], soft_cap=2.0).streamed(
        ("logp",), [ExactDivergence(ReverseKL(), "initial")]
    )
    assert found["logp"].item() == pytest.approx(-2 - math.log1p(math.exp(-2)), rel=1e-6)
    assert found["reverse_kl() from initial"].item() == pytest.approx(2 * math.tanh(1), rel=1e-6)


def test_the_first_of_equal_logits_is_top() -> None:
    here = extreme([0.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    tops = [World(here.hidden, here.head, torch.tensor([i]), here.reference).streamed(("top1",), []) for i in range(3)]
    assert [bool(top["top1"]) for top in tops] == [False, True, False]


# --- tokens to skip --------------------------------------------------------------------


def test_skipped_tokens_are_zero_and_not_looked_at() -> None:
    here = world(dtype=torch.float32)
    skip = torch.arange(TOKENS) % 3 == 0
    reference, ref_head = here.reference
    poisoned = World(
        torch.where(skip.unsqueeze(-1), torch.nan, here.hidden.detach()).requires_grad_(),
        here.head,
        torch.where(skip, -100, here.labels),
        (torch.where(skip.unsqueeze(-1), torch.nan, reference), ref_head),
    )
    found, whole = poisoned.streamed(), here.streamed()
    for name, value in found.items():
        assert not value[skip].any()
        torch.testing.assert_close(value[~skip], whole[name][~skip], msg=name)
    total = total_of(found)
    of_hidden, of_weight = torch.autograd.grad(total, poisoned.leaves)
    assert not of_hidden[skip].any()
    assert of_hidden.isfinite().all()
    assert of_weight.isfinite().all()


def test_another_ignored_label() -> None:
    here = world()
    here.labels[: TOKENS // 2] = 0
    assert not here.streamed(ignore_index=0)["logp"][: TOKENS // 2].any()


@pytest.mark.parametrize("skipped", [0, 4])
def test_no_tokens(skipped: int) -> None:
    here = world(max(skipped, 1))
    reference, ref_head = here.reference
    none = World(
        here.hidden.detach()[:skipped].requires_grad_(),
        here.head,
        torch.full((skipped,), -100),
        (reference[:skipped], ref_head),
    )
    found = none.streamed()
    assert {value.shape for value in found.values()} == {(skipped,)}
    total = total_of(found)
    assert [bool(gradient.any()) for gradient in torch.autograd.grad(total, none.leaves)] == [False, False]


# --- what it costs and holds -----------------------------------------------------------


class Watch(TorchDispatchMode):
    """Keeps the largest number of elements of any tensor made, and how often weights were converted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0
        self.conversions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.conversions += 1
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor):
                self.largest = max(self.largest, one.numel())
        return result


@pytest.mark.skipif(INTERPRETED, reason="the interpreter copies what kernels read")
@pytest.mark.parametrize("needs", [EVERY, []], ids=["divergences", "none"])
def test_no_tensor_has_the_size_of_all_logits(needs: Any) -> None:
    here = world(600, 2000, 4, dtype=torch.float32)
    with Watch() as watch:
        total_of(here.streamed(ALL, needs)).backward()
    assert watch.largest <= 600 * 2000 / 2


def matmuls(here: World, needs: Any) -> float:
    """Of N x V x D multiplications, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        total_of(here.streamed(ALL, needs)).backward()
    tokens, width = here.hidden.shape
    return float(counter.get_total_flops()) / (2 * tokens * here.head.weight.shape[0] * width)


@pytest.mark.parametrize(
    ("needs", "expected"),
    [([], 4), (EVERY[:1], 6), ([ExactDivergence(JensenShannon(), "initial")], 6), (EVERY, 6)],
    ids=["none", "reverse KL", "JS", "all"],
)
def test_the_number_of_matmuls(needs: Any, expected: int) -> None:
    assert matmuls(world(), needs) == expected


def test_a_frozen_head_spares_a_matmul() -> None:
    here = world()
    here.head.weight.requires_grad_(False)
    assert matmuls(here, EVERY) == 5


def test_references_without_gradient_in_the_loss_are_not_recomputed() -> None:
    here = world()
    with FlopCounterMode(display=False) as counter:
        here.streamed()["logp"].sum().backward()
    assert counter.get_total_flops() == 5 * 2 * here.hidden.numel() * here.head.weight.shape[0]


def test_a_shared_head_is_read_once() -> None:
    here = world(dtype=torch.bfloat16)
    reference, ref_head = here.reference
    counts = []
    for head in (here.head, ref_head):
        here.reference = (reference, head)
        with Watch() as watch:
            here.streamed(("logp",), EVERY[:1])
        counts.append(watch.conversions)
    tiles = 3 * 3 if INTERPRETED else 2 * 2  # stripes of tokens, by tiles of the vocabulary
    assert counts[1] - counts[0] == tiles


def test_a_shared_head_has_the_gradient_of_the_policy_only() -> None:
    here = world()
    here.reference = (here.reference[0], here.head)
    found, frozen = here.streamed(), converted(here.head, torch.float64)
    here.reference = (here.reference[0], frozen)
    apart = here.streamed()
    for name in ("reverse_kl() from initial", "jensen_shannon() from initial"):
        for ours, theirs in zip(gradients(found, here.leaves, name), gradients(apart, here.leaves, name), strict=True):
            assert torch.equal(ours, theirs)


def test_weights_are_gathered_once_per_pass_and_head() -> None:
    entered: list[int] = []

    @contextmanager
    def gather(weight: Tensor, bias: Tensor | None) -> Iterator[None]:
        entered.append(id(weight))
        yield

    weight, other = torch.randn(5, 2, requires_grad=True), torch.randn(5, 2)
    head, ref_head = Head(weight=weight, gather=gather), Head(weight=other, gather=gather)
    hidden = torch.randn(3, 2, requires_grad=True)
    found = streamed_statistics(
        hidden,
        head,
        torch.tensor([0, 1, 2]),
        requirements=[ExactDivergence(ReverseKL(), source) for source in ("initial", "moving")],
        references={"initial": (hidden, ref_head), "moving": (hidden, head)},
    )
    assert sorted(entered) == sorted([id(weight), id(other)])
    total_of(found).backward()
    assert sorted(entered) == sorted([id(weight), id(other)] * 2)


# --- several references, and what is refused ---------------------------------------------


def test_references_by_source() -> None:
    here = world(20, 500)
    other = (here.hidden.detach() / 2, here.head)
    needs = [ExactDivergence(ReverseKL(), "initial"), ExactDivergence(ForwardKL(), "moving")]
    found = streamed_statistics(
        here.hidden,
        here.head,
        here.labels,
        requirements=[LogProbs("policy"), *needs],
        references={"moving": other, "initial": here.reference, "unused": other},
    )
    logits = dense_logits(here.hidden, here.head)
    for need, (states, head) in zip(needs, (here.reference, other), strict=True):
        truth = exact_divergence(need.generator, logits, dense_logits(states, head))
        torch.testing.assert_close(found[need.key], truth)
    assert list(found) == ["logp", *sorted(need.key for need in needs)]


def test_a_second_backward_pass_and_no_second_derivative() -> None:
    here = world(5, 50)
    total = total_of(here.streamed())
    first, second = (torch.autograd.grad(total, here.leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    rate = torch.ones(5, dtype=torch.float64, requires_grad=True)
    weighted = (rate * here.streamed(("logp",), [])["logp"]).sum()
    (once,) = torch.autograd.grad(weighted, [here.hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


def call(**changes: Any) -> dict[str, Tensor]:
    here = world(4, 9, 3)
    arguments: dict[str, Any] = {
        "hidden": here.hidden,
        "head": here.head,
        "labels": here.labels,
        "requirements": EVERY[:1],
        "references": {"initial": here.reference},
        **changes,
    }
    hidden, head, labels = (arguments.pop(name) for name in ("hidden", "head", "labels"))
    return streamed_statistics(hidden, head, labels, **arguments)


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"statistics": ["entropi"]}, ConfigError, "statistics: expected one of 'logp', .*, got 'entropi'"),
        ({"labels": torch.tensor([0, 1, 9, 2])}, ConfigError, "labels and candidates: expected ids from 0 to 8, got 9"),
        ({"labels": torch.zeros(2, 2, dtype=torch.long)}, ShapeError, r"hidden: expected \[N, D\]"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, ShapeError, r"hidden: .* = \[5, 3\] .*, got \[4, 3\]"),
        ({"references": {}}, MissingFieldError, r"need hidden states of \['initial'\], got those of \[\]"),
        (
            {"references": {"initial": (torch.zeros(4, 3), Head(weight=torch.zeros(8, 3)))}},
            ShapeError,
            r"references\['initial'\]: expected a head over the policy's vocabulary of 9, got 8",
        ),
    ],
)
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.wrong_shapes
def test_a_head_refuses_what_it_cannot_be() -> None:
    with pytest.raises(ShapeError, match=r"Head.bias: expected one entry per row"):
        Head(weight=torch.zeros(3, 2), bias=torch.zeros(2))
    for name in ("temperature", "soft_cap", "logit_scale"):
        wrong: dict[str, Any] = {name: 0}
        with pytest.raises(ConfigError, match=f"Head.{name}: expected a number > 0, got 0"):
            Head(weight=torch.zeros(3, 2), **wrong)
