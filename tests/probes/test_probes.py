"""Probes look and change nothing: outputs, gradients and generators of random numbers stay what they are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlstab.errors import ConfigError
from rlstab.models import tiny_causal_lm, tiny_tokenizer
from rlstab.probes import Activations, Attention, Probe, SpectralAlignment, decoder_layers
from rlstab.probes._activations import shape_of
from rlstab.schema import signal

TOKENIZER = tiny_tokenizer("0123456789=")
PROBES: list[Callable[[], Probe]] = [Activations, Attention, SpectralAlignment]


def policy(seed: int = 0) -> Any:
    return tiny_causal_lm(TOKENIZER, seed=seed, hidden=32, layers=2, heads=2).train()


def call(model: Any, *, pads: int = 2) -> Tensor:
    """A micro-batch of three left-padded rows."""
    ids = torch.randint(4, 14, (3, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :pads] = 0
    logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits


def trained(model: Any) -> list[Tensor]:
    logits = call(model)
    logits.square().mean().backward()
    return [logits, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("make", PROBES)
def test_outputs_and_gradients_are_identical(make: Callable[[], Probe]) -> None:
    expected = trained(policy())
    model, probe, state = policy(), make(), torch.get_rng_state()
    probe.attach(model)
    probe.arm()
    assert all(torch.equal(a, b) for a, b in zip(trained(model), expected, strict=True))
    assert probe.collect()
    probe.detach()
    assert torch.equal(state, torch.get_rng_state())
    model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(trained(model), expected, strict=True))


@pytest.mark.parametrize("make", PROBES)
def test_signals_are_of_the_schema_and_finite(make: Callable[[], Probe]) -> None:
    model, probe = policy(), make()
    probe.attach(model)
    probe.arm()
    call(model)
    found = probe.collect()
    assert all(signal(key).key == key for key in found)
    assert all(value.dim() == 0 and bool(value.isfinite()) for value in found.values())


@pytest.mark.parametrize("make", PROBES)
def test_a_probe_looks_only_when_it_is_its_turn(make: Callable[[], Probe]) -> None:
    model, probe = policy(), make()
    probe.attach(model)
    call(model)
    assert probe.collect() == {}
    probe.arm()
    with torch.no_grad():
        call(model)
    assert probe.collect() == {}
    probe.arm()
    call(model)
    first = {key: float(value) for key, value in probe.collect().items()}
    call(model)
    assert probe.collect() == {}
    probe.arm()
    call(model)
    call(model, pads=5)
    assert {key: float(value) for key, value in probe.collect().items()} == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize("make", PROBES)
def test_gradient_checkpointing_is_seen_once(make: Callable[[], Probe]) -> None:
    model, probe = policy(), make()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    probe.attach(model)
    probe.arm()
    assert trained(model)
    assert probe.collect()


@pytest.mark.parametrize("make", PROBES)
def test_detached_leaves_no_hook(make: Callable[[], Probe]) -> None:
    model, probe = policy(), make()
    before = model.config._attn_implementation
    probe.attach(model)
    probe.detach()
    assert model.config._attn_implementation == before
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_padding_is_not_looked_at() -> None:
    """Massive activations at padded positions do not show."""
    model, probe = policy(), Activations()
    ids = torch.full((2, 10), 5)
    mask = torch.ones_like(ids)
    mask[:, :4] = 0

    def spoil(module: nn.Module, inputs: Any, output: Any) -> Any:
        return torch.where(mask.unsqueeze(-1).bool(), output, 1e6)

    for layer in decoder_layers(model).values():
        layer.register_forward_hook(spoil)
    probe.attach(model)
    probe.arm()
    model(input_ids=ids, attention_mask=mask)
    assert float(probe.collect()["activation/rms"]) < 1e3


def test_shape_of_activations() -> None:
    gaussian = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    assert float(shape_of(gaussian)[0]) == pytest.approx(3.0, abs=0.05)
    gaussian[:, 0] *= 60
    kurtosis, _, massive = shape_of(gaussian).tolist()
    assert 450 < kurtosis < 1000
    assert massive > 60


def test_models_without_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has no list of layers"):
        Activations().attach(nn.Linear(2, 2))
    bare = nn.Sequential(nn.ModuleList([nn.ReLU()]))
    with pytest.raises(ConfigError, match="expected a model with attn_implementation='sdpa', got 'Sequential'"):
        Attention().attach(bare)
    with pytest.raises(ConfigError, match="SpectralAlignment: expected linear layers named q_proj"):
        SpectralAlignment().attach(bare)


def test_eager_attention_is_refused() -> None:
    model = policy()
    model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="expected a model with attn_implementation='sdpa', got 'eager'"):
        Attention().attach(model)
