"""What every part of `rlstab.losses` promises. A new part joins by being exported."""

import copy
import inspect
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from loss_data import Data, batch_with, data_of
from torch import Tensor

import rlstab.losses
from rlstab.batch import Column, ExactDivergence, LogProbs, Requirement, TokenBatch, VocabStat
from rlstab.losses import (
    Advantage,
    GeometricRatio,
    GroupNorm,
    GSPOTokenRatio,
    Hist,
    MaskedIS,
    Max,
    Metric,
    Min,
    Needs,
    Objective,
    Part,
    Prepared,
    Ratio,
    RolloutPart,
    SequenceRatio,
    StepStatistic,
    Term,
    TokenRatio,
    TopEntropy,
    TruncatedCompletions,
    TruncatedIS,
    UnsolvedOnly,
    Veto,
    Weight,
)

# Arguments of parts that cannot be built without, and further forms of parts that take another path through their code.
FORMS: list[dict[str, Any]] = [
    {},
    {"form": "reward"},
    {"form": "exact"},
    {"target": "sequence"},
    {"target": "sequence", "form": "exact"},
    {"samples": "sampler", "clamp": 0.2},
    {"samples": "reference"},
]
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "ReverseKL": FORMS,
    "ForwardKL": FORMS,
    "JensenShannon": FORMS[:4],
    "ClippedSurrogate": [
        {},
        {"dual": 3.0, "high": 0.28},
        {"ratio": SequenceRatio()},
        {"ratio": TokenRatio(against="sampler")},
        {"ratio": GeometricRatio()},
        {"ratio": GSPOTokenRatio()},
        {"weights": (TruncatedIS(max=2.0), Veto())},
        {"weights": (MaskedIS(max=2.0, level="sequence"),)},
    ],
    "ClipCov": [
        {"fraction": 0.3, "min": -0.5, "max": 2.0},
        {"fraction": 0.3, "min": -0.5, "max": 2.0, "over": "micro_batch"},
    ],
    "CovarianceSample": [{"fraction": 0.3, "min": -0.5, "max": 2.0}],
    "EntropyBonus": [{}, {"weights": (TopEntropy(fraction=0.5),)}],
    "EntropyThreshold": [{"fraction": 0.5}],
    "GFPO": [{"k": 2}, {"k": 2, "metric": "reward_per_length"}],
    "GPGAdvantage": [{}, {"norm": "std"}],
    "GeometricRejection": [{"low": 0.9, "high": 1.1}],
    "ImportanceSFT": [{}, {"level": "token"}],
    "KeptShare": [{"weights": (TopEntropy(fraction=0.5),)}],
    "KL": [
        {"estimator": "k1", "weight": "differentiable"},
        {"estimator": "k2"},
        {"estimator": "k2", "weight": "differentiable"},
        {},
        {"weight": "detached"},
        {"weight": "differentiable"},
        {"weight": "differentiable", "ratio": GeometricRatio()},
        {"weight": "differentiable", "ratio": TokenRatio(against="sampler")},
    ],
    "KLCov": [{"fraction": 0.2}, {"fraction": 0.2, "over": "micro_batch"}],
    "MaskedIS": [{"max": 2.0}, {"min": 0.5, "max": 5.0}],
    "OffPolicySequenceMask": [{"delta": 0.1}],
    "PrefixEntropyThreshold": [{"fraction": 0.5}],
    "SigmaFilter": [{"advantage": GroupNorm()}],
    "MixedGroups": [{}, {"unit": "sequence"}],
    "RPG": [
        {"beta": 0.2, "divergence": divergence, "form": form, "normalised": normalised, "clip": clip}
        for divergence, form, normalised, clip in (
            ("forward", "differentiable", False, True),
            ("forward", "reinforce", True, False),
            ("reverse", "differentiable", True, True),
            ("reverse", "differentiable", False, False),
            ("reverse", "reinforce", False, True),
        )
    ],
    "ScoreWeight": [{"divergence": name, "teacher": "initial"} for name in ("js", "jeffreys")],
    "SoftOverlong": [{"longest": 6, "cache": 3}],
    "TopCovariance": [{"fraction": 0.2}],
    "TopEntropy": [{"fraction": 0.5}],
    "TrSFT": [{}, {"form": "surrogate"}],
    "Unsolved": [{}, {"level": "group"}],
    "Weighted": [
        {"term": rlstab.losses.KL(estimator="k2"), "weights": (Veto(), TruncatedCompletions())},
        {"term": rlstab.losses.ForwardKL(), "weights": UnsolvedOnly(threshold=0.0)},
    ],
}
# Choices within the micro-batch depend on the split by definition.
DEPENDS_ON_SPLIT = {"KLCov(over='micro_batch')", "ClipCov(min=-0.5, max=2.0, over='micro_batch')"}


