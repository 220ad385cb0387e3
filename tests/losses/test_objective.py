import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rlstab.batch import Column, LogProbs, Requirement, TokenBatch
from rlstab.errors import CompositionError, ConfigError
from rlstab.losses import (
    CISPO,
    KL,
    VESPO,
    EntropyBonus,
    EntropyTarget,
    GroupCenter,
    KLCov,
    Linear,
    Loss,
    Objective,
    PreClippedRatio,
    SigmaFilter,
    Surrogate,
    Term,
    TokenRatio,
    TopEntropy,
    TruncatedIS,
    term_name,
)
from rlstab.losses import Sum as MetricSum


@dataclass(frozen=True, kw_only=True)
class Reward(Surrogate):
    def surrogate(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Any]]:
        return -batch.token_advantages() * batch.logp("policy"), {}


@dataclass(frozen=True, kw_only=True)
class Pull(Term):
    power: int = 2

    @property
    def requires(self) -> frozenset[Requirement]:
        return frozenset({LogProbs("policy"), LogProbs("initial")})

    def loss(self, batch: TokenBatch) -> Loss:
        distance = batch.logp("policy") - batch.logp("initial")
        return Loss(distance**self.power, {"distance": MetricSum(distance.detach().sum(), batch.loss_mask.sum())})


@dataclass(frozen=True, kw_only=True)
class Imitate(Term):
    rows: str = "demonstration"

    def loss(self, batch: TokenBatch) -> Loss:
        return Loss(-batch.logp("policy"), {})


