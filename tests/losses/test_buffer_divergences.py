"""DPH-RL's divergences on samples of the initial policy, by expectation over every sequence of a small world."""

from typing import Literal

import pytest
import torch
from enumeration import Sequences, Tokens, assert_exact, expectation, gradient, relative
from generators import alpha_divergence, forward_kl
from torch import Tensor

from rlstab.errors import ConfigError
from rlstab.losses import ForwardKL, Term, presets

Kind = Literal["forward", "js", "alpha"]
RECORDED = ("policy", "initial")


def released_js(u: Tensor) -> Tensor:
    """What the released code calls `js_low_var`: twice the JS divergence."""
    return u * u.log() - (u + 1) * ((u + 1) / 2).log()


GENERATORS = {"forward": forward_kl, "js": released_js, "alpha": alpha_divergence(0.2)}


def keep(kind: Kind) -> Term:
    return presets.dph(divergence=kind, coef=0.5).terms["keep"]


def drawn(term: Term, world: Tokens | Sequences, drawn_by: str = "initial") -> Tensor:
    """The expected loss with its coefficient, on rows drawn by the initial policy."""
    return term.coefficient * expectation(term, world, drawn_by=drawn_by, recorded=RECORDED)


@pytest.mark.parametrize("kind", list(GENERATORS))
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_of_next_tokens(kind: Kind, seed: int) -> None:
    world = Tokens(seed=seed)
    found, truth = drawn(keep(kind), world), 0.5 * world.divergence(GENERATORS[kind])
    assert_exact(found, truth)
    assert_exact(gradient(found, world), gradient(truth, world))


@pytest.mark.parametrize("kind", list(GENERATORS))
def test_per_token_they_are_the_divergences_at_the_prefixes_of_the_buffer(kind: Kind) -> None:
    world = Sequences()
    found, truth = drawn(keep(kind), world), 0.5 * world.local_divergence(GENERATORS[kind], "initial")
    assert_exact(found, truth)
    assert_exact(gradient(found, world), gradient(truth, world))


@pytest.mark.parametrize("kind", list(GENERATORS))
def test_with_the_target_of_sequences_they_are_those_of_sequences(kind: Kind) -> None:
    world, term = Sequences(), keep(kind).replace(target="sequence")
    found, truth = drawn(term, world), 0.5 * world.divergence(GENERATORS[kind])
    assert_exact(found, truth)
    assert_exact(gradient(found, world), gradient(truth, world))


def test_the_forward_kl_per_token_is_already_that_of_sequences_and_the_others_are_not() -> None:
    world = Sequences()
    for kind in ("forward", "js", "alpha"):
        whole = gradient(0.5 * world.divergence(GENERATORS[kind]), world)
        error = relative(gradient(drawn(keep(kind), world), world) - whole, whole)
        assert error < 1e-12 if kind == "forward" else error > 0.1


def test_on_rollouts_of_the_policy_the_same_losses_are_biased() -> None:
    """Buffer rows cannot be replaced by the policy's own: that is why they are rows of another source."""
    world = Tokens()
    for kind in ("forward", "js", "alpha"):
        truth = gradient(0.5 * world.divergence(GENERATORS[kind]), world)
        found = gradient(drawn(keep(kind), world, "policy"), world)
        assert relative(found - truth, truth) > 0.3


def test_the_definition_mode_of_js_is_biased_on_rollouts() -> None:
    """k3(M/policy) on the policy's tokens, differentiated as it stands; the half on the buffer, k3(M/ref), is exact."""
    world = Tokens()
    p, ref = world.rows["policy"][:, 0], world.rows["initial"][:, 0].detach()
    mixture = torch.logaddexp(p, ref) - torch.tensor(2.0, dtype=torch.float64).log()

    def k3(log_ratio: Tensor) -> Tensor:
        return torch.expm1(log_ratio) - log_ratio

    buffer = (ref.exp() * k3(mixture - ref)).sum()
    assert_exact(gradient(buffer, world), gradient((ref.exp() * (ref - mixture)).sum(), world))
    rollouts = (p.detach().exp() * k3(mixture - p)).sum()
    truth = gradient((p.exp() * (p - mixture)).sum(), world)
    assert relative(gradient(rollouts, world) - truth, truth) > 0.3


def test_what_the_policy_has_given_up_still_pulls() -> None:
    """The released clamp has no gradient below ref/13.6; here it grows."""
    term = keep("forward")
    assert isinstance(term, ForwardKL)
    assert term.clamp is None
    world = Tokens()
    with torch.no_grad():
        world.logits["policy"][0] -= 12.0
    found = gradient(drawn(term, world), world)
    assert_exact(found, gradient(0.5 * world.divergence(forward_kl), world))
    assert found[0] < -0.05


def test_another_divergence_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dph\.divergence: expected one of 'forward', 'js', 'alpha', got 'kl'"):
        presets.dph(divergence="kl")  # type: ignore[arg-type]