def part_classes(*kinds: type[Part]) -> list[type[Part]]:
    exported = [vars(rlstab.losses)[name] for name in rlstab.losses.__all__]
    classes = [value for value in exported if inspect.isclass(value) and issubclass(value, kinds or (Part,))]
    return [cls for cls in classes if cls is not Part and not inspect.isabstract(cls)]


def name_of(part: Part) -> str:
    """The class and the arguments that differ from their defaults."""
    told = {f.name: part.__dict__.get(f.name) for f in fields(part) if f.name != "mean"}
    chosen = [args for args in VARIANTS.get(type(part).__name__, []) if type(part)(**args) == part]
    shown = ", ".join(f"{key}={told[key]!r}" for key in (chosen[0] if chosen else {}) if key != "fraction")
    return f"{type(part).__name__}({shown})"


def parts(*kinds: type[Part]) -> list[Any]:
    """Every part of the given kinds in all its forms, as parameters of a test."""
    made = [cls(**args) for cls in part_classes(*kinds) for args in VARIANTS.get(cls.__name__, [{}])]
    return [pytest.param(part, id=name_of(part)) for part in made]


def batch_for(part: Part, data: Data) -> TokenBatch:
    """A batch with what `part` requires and nothing else."""
    batch = batch_with(part.requires, data)
    return batch.replace(rows=part.rows) if isinstance(part, Term) else batch


def output(part: Part, batch: TokenBatch) -> Tensor:
    """What the part computes, unreduced."""
    if isinstance(part, Term):
        return part.loss(batch).values
    if isinstance(part, Weight):
        return part.factor(batch).values
    if isinstance(part, Ratio):
        return part.log_ratio(batch)
    assert isinstance(part, Prepared), f"the contract test does not know what {type(part).__name__} computes: teach it"
    return part.compute(batch)


def reduced(part: Part, batch: TokenBatch) -> Tensor:
    """One number that depends on everything the part computes for tokens that count."""
    if isinstance(part, Term):
        return Objective(term=part)(batch).loss
    values = output(part, batch).to(torch.get_default_dtype())
    return torch.where(batch.loss_mask, values, 0.0).sum() if values.dim() == 2 else values.sum()


def metrics_of(part: Part, batch: TokenBatch) -> dict[str, Metric]:
    if isinstance(part, Term):
        return dict(part.loss(batch).metrics)
    return dict(part.factor(batch).metrics) if isinstance(part, Weight) else {}


