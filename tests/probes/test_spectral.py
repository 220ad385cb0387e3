"""Spectral alignment: worked numbers, power iteration, and one-sidedness that came about."""

import pytest
import torch
from monitor_vectors import vector

from rlstab.models import tiny_causal_lm, tiny_tokenizer
from rlstab.probes import SpectralAlignment, alignment, leading_direction, one_sidedness

WORKED = vector("spectral_alignment")
TOKENIZER = tiny_tokenizer("0123456789=")


def test_worked_alignment() -> None:
    direction = leading_direction(torch.tensor(WORKED["W (out x in)"]))
    torch.testing.assert_close(direction.abs(), torch.tensor(WORKED["v1"]))
    cosines = alignment(torch.tensor(WORKED["inputs"]), direction * direction[0].sign())
    torch.testing.assert_close(cosines, torch.tensor(WORKED["sa"]))
    share = float(one_sidedness(cosines))
    assert share == pytest.approx(WORKED["majority_sign"])
    assert max(WORKED["pos_frac_nonzero"], 1 - WORKED["pos_frac_nonzero"]) == share
    assert 1 - abs(2 * WORKED["pos_frac_nonzero"] - 1) == WORKED["sign_balance 1-|p+-p-|"]


def test_no_sign_is_no_side() -> None:
    assert float(one_sidedness(torch.zeros(3))) == 0.5


def test_power_iteration_follows_a_weight_that_moves() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 48, generator=generator)
    weight += 8 * torch.outer(torch.randn(64, generator=generator), torch.randn(48, generator=generator)) / 48**0.5
    direction = leading_direction(weight)
    for _ in range(50):
        weight = weight + 0.02 * torch.randn(64, 48, generator=generator)
        direction = leading_direction(weight, direction)
        truth = torch.linalg.svd(weight).Vh[0]
        assert float((direction @ truth).abs()) > 0.999


def measured(probe: SpectralAlignment, model: torch.nn.Module) -> dict[str, float]:
    ids = torch.randint(4, 14, (4, 16), generator=torch.Generator().manual_seed(2))
    probe.arm()
    model(input_ids=ids)
    return {key: float(value) for key, value in probe.collect().items()}


def test_a_layer_that_becomes_one_sided_is_counted() -> None:
    """A rank-1 component along the mean input turns all signs the same way."""
    model = tiny_causal_lm(TOKENIZER, seed=0, hidden=32, layers=2, heads=2).train()
    layer = model.model.layers[0].self_attn.q_proj
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, given: inputs.append(given[0].detach()))
    bias = torch.zeros(32)
    layer_norm = model.model.layers[0].input_layernorm
    layer_norm.register_forward_hook(lambda module, given, output: output + bias)
    probe = SpectralAlignment(layers=2)
    probe.attach(model)
    before = measured(probe, model)
    assert before["spectral/one_sided"] == 0.0
    bias += 3.0 * torch.nn.functional.normalize(torch.ones(32), dim=0) * 32**0.5
    layer.weight.data += 20 * torch.outer(torch.randn(32), bias / bias.norm())
    handle.remove()
    after = measured(probe, model)
    assert after["spectral/one_sided"] > 0
    assert after["spectral/sign_collapse"] > before["spectral/sign_collapse"]
    resumed = SpectralAlignment(layers=2)
    resumed.load_state_dict(probe.state_dict())
    resumed.attach(model)
    assert measured(resumed, model)["spectral/one_sided"] == pytest.approx(after["spectral/one_sided"])


def test_what_was_one_sided_from_the_first_does_not_count() -> None:
    model = tiny_causal_lm(TOKENIZER, seed=0, hidden=32, layers=2, heads=2).train()
    model.model.layers[0].input_layernorm.register_forward_hook(lambda module, given, output: output + 50.0)
    probe = SpectralAlignment(layers=2)
    probe.attach(model)
    assert measured(probe, model)["spectral/sign_collapse"] > 0.6
    assert measured(probe, model)["spectral/one_sided"] == 0.0
