"""Attention entropies: worked numbers, the bound, and what the model's own weights say."""

import math

import pytest
import torch
from monitor_vectors import vector

from rlstab.models import tiny_causal_lm, tiny_tokenizer
from rlstab.probes import Attention, attention_entropy, entropy_bound
from rlstab.probes._attention import of_rows, row_logits

WORKED = vector("attention_entropy")
TOKENIZER = tiny_tokenizer("0123456789=")


def test_worked_entropies() -> None:
    assert float(attention_entropy(torch.zeros(4))) == pytest.approx(WORKED["uniform_T4"], abs=1e-6)
    found = attention_entropy(torch.tensor([2.0, 0.0, 0.0, 0.0]))
    assert float(found) == pytest.approx(WORKED["softmax([2,0,0,0])"], abs=1e-6)


@pytest.mark.parametrize("key", WORKED["lower_bound(sigma,T)"])
def test_worked_bounds(key: str) -> None:
    sigma, keys = key.split(",")
    assert entropy_bound(float(sigma), int(keys)) == pytest.approx(WORKED["lower_bound(sigma,T)"][key], rel=1e-9)


def test_the_bound_is_attained() -> None:
    sigma, entropy = WORKED["tightness: entropy of extremal logits |u|=2,T=4"]
    keys = 4
    extremal = torch.full((keys,), -sigma / math.sqrt(keys * (keys - 1)))
    extremal[0] = sigma * math.sqrt((keys - 1) / keys)
    assert float(extremal.norm()) == pytest.approx(sigma)
    assert float(attention_entropy(extremal)) == pytest.approx(entropy, abs=1e-6)
    assert entropy_bound(sigma, keys) == pytest.approx(entropy, abs=1e-9)


def test_the_bound_holds() -> None:
    logits = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)).double() * 2
    for row in logits:
        assert float(attention_entropy(row)) >= entropy_bound(float(row.norm()), 8) - 1e-12


def test_every_worked_number_is_used() -> None:
    assert set(WORKED) == {
        "uniform_T4",
        "softmax([2,0,0,0])",
        "lower_bound(sigma,T)",
        "tightness: entropy of extremal logits |u|=2,T=4",
    }


def test_keys_out_of_sight_do_not_count() -> None:
    logits, visible = torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([[True, True, False]])
    assert float(attention_entropy(logits, visible)) == pytest.approx(math.log(2))
    assert float(attention_entropy(logits, torch.zeros(1, 3).bool())) == 0.0


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_sampled_rows_equal_the_whole_attention(kind: str) -> None:
    """Against softmax weights computed whole, with grouped keys and a padded row."""
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 4, 6, 8, generator=generator), torch.randn(2, 2, 6, 8, generator=generator)
    causal = torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6).clone()
    if kind != "none":
        causal[1, :, :, :2] = False
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~causal, torch.finfo(torch.float32).min)
    mask = {"none": None, "bool": causal, "additive": additive}[kind]
    rows = torch.tensor([3, 5, 8, 11])
    logits, visible = row_logits(query, key, mask, 0.5, rows=rows, heads=4)
    whole = (query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.5).masked_fill(~causal, -torch.inf)
    for n, row in enumerate(rows.tolist()):
        weights = whole[row // 6, :, row % 6].softmax(-1)
        torch.testing.assert_close(logits[n].masked_fill(~visible[n], -torch.inf), whole[row // 6, :, row % 6])
        entropies = torch.special.entr(weights).sum(-1)
        torch.testing.assert_close(attention_entropy(logits[n], visible[n]), entropies)


def test_rows_that_see_one_key_are_left_out() -> None:
    logits = torch.zeros(2, 1, 2)
    visible = torch.tensor([[[True, False]], [[True, True]]])
    assert of_rows(logits, visible).tolist() == pytest.approx([1.0, 1.0, 0.0])
    assert of_rows(logits[:1], visible[:1])[0].isnan()


def test_the_signals_follow_the_models_own_attention() -> None:
    """Against the weights that eager attention returns, with every head and position sampled."""
    model = tiny_causal_lm(TOKENIZER, seed=0, hidden=32, layers=2, heads=2).train()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 30
    ids = torch.randint(4, 14, (1, 16), generator=torch.Generator().manual_seed(2))
    probe = Attention(layers=2, heads=2)
    probe.attach(model)
    probe.arm()
    model(input_ids=ids)
    found = probe.collect()
    probe.detach()
    model.set_attn_implementation("eager")
    shares = []
    for weights in model(input_ids=ids, output_attentions=True).attentions:
        share = torch.special.entr(weights[0]).sum(-1)[:, 1:] / torch.arange(2, 17).log()
        shares.append(share.mean(-1))
    heads = torch.stack(shares).detach()
    assert float(found["attention/entropy"]) == pytest.approx(float(heads.mean()), abs=2e-5)
    assert float(found["attention/entropy_min"]) == pytest.approx(float(heads.min()), abs=2e-5)
    assert float(heads.min()) < 0.97