def loss_and_gradients(part: Part, data: Data) -> tuple[Tensor, dict[str, Tensor]]:
    """The reduced output, and its gradient at every leaf that it reaches."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in data.leaves().items()}
    held = replace(
        data,
        logps={**data.logps, "policy": leaves["policy"]},
        vocab={name: leaves[name] for name in data.vocab},
    )
    loss = reduced(part, batch_for(part, held))
    if not loss.requires_grad:
        return loss, {}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.detach(), {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}


# --- parts are values ----------------------------------------------------------------


def test_every_part_is_exported() -> None:
    def below(cls: type[Part]) -> Iterator[type[Part]]:
        for sub in cls.__subclasses__():
            yield sub
            yield from below(sub)

    def stays(cls: type[Part]) -> bool:
        """Not made by an example."""
        return vars(sys.modules[cls.__module__]).get(cls.__name__) is cls

    own = {cls.__name__ for cls in below(Part) if cls.__module__.startswith("rlstab.losses.") and stays(cls)}
    assert {name for name in own if not name.startswith("_")} <= set(rlstab.losses.__all__)
    assert len(part_classes(Term)) > 5


@pytest.mark.parametrize("name", rlstab.losses.__all__)
def test_it_is_documented_with_an_example(name: str) -> None:
    offered = vars(rlstab.losses)[name]
    if not (inspect.isclass(offered) or inspect.isfunction(offered)):
        return  # a module or an alias of types
    documented = offered.__doc__
    assert documented
    assert not documented.startswith(f"{name}("), "the docstring is the one that dataclass makes"
    assert ">>>" in documented


@pytest.mark.parametrize("part", parts())
def test_it_is_a_value(part: Part) -> None:
    for same in (copy.deepcopy(part), pickle.loads(pickle.dumps(part)), part.replace()):
        assert same == part
        assert hash(same) == hash(part)
        assert repr(same) == repr(part)
    for field in fields(part):
        with pytest.raises(FrozenInstanceError):
            setattr(part, field.name, None)
    with pytest.raises(TypeError):
        type(part)(1.0)  # type: ignore[call-arg]


# --- what it computes ----------------------------------------------------------------


@pytest.mark.parametrize("part", parts())
def test_its_shape(part: Part) -> None:
    data = data_of()
    values = output(part, batch_for(part, data))
    rows, length = data.mask.shape
    allowed: list[tuple[int, ...]] = [(rows, length)]
    if isinstance(part, Term | Weight | Ratio):
        allowed += [(rows, 1)]
    if isinstance(part, Term | Prepared):
        allowed += [(rows,)]
    if isinstance(part, StepStatistic):
        allowed += [()]
    assert tuple(values.shape) in allowed
    assert values.isfinite().all()


@pytest.mark.parametrize("part", parts())
def test_gradient_flows_to_the_policy_alone(part: Part) -> None:
    data = data_of()
    for tensors in (data.logps, data.columns):
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.clone().requires_grad_()
    loss, gradients = loss_and_gradients(part, data)
    if isinstance(part, Weight | Prepared):
        assert not gradients
    else:
        assert any(gradient.any() for gradient in gradients.values())
    for gradient in gradients.values():
        assert gradient.isfinite().all()
        assert not gradient[~data.loss_mask].any()
    others = [t for tensors in (data.logps, data.columns) for t in tensors.values() if t.requires_grad]
    if loss.requires_grad:
        assert all(g is None for g in torch.autograd.grad(loss, others, allow_unused=True))


@pytest.mark.parametrize("part", parts())
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf, 1e30])
def test_what_is_not_trained_on_has_no_influence(part: Part, value: float) -> None:
    data = data_of()
    assert not data.mask.all()
    assert not data.loss_mask[data.mask].all()
    loss, gradients = loss_and_gradients(part, data)
    junk_loss, junk_gradients = loss_and_gradients(part, data.junk(value))
    torch.testing.assert_close(junk_loss, loss, rtol=0, atol=0)
    torch.testing.assert_close(junk_gradients, gradients, rtol=0, atol=0)


@pytest.mark.parametrize("part", parts())
@pytest.mark.parametrize("kept", ["no token", "one row without tokens"])
def test_an_empty_mask_is_finite(part: Part, kept: str) -> None:
    data = data_of()
    mask = data.mask.clone()
    mask[slice(None) if kept == "no token" else 0] = False
    loss, gradients = loss_and_gradients(part, replace(data, mask=mask, loss_mask=mask & data.loss_mask))
    assert loss.isfinite() or isinstance(part, StepStatistic)  # a quantile of nothing is NaN
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    if kept == "no token":
        assert not any(gradient.any() for gradient in gradients.values())
        if isinstance(part, Term) and output(part, batch_for(part, data)).dim() == 2:
            assert loss == 0


@pytest.mark.parametrize("part", parts())
def test_one_token(part: Part) -> None:
    data = data_of(1, 1)
    assert output(part, batch_for(part, data)).isfinite().all()
    loss, gradients = loss_and_gradients(part, data)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("part", parts())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(part: Part, dtype: torch.dtype) -> None:
    half = dtype in (torch.float16, torch.bfloat16)
    data = data_of().to(dtype)
    loss, gradients = loss_and_gradients(part, data)
    reference, _ = loss_and_gradients(part, data.to(torch.float32))
    if isinstance(part, Term):
        assert loss.dtype == (torch.float32 if half else dtype)
    torch.testing.assert_close(loss, reference, check_dtype=False, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype, name
        assert gradient.isfinite().all()


@pytest.mark.parametrize("part", parts())
def test_it_reads_only_what_it_declares(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """`old` in particular: a batch without it would hand out the policy's own log-probs."""
    batch = batch_for(part, data_of())
    read: set[str] = set()

    def spy(method: Callable[[TokenBatch, str], Tensor]) -> None:
        def reading(self: TokenBatch, key: str) -> Tensor:
            read.add(key)
            return method(self, key)

        monkeypatch.setattr(TokenBatch, method.__name__, reading)

    for method in (TokenBatch.logp, TokenBatch.column, TokenBatch.statistic, TokenBatch.part):
        spy(method)
    output(part, batch)
    assert read <= {key_of(need) for need in part.requires}