def batch_of(rows: int = 4, length: int = 3, **fields: Any) -> tuple[TokenBatch, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    logp = torch.randn(rows, length, generator=generator, dtype=torch.float64).requires_grad_()
    batch = TokenBatch(
        mask=torch.arange(length) <= torch.arange(rows).unsqueeze(-1),
        logps={"policy": logp, "initial": torch.randn(rows, length, generator=generator, dtype=torch.float64)},
        advantages=torch.randn(rows, generator=generator, dtype=torch.float64),
        **fields,
    )
    return batch, logp


def gradient(objective: Objective) -> Tensor:
    batch, logp = batch_of()
    return torch.autograd.grad(objective(batch).loss, logp)[0]


def test_an_objective_is_the_weighted_sum_of_its_terms() -> None:
    batch, _ = batch_of()
    objective = Objective(policy=Reward(), drift=0.1 * Pull().mean("sequence"))
    loss, terms = objective(batch)
    assert list(terms) == ["policy", "drift"]
    torch.testing.assert_close(loss, terms["policy"].loss + 0.1 * terms["drift"].loss)
    assert terms["drift"].weight == 0.1
    assert not terms["policy"].loss.requires_grad
    assert "distance" in terms["drift"].metrics


def test_gradients_add() -> None:
    first, second = Objective(policy=Reward()), Objective(drift=0.3 * Pull())
    torch.testing.assert_close(gradient(first + second), gradient(first) + gradient(second))
    torch.testing.assert_close(gradient(2.5 * (first + second)), 2.5 * gradient(first) + 2.5 * gradient(second))


def test_addition_takes_names_from_classes_or_objectives() -> None:
    joined = Reward() + 0.5 * Pull()
    assert list(joined.terms) == ["reward", "pull"]
    assert list((joined + KLCov()).terms) == ["reward", "pull", "kl_cov"]
    assert list((Reward() + Objective(drift=Pull())).terms) == ["reward", "drift"]
    assert joined == Objective(reward=Reward(), pull=0.5 * Pull())
    assert Objective({"reward": Reward()}, pull=0.5 * Pull()) == joined


@pytest.mark.parametrize(("term", "name"), [(KLCov(), "kl_cov"), (CISPO(), "cispo"), (EntropyBonus(), "entropy_bonus")])
def test_names_are_snake_case(term: Term, name: str) -> None:
    assert term_name(term) == name


def test_multiplication_gives_copies() -> None:
    term = Pull(coef=0.5)
    assert (4 * term).coef == (term * 4).coef == 2.0
    assert term.coef == 0.5
    scaled = (Objective(drift=term) * 3).terms["drift"]
    assert scaled.coef == 1.5


def test_an_objective_requires_what_its_terms_require() -> None:
    assert Objective(policy=Reward(), drift=Pull()).requires == {
        Column("advantages"),
        LogProbs("policy"),
        LogProbs("initial"),
    }
    assert Objective(policy=Reward()).requires == {Column("advantages"), LogProbs("policy")}


def test_each_row_source_has_its_own_batch_and_counts() -> None:
    rollout, logp = batch_of(rows=4)
    demonstration, demo_logp = batch_of(rows=2)
    demonstration = demonstration.replace(rows="demonstration")
    loss, terms = Objective(policy=Reward(), imitate=0.5 * Imitate())(rollout, demonstration)
    loss.backward()
    imitation = -demo_logp[demonstration.mask].mean()
    torch.testing.assert_close(terms["imitate"].loss, imitation.detach())
    torch.testing.assert_close(demo_logp.grad, -0.5 * demonstration.mask.double() / demonstration.mask.sum())
    torch.testing.assert_close(logp.grad, -rollout.token_advantages() * rollout.mask / rollout.mask.sum())


def test_a_term_without_its_rows_is_an_error() -> None:
    batch, _ = batch_of()
    with pytest.raises(ConfigError, match=r"'imitate' acts on 'demonstration' rows.*\['rollout'\]"):
        Objective(imitate=Imitate())(batch)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Objective(), ConfigError, "at least one term"),
        (lambda: Objective(policy=0.5), ConfigError, r"objective\.terms\.policy: expected a term, got 0.5"),  # type: ignore[arg-type]
        (lambda: Objective({"a": Pull()}, a=Pull()), CompositionError, r"\['a'\] are given twice"),
        (lambda: Objective(a=Reward(), b=Reward()), CompositionError, "'a' and 'b' are both policy surrogates"),
        (lambda: Pull() + Pull(power=4), CompositionError, r"\['pull'\].*Objective\(first="),
        (lambda: Objective(a=Pull()) + Objective(a=Pull()), CompositionError, r"\['a'\]"),
        (lambda: Pull() + Reward() + Pull(), CompositionError, r"\['pull'\]"),
    ],
)
def test_refusals(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def untyped(value: Any) -> Any:
    """Hides a mistake from the type checker."""
    return value


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Objective(policy=untyped(CISPO)), r"objective\.terms\.policy: .*got the class CISPO: call it"),
        (lambda: Objective(untyped([CISPO()])), r"objective\.terms: expected terms by name, as in .*got a list"),
        (
            lambda: Objective(Pull(), advantage=untyped(GroupCenter)),
            r"objective\.advantage: .*class GroupCenter: call it",
        ),
        (lambda: Objective(Pull()).with_advantage(untyped("GroupCenter")), r"objective\.advantage: .*'GroupCenter'"),
        (lambda: Objective(Pull(), advantage=untyped(CISPO())), r"expected GroupNorm\(\) or another RolloutPart, got"),
        (lambda: Pull(coef=torch.nan), r"Pull\.coef: expected a finite number, got nan"),
        (lambda: Pull(coef=untyped(None)), r"Pull\.coef: .*got None"),
        (lambda: Pull(coef=untyped("0.1")), r"Pull\.coef: .*got '0\.1'"),
        (lambda: Pull(coef=True), r"Pull\.coef: .*got True"),
        (lambda: Pull() * untyped(torch.tensor(2.0)), r"a factor of Pull: expected a finite number, got tensor\(2\.\)"),
        (lambda: torch.tensor(2.0) * untyped(Pull()), r"a factor of Pull: .*got tensor\(2\.\)"),
        (lambda: Pull() * untyped(Pull()), r"a factor of Pull: .*got a Pull"),
        (lambda: untyped("2") * Pull(), r"a factor of Pull: .*got '2'"),
        (lambda: Objective(a=Pull()) * untyped(None), r"a factor of Pull: .*got None"),
        (lambda: Pull() / untyped("2"), r"a divisor of Pull: .*got '2'"),
        (
            lambda: Pull(mean=untyped("token")),
            r"Pull\.mean: expected a Mean such as .*'token': or call \.mean\('token'\)",
        ),
        (lambda: Pull() - Pull(coef=Linear(start=1.0, end=0.0, steps=4)), r"Pull\.coef is a controller"),
        (lambda: Linear(start=1.0, end=torch.inf, steps=4), r"Linear\.end: expected a finite number, got inf"),
        (
            lambda: CISPO(ratio=untyped(TokenRatio)),
            r"CISPO\.ratio: expected TokenRatio\(\) or another Ratio, got the class",
        ),
        (lambda: KL(ratio=untyped("token")), r"KL\.ratio: .* or another Ratio, got 'token'"),
        (lambda: PreClippedRatio(ratio=untyped(None)), r"PreClippedRatio\.ratio: .*got None"),
        (
            lambda: CISPO(weights=[untyped(TruncatedIS)]),
            r"CISPO\.weights: .* another Weight, got the class TruncatedIS",
        ),
        (lambda: CISPO(weights=untyped(TokenRatio())), r"CISPO\.weights: .*got TokenRatio\("),
        (lambda: EntropyBonus(weights=untyped("TopEntropy")), r"EntropyBonus\.weights: .*got 'TopEntropy'"),
        (lambda: VESPO(correction=untyped(TokenRatio())), r"VESPO\.correction: .* another SamplerCorrection, got"),
        (lambda: SigmaFilter(advantage=untyped(GroupCenter)), r"SigmaFilter\.advantage: .* another Advantage, got the"),
    ],
)
def test_fields_are_checked(build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(
    "build", [lambda: Pull() + untyped(1), lambda: 1 + Pull(), lambda: Objective(a=Pull()) - untyped(1)]
)
def test_numbers_cannot_be_added(build: Any) -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        build()


def test_a_single_weight_will_do() -> None:
    weight = TruncatedIS(max=2.0)
    assert CISPO(weights=untyped(weight)) == CISPO(weights=[weight]) == CISPO(weights=(weight,))
    top = TopEntropy(fraction=0.5)
    assert EntropyBonus(weights=untyped(top)) == EntropyBonus(weights=(top,))


def test_a_single_term_takes_its_name_from_its_class() -> None:
    assert Objective(Reward()) == Objective(reward=Reward())
    assert Objective(Reward(), drift=Pull()) == Objective(reward=Reward(), drift=Pull())


def test_terms_add_up_subtract_and_divide() -> None:
    both: list[Term] = [Reward(), 0.5 * Pull()]
    assert untyped(sum(both)) == Objective(reward=Reward(), pull=0.5 * Pull())
    assert untyped(sum([Reward()])) == untyped(sum([Objective(Reward())])) == Objective(reward=Reward())
    assert (Pull() / 4).coef == 0.25
    assert (-Pull(coef=0.5)).coef == -0.5
    assert Reward() - Pull() == Objective(reward=Reward(), pull=-1.0 * Pull())
    assert Objective(Reward()) - Objective(drift=Pull()) == Objective(reward=Reward(), drift=-Pull())
    halved = -Objective(Reward(), advantage=GroupCenter()) / 2
    assert (halved.terms["reward"].coef, halved.advantage) == (-0.5, GroupCenter())


@dataclass(frozen=True, kw_only=True)
class Infinite(Term):
    def loss(self, batch: TokenBatch) -> Loss:
        logp = batch.logp("policy")
        return Loss(torch.where(batch.loss_mask, torch.inf, 0.0) + logp, {})


@pytest.mark.parametrize("coef", [0, 0.0, Linear(start=0.0, end=0.0, steps=1)], ids=repr)
def test_a_coefficient_of_zero_switches_an_infinite_term_off(coef: Any) -> None:
    batch, logp = batch_of()
    loss, terms = Objective(policy=Reward(), drift=Infinite(coef=coef))(batch)
    alone = Objective(policy=Reward())(batch).loss
    assert loss == alone
    assert loss.dtype == alone.dtype
    assert terms["drift"].loss.isinf()
    gradients = [torch.autograd.grad(value, logp, retain_graph=True) for value in (loss, alone)]
    torch.testing.assert_close(*gradients)


def test_an_objective_of_weight_zero_can_be_descended() -> None:
    batch, logp = batch_of()
    loss = (0 * Objective(policy=Reward(), drift=Infinite()))(batch).loss
    assert loss == 0
    assert not torch.autograd.grad(loss, logp)[0].any()


@pytest.mark.parametrize("coef", [0.5, Linear(start=0.5, end=0.5, steps=1)], ids=repr)
def test_another_coefficient_leaves_it_infinite(coef: Any) -> None:
    batch, _ = batch_of()
    assert Objective(drift=Infinite(coef=coef))(batch).loss == torch.inf


def test_surrogates_on_different_rows_go_together() -> None:
    objective = Objective(policy=Reward(), replay=Reward(rows="buffer"))
    batch, _ = batch_of()
    loss, terms = objective(batch, batch.replace(rows="buffer"))
    torch.testing.assert_close(loss, 2 * terms["policy"].loss)


def test_objectives_are_values() -> None:
    objective = Objective(policy=Reward(), drift=0.1 * Pull().mean("sequence"))
    assert copy.deepcopy(objective) == objective
    assert pickle.loads(pickle.dumps(objective)) == objective
    assert Objective(policy=Reward()) != objective


def test_controllers_set_the_coefficient_and_are_saved() -> None:
    def build() -> Objective:
        return Objective(
            policy=Reward(),
            drift=Pull(coef=Linear(start=1.0, end=0.0, steps=4)),
            calm=KLCov(coef=EntropyTarget(target=1.0)),
        )

    objective = build()
    assert set(objective.controllers) == {"drift", "calm"}
    objective.observe(1, {"calm": {"entropy": 0.5}})
    batch, _ = batch_of()
    batch = batch.replace(parts={KLCov().selection.key: torch.zeros_like(batch.mask)})
    loss, terms = objective(batch)
    assert float(terms["drift"].weight) == 0.75
    torch.testing.assert_close(loss.detach(), terms["policy"].loss + 0.75 * terms["drift"].loss)

    resumed = build()
    resumed.load_state_dict(objective.state_dict())
    assert resumed.state_dict() == objective.state_dict()
    assert float(resumed.terms["drift"].coefficient) == 0.75
    with pytest.raises(ConfigError, match=r"controllers of \['calm', 'drift'\].*at \[\]"):
        Objective(policy=Reward()).load_state_dict(objective.state_dict())


def test_the_loss_keeps_its_dtype_under_a_controller() -> None:
    batch = TokenBatch(mask=torch.ones(1, 2), logps={"policy": torch.zeros(1, 2), "initial": torch.ones(1, 2)})
    assert Objective(a=Pull(coef=Linear(start=0.5, end=0.5, steps=1)))(batch).loss.dtype == torch.float32


def test_a_controller_cannot_be_multiplied() -> None:
    with pytest.raises(ConfigError, match=r"Pull\.coef is a controller"):
        _ = 2 * Pull(coef=Linear(start=1.0, end=0.0, steps=4))


@pytest.mark.compile
def test_terms_with_one_mean_compile_and_add_up() -> None:
    batch, logp = batch_of(vocab={"entropy": torch.rand(4, 3, dtype=torch.float64)})
    objective = Objective(
        policy=Reward(),
        pull=0.5 * Pull(),
        entropy=EntropyBonus(coef=-2.0).mean("sequence"),
        off=KL(coef=0.0),
    )

    def loss_of(policy: Tensor) -> Tensor:
        return objective(batch.replace(logps={**batch.logps, "policy": policy})).loss

    loss, terms = objective(batch)
    torch.testing.assert_close(loss, torch.stack([float(t.weight) * t.loss for t in terms.values()]).sum())
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=False)(logp)
    torch.testing.assert_close(compiled, loss)
    torch.testing.assert_close(torch.autograd.grad(compiled, logp), torch.autograd.grad(loss, logp))
