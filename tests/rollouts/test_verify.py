"""The proof at each sync: engines that go wrong in one way each are found, and their fault is named."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlstab.errors import ConfigError, WeightSyncError
from rlstab.models import tiny_causal_lm, tiny_moe
from rlstab.rollouts import (
    Engine,
    Health,
    Request,
    Rollout,
    Sampling,
    SyncVerifier,
    TransformersEngine,
    WeightSource,
)

PROMPTS = [[4, 5, 6], [7, 8], [9], [10, 4, 3, 3]]
SAMPLING = Sampling(max_new_tokens=30, temperature=0.7, seed=1)


class Kept(WeightSource):
    """A source with the tensors of another in the place of some of its own."""

    def __init__(self, source: WeightSource, old: dict[str, Tensor]) -> None:
        self.source = source
        self.old = old

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.source.named_tensors():
            yield name, self.old.get(name, tensor)


class Faulty(Engine):
    """An engine of transformers' that loses tensors at a sync, or answers with log-probs of another temperature."""

    def __init__(
        self,
        engine: Engine,
        loses: Callable[[str], bool] = lambda name: False,
        *,
        after: int = 0,
        temperature: float | None = None,
    ) -> None:
        self.engine = engine
        self.loses = loses
        self.after = after
        self.temperature = temperature
        self.old: dict[str, Tensor] = {}

    @property
    def id(self) -> str:
        return self.engine.id

    @property
    def weight_version(self) -> int:
        return self.engine.weight_version

    @property
    def shares_weights(self) -> bool:
        return False

    @property
    def dtype(self) -> torch.dtype:
        return self.engine.dtype

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        rollouts = self.engine.generate(requests, sampling)
        if self.temperature is None:
            return rollouts
        scores = self.score([torch.cat([rollout.prompt_ids, rollout.token_ids]) for rollout in rollouts])
        for rollout, score in zip(rollouts, scores, strict=True):
            rollout.logprobs.copy_(score[len(rollout.prompt_ids) - 1 :])
        return rollouts

    def score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        return self.engine.score(sequences)

    def sync_weights(self, source: WeightSource, version: int) -> None:
        if not self.old:
            self.old = {name: tensor.clone() for name, tensor in source.named_tensors() if self.loses(name)}
        self.engine.sync_weights(Kept(source, self.old if version >= self.after else {}), version)

    def health(self) -> Health:
        return self.engine.health()

    def close(self) -> None:
        self.engine.close()


def peaked_model(tokenizer: PreTrainedTokenizerFast, *, moe: bool = False) -> PreTrainedModel:
    model: PreTrainedModel = tiny_moe(tokenizer) if moe else tiny_causal_lm(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


def take_a_step(model: PreTrainedModel, size: float, seed: int) -> None:
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * seed + index)
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))


def untied_copy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> TransformersEngine:
    """A copying engine whose head can be lost by itself."""
    engine = TransformersEngine(model, tokenizer, share=False)
    engine._model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    return engine


@pytest.mark.parametrize("moe", [False, True])
def test_a_true_engine_agrees_and_the_policy_is_as_before(tokenizer: PreTrainedTokenizerFast, moe: bool) -> None:
    model = peaked_model(tokenizer, moe=moe)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    verifier = SyncVerifier(TransformersEngine(model, tokenizer, share=False), model, SAMPLING)
    state = torch.get_rng_state()
    report = verifier.start(PROMPTS, 1)
    assert report.mean_abs < 1e-6
    assert report.staleness != report.staleness
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    for step in range(2, 5):
        take_a_step(model, 1e-3, step)
        report = verifier.sync(step)
        assert report.version == step
        assert abs(report.staleness) < 1e-3


@pytest.mark.parametrize(
    ("loses", "cause"),
    [
        ("lm_head", "head that is tied to the embedding kept its old weights"),
        ("mlp", "a part of the layers kept its old weights"),
        ("", "did not take the new weights"),
    ],
)
def test_lost_weights_are_found_at_the_start(tokenizer: PreTrainedTokenizerFast, loses: str, cause: str) -> None:
    model = peaked_model(tokenizer)
    engine = Faulty(untied_copy(model, tokenizer), lambda name: loses in name)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightSyncError, match=rf"does not follow the policy.*Likely cause: .*{cause}"):
        SyncVerifier(engine, model, SAMPLING).start(PROMPTS, 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_lost_experts_are_found_at_the_start(tokenizer: PreTrainedTokenizerFast) -> None:
    model = peaked_model(tokenizer, moe=True)
    engine = Faulty(TransformersEngine(model, tokenizer, share=False), lambda name: ".experts." in name)
    with pytest.raises(WeightSyncError, match=r"does not follow.*experts kept their old weights"):
        SyncVerifier(engine, model, SAMPLING).start(PROMPTS, 1)


def test_an_engine_that_goes_stale_later(tokenizer: PreTrainedTokenizerFast) -> None:
    model = peaked_model(tokenizer)
    copy = TransformersEngine(model, tokenizer, share=False)
    verifier = SyncVerifier(Faulty(copy, lambda name: True, after=3), model, SAMPLING)
    verifier.start(PROMPTS, 1)
    take_a_step(model, 1e-3, 2)
    assert verifier.sync(2).staleness < 0.01
    take_a_step(model, 1e-3, 3)
    with pytest.raises(WeightSyncError, match=r"nearer to the weights before than to those of version 3"):
        verifier.sync(3)


@pytest.mark.parametrize("stale", [True, False])
def test_steps_smaller_than_the_rounding(tokenizer: PreTrainedTokenizerFast, stale: bool) -> None:
    """One step moves log-probs by a tenth of the rounding: the evidence grows over syncs."""
    model = peaked_model(tokenizer)
    copy = TransformersEngine(model, tokenizer, share=False, dtype=torch.bfloat16)
    engine = Faulty(copy, lambda name: stale, after=2)
    verifier = SyncVerifier(engine, model, SAMPLING)
    start = verifier.start(PROMPTS, 1)
    assert start.mean_abs > 1e-4

    def syncs() -> None:
        for step in range(2, 40):
            take_a_step(model, 2e-5, step)
            verifier.sync(step)

    if stale:
        with pytest.raises(WeightSyncError, match="nearer to the weights before"):
            syncs()
    else:
        syncs()


def test_raw_log_probs_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    model = peaked_model(tokenizer)
    engine = Faulty(TransformersEngine(model, tokenizer, share=False), temperature=1.0)
    with pytest.raises(WeightSyncError, match=r"at temperature 0.7.*raw log-probs, of temperature 1"):
        SyncVerifier(engine, model, SAMPLING).start(PROMPTS, 1)


def test_renormalised_log_probs_agree(tokenizer: PreTrainedTokenizerFast) -> None:
    model = peaked_model(tokenizer)
    sampling = Sampling(max_new_tokens=20, top_k=3, truncation="renormalise", seed=0)
    assert SyncVerifier(TransformersEngine(model, tokenizer), model, sampling).start(PROMPTS, 1).mean_abs < 1e-6


def test_a_tolerance_of_nothing_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = peaked_model(tokenizer)
    with pytest.raises(ConfigError, match="tolerance 0"):
        SyncVerifier(TransformersEngine(model, tokenizer), model, SAMPLING, tolerance=0)