def key_of(need: Requirement) -> str:
    """The word that a batch gives it out for."""
    match need:
        case LogProbs(source=key) | VocabStat(name=key) | Column(name=key) | ExactDivergence(key=key):
            return key
        case Needs(part=part):
            return part.key
    raise AssertionError(need)


@pytest.mark.parametrize("part", parts(Term, Weight))
def test_its_metrics_are_typed_detached_and_documented(part: Part) -> None:
    data = data_of()
    data.logps["policy"].requires_grad_()
    for statistic in data.vocab.values():
        statistic.requires_grad_()
    for name, metric in metrics_of(part, batch_for(part, data)).items():
        assert isinstance(metric, Metric)
        held = [getattr(metric, field.name) for field in fields(metric) if field.name != "edges"]
        assert all(isinstance(tensor, Tensor) and not tensor.requires_grad for tensor in held)
        assert all(tensor.dim() == (1 if isinstance(metric, Hist) else 0) for tensor in held)
        assert metric.value().dim() == 0
        assert name.isascii()


@pytest.mark.parametrize("part", [case for case in parts(Term, Weight) if case.id not in DEPENDS_ON_SPLIT])
def test_its_metrics_of_a_split_merge_to_those_of_the_whole(part: Part) -> None:
    batch = batch_for(part, data_of(dtype=torch.float64))
    merged: dict[str, Metric] = {}
    for micro in batch.split([3, 1, 3]):
        for name, metric in metrics_of(part, micro).items():
            merged[name] = merged[name].merge(metric) if name in merged else metric
    for name, metric in metrics_of(part, batch).items():
        torch.testing.assert_close({name: merged[name].value()}, {name: metric.value()})


@pytest.mark.parametrize("part", parts(Term, Weight))
def test_a_micro_batch_without_tokens_changes_no_extreme(part: Part) -> None:
    data = data_of(dtype=torch.float64)
    nothing = torch.zeros_like(data.mask)
    empty = metrics_of(part, batch_for(part, replace(data, loss_mask=nothing)))
    for name, metric in metrics_of(part, batch_for(part, data)).items():
        if isinstance(metric, Max | Min):
            both: tuple[Metric, Metric] = (metric, empty[name])
            assert not both[1].value().isinf()
            assert both[0].merge(both[1]).value() == both[1].merge(both[0]).value() == metric.value()


# --- terms ---------------------------------------------------------------------------


@pytest.mark.parametrize("part", parts(Term))
def test_its_coefficient_multiplies(part: Term) -> None:
    data = data_of(dtype=torch.float64)
    loss, gradients = loss_and_gradients(part, data)
    tripled, tripled_gradients = loss_and_gradients(3 * part, data)
    torch.testing.assert_close(tripled, 3 * loss)
    torch.testing.assert_close(tripled_gradients, {name: 3 * g for name, g in gradients.items()})


@pytest.mark.parametrize("part", [case for case in parts(Term) if case.id not in DEPENDS_ON_SPLIT])
@pytest.mark.parametrize("sizes", [[1] * 7, [3, 1, 3], [4, 3]])
def test_any_split_of_a_step_gives_its_gradient(part: Term, sizes: list[int]) -> None:
    data = data_of(dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in data.leaves().values()]
    batch, objective = batch_for(part, data), Objective(term=part)

    def gradients(batches: list[TokenBatch]) -> list[Tensor]:
        loss = torch.stack([objective(micro).loss for micro in batches]).sum()
        found = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
        return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]

    torch.testing.assert_close(gradients(batch.split(sizes)), gradients([batch]))


@pytest.mark.parametrize("part", parts(Term))
def test_a_token_that_the_sampler_could_not_score_spoils_nothing(part: Term) -> None:
    data = data_of()
    sampler = data.logps["sampler"].clone()
    sampler[0, 0] = sampler[3] = torch.nan
    loss, gradients = loss_and_gradients(part, replace(data, logps={**data.logps, "sampler": sampler}))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("part", parts(Term))
@pytest.mark.parametrize(
    "sources",
    [
        ["policy"],
        ["old"],
        ["sampler"],
        ["initial"],
        ["policy", "initial"],
        ["policy", "old"],
        ["old", "sampler"],
        ["policy", "old", "sampler", "initial"],
    ],
    ids="-".join,
)
def test_an_impossible_token_makes_no_nan(part: Term, sources: list[str]) -> None:
    """A log-prob of -inf may make a loss infinite but not NaN, and other rows keep their gradient."""
    data = data_of()
    logps = {name: value.clone() for name, value in data.logps.items()}
    for source in sources:
        logps[source][0, 0] = -torch.inf
    loss, gradients = loss_and_gradients(part, replace(data, logps=logps))
    assert not loss.isnan()
    for gradient in gradients.values():
        assert not gradient.isnan().any()
        assert gradient[1:].isfinite().all()
    for name, metric in metrics_of(part, batch_for(part, replace(data, logps=logps))).items():
        assert not metric.value().isnan(), name


@pytest.mark.parametrize("part", parts(Term))
@pytest.mark.parametrize("sources", [(), ("policy",), ("policy", "old", "sampler", "initial")], ids="-".join)
def test_what_is_read_early_changes_nothing(part: Term, sources: tuple[str, ...]) -> None:
    data = data_of()
    logps = {name: value.clone() for name, value in data.logps.items()}
    for source in sources:
        logps[source][0, 0] = -torch.inf

    def results(*, readable: bool) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        leaf = logps["policy"].clone().requires_grad_()
        batch = batch_for(part, replace(data, logps={**logps, "policy": leaf})).replace(readable=readable)
        loss, terms = Objective(term=part)(batch)
        found = (
            torch.autograd.grad(loss, [leaf], allow_unused=True, materialize_grads=True) if loss.requires_grad else ()
        )
        return loss.detach(), list(found), {name: metric.value() for name, metric in terms["term"].metrics.items()}

    torch.testing.assert_close(
        results(readable=True), results(readable=False), rtol=1e-6, atol=1e-6, equal_nan=True, check_dtype=False
    )


@pytest.mark.parametrize("part", parts(Term))
def test_gradients_add_to_those_of_another_term(part: Term) -> None:
    data = data_of(dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in data.leaves().values()]
    other = 0.5 * rlstab.losses.KL(estimator="k2", reference="moving", rows=part.rows)
    batch = batch_with(part.requires | other.requires, data).replace(rows=part.rows)

    def gradient(objective: Objective) -> list[Tensor]:
        found = torch.autograd.grad(objective(batch).loss, leaves, allow_unused=True, retain_graph=True)
        return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]

    alone = zip(gradient(Objective(first=part)), gradient(Objective(second=other)), strict=True)
    torch.testing.assert_close(gradient(Objective(first=part, second=other)), [one + two for one, two in alone])


@pytest.mark.compile
@pytest.mark.parametrize("part", parts(Term, Weight, Ratio))
def test_it_compiles_without_a_break(part: Part) -> None:
    data = data_of()
    batch = batch_for(part, data)
    held = {**batch.logps, **batch.vocab}
    names = [name for name in ("policy", *batch.vocab) if name in held]
    leaves = [held[name].detach().requires_grad_() for name in names]

    def loss_of(*leaves: Tensor) -> Tensor:
        given = dict(zip(names, leaves, strict=True))
        logps = {name: given.get(name, value) for name, value in batch.logps.items()}
        vocab = {name: given.get(name, value) for name, value in batch.vocab.items()}
        return reduced(part, batch.replace(logps=logps, vocab=vocab))

    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=False)
    ours, eager = compiled(*leaves), loss_of(*leaves)
    torch.testing.assert_close(ours, eager)
    assert ours.requires_grad == eager.requires_grad
    if eager.requires_grad:
        gradients = [
            torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True) for loss in (ours, eager)
        ]
        torch.testing.assert_close(*gradients)


# --- rollout parts -------------------------------------------------------------------


@pytest.mark.parametrize("part", parts(RolloutPart))
def test_rows_may_come_in_any_order(part: RolloutPart) -> None:
    data = data_of(dtype=torch.float64)
    order = torch.tensor([5, 2, 6, 0, 4, 1, 3])
    batch = batch_for(part, data)
    torch.testing.assert_close(part.compute(batch.select(order)), part.compute(batch)[order])


@pytest.mark.parametrize("part", parts(RolloutPart))
@pytest.mark.parametrize("reward", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_reward_changes_nothing_for_others(part: RolloutPart, reward: float) -> None:
    if Column("rewards") not in part.requires:
        pytest.skip("reads no rewards")
    data = data_of(dtype=torch.float64)
    rewards = data.columns["rewards"].clone()
    rewards[[2, 5]] = reward
    batch = batch_for(part, replace(data, columns={**data.columns, "rewards": rewards}))
    values = part.compute(batch)
    assert values.isfinite().all()
    scored = rewards.isfinite()
    torch.testing.assert_close(values[scored], part.compute(batch.select(scored)))
    if isinstance(part, Advantage):
        assert not values[~scored].any()
