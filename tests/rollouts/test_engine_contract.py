"""What every engine promises: the right tokens, their true log-probs, and the weights it was given last."""

import asyncio
import dataclasses

import pytest
import torch
from scoring import trainer_logits, trainer_logprobs
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlstab.errors import ConfigError, EngineError, WeightSyncError
from rlstab.models import tiny_causal_lm
from rlstab.rollouts import Engine, ModelWeights, Request, Sampling, Turn, renormalised_logprobs

EXACT = 1e-5

# Engines that take too long to start to be closed here.
KILLED = {"vllm in processes of its own": "test_vllm_processes.py", "ray": "test_ray_pool.py"}

# Prompts of 1 to 12 tokens, two of them twice; limits of 1 to 70 tokens.
REQUESTS = [
    Request(prompt_ids=[3 + (7 * (i // 2) + j) % 13 for j in range(1 + (5 * (i // 2)) % 12)], max_new_tokens=limit)
    for i, limit in enumerate([1, 70, 2, 9, 30, 5, 12, 3])
]
SAMPLING = Sampling(max_new_tokens=80, seed=1)


def test_each_request_is_answered_in_its_place(engine: Engine) -> None:
    rollouts = engine.generate(REQUESTS, SAMPLING)
    assert [rollout.prompt_ids.tolist() for rollout in rollouts] == [list(request.prompt_ids) for request in REQUESTS]
    for rollout, request in zip(rollouts, REQUESTS, strict=True):
        size = len(rollout.token_ids)
        assert 1 <= size <= (request.max_new_tokens or 0)
        assert rollout.turns == (Turn("policy", 0, size),)
        assert rollout.loss_mask.tolist() == [True] * size
        assert rollout.weight_versions.tolist() == [engine.weight_version] * size
        assert rollout.engine.startswith(engine.id)
        assert min(rollout.timing.waiting, rollout.timing.generating) >= 0


def test_no_requests_no_rollouts(engine: Engine) -> None:
    assert engine.generate([], SAMPLING) == []


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_log_probs_are_the_trainers(engine: Engine, model: PreTrainedModel, temperature: float) -> None:
    sampling = dataclasses.replace(SAMPLING, temperature=temperature)
    for rollout in engine.generate(REQUESTS, sampling):
        expected = trainer_logprobs(model, rollout, temperature)
        torch.testing.assert_close(rollout.logprobs, expected, rtol=0, atol=EXACT)


def test_greedy_takes_the_most_probable_token(engine: Engine, model: PreTrainedModel) -> None:
    for rollout in engine.generate(REQUESTS, dataclasses.replace(SAMPLING, temperature=0.0)):
        assert rollout.token_ids.tolist() == trainer_logits(model, rollout).argmax(-1).tolist()
        torch.testing.assert_close(rollout.logprobs, trainer_logprobs(model, rollout), rtol=0, atol=EXACT)


def test_a_stop_token_ends_a_completion_and_belongs_to_it(engine: Engine) -> None:
    stop_ids = (5, 9)
    rollouts = engine.generate(REQUESTS * 4, dataclasses.replace(SAMPLING, stop_ids=stop_ids))
    reasons = {rollout.finish_reason for rollout in rollouts}
    assert reasons == {"stop", "length"}
    for rollout, request in zip(rollouts, REQUESTS * 4, strict=True):
        *before, last = rollout.token_ids.tolist()
        assert not set(before) & set(stop_ids)
        assert (last in stop_ids) == (rollout.finish_reason == "stop")
        assert rollout.finish_reason == "stop" or len(rollout.token_ids) == request.max_new_tokens


def test_the_end_of_sequence_stops_unless_it_is_told_not_to(engine: Engine, model: PreTrainedModel) -> None:
    requests = [Request(prompt_ids=[4, 5])] * 64
    end = model.config.eos_token_id
    stopped = engine.generate(requests, Sampling(max_new_tokens=20, seed=0))
    assert any(rollout.finish_reason == "stop" and rollout.token_ids[-1] == end for rollout in stopped)
    endless = engine.generate(requests, Sampling(max_new_tokens=20, seed=0, stop_ids=()))
    assert {len(rollout.token_ids) for rollout in endless} == {20}
    assert any(end in rollout.token_ids for rollout in endless)


def test_the_seed_makes_the_sample(engine: Engine) -> None:
    tokens = [
        [rollout.token_ids.tolist() for rollout in engine.generate(REQUESTS, dataclasses.replace(SAMPLING, seed=seed))]
        for seed in (3, 3, 4)
    ]
    assert tokens[0] == tokens[1] != tokens[2]


def test_calls_of_an_event_loop_are_answered_side_by_side(engine: Engine) -> None:
    seeds = [dataclasses.replace(SAMPLING, seed=seed) for seed in (3, 4)]

    async def both() -> list[list[list[int]]]:
        answers = await asyncio.gather(*(engine.generate_async(REQUESTS, sampling) for sampling in seeds))
        return [[rollout.token_ids.tolist() for rollout in rollouts] for rollouts in answers]

    if not engine.works_beside:
        with pytest.raises(ConfigError, match="shares weights or generators with this thread; call generate"):
            asyncio.run(both())
        return
    alone = [[rollout.token_ids.tolist() for rollout in engine.generate(REQUESTS, sampling)] for sampling in seeds]
    assert asyncio.run(both()) == alone


def test_tokens_come_as_often_as_their_probability_says(engine: Engine, model: PreTrainedModel) -> None:
    count = 4000
    rollouts = engine.generate([Request(prompt_ids=[4, 7, 5])] * count, Sampling(max_new_tokens=1, seed=5))
    probabilities = trainer_logits(model, rollouts[0])[0].softmax(-1)
    seen = torch.cat([rollout.token_ids for rollout in rollouts]).bincount(minlength=len(probabilities))
    expected = probabilities * count
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    assert chi_square < 45  # 15 degrees of freedom: exceeded once in 10,000 seeds


@pytest.mark.parametrize("setting", [{"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_renormalised_log_probs_come_with_their_kept_sets(
    engine: Engine, model: PreTrainedModel, setting: dict[str, float]
) -> None:
    sampling = Sampling(max_new_tokens=20, temperature=0.8, seed=2, truncation="renormalise", **setting)  # type: ignore[arg-type]
    sizes: set[int] = set()
    for rollout in engine.generate(REQUESTS, sampling):
        assert rollout.kept is not None
        sizes |= {len(kept) for kept in rollout.kept.split()}
        assert all(token in kept for token, kept in zip(rollout.token_ids, rollout.kept.split(), strict=True))
        logits = trainer_logits(model, rollout, 0.8)
        expected = renormalised_logprobs(logits, rollout.token_ids, rollout.kept.padded())
        torch.testing.assert_close(rollout.logprobs, expected, rtol=0, atol=EXACT)
    assert min(sizes) < model.config.vocab_size


def test_an_ignored_tail_leaves_the_log_probs_whole(engine: Engine, model: PreTrainedModel) -> None:
    sampling = Sampling(max_new_tokens=20, top_k=2, seed=2, truncation="ignore_tail")
    for rollout in engine.generate(REQUESTS, sampling):
        assert rollout.kept is None
        torch.testing.assert_close(rollout.logprobs, trainer_logprobs(model, rollout), rtol=0, atol=EXACT)
        ranks = trainer_logits(model, rollout).argsort(descending=True).argsort()
        assert int(ranks.gather(-1, rollout.token_ids[:, None]).max()) < 2


def test_new_weights_are_sampled_with_and_named(engine: Engine, model: PreTrainedModel) -> None:
    before = engine.generate(REQUESTS, SAMPLING)
    version = engine.weight_version + 7
    perturb(model)
    engine.sync_weights(ModelWeights(model), version)
    assert engine.weight_version == engine.health().weight_version == version
    for rollout, old in zip(engine.generate(REQUESTS, SAMPLING), before, strict=True):
        assert set(rollout.weight_versions.tolist()) == {version}
        torch.testing.assert_close(rollout.logprobs, trainer_logprobs(model, rollout), rtol=0, atol=EXACT)
        assert float((old.logprobs - trainer_logprobs(model, old)).abs().max()) > 100 * EXACT


def perturb(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(0.05 * noise)


def test_weights_stay_until_the_next_sync(engine: Engine, model: PreTrainedModel) -> None:
    before = engine.generate(REQUESTS, SAMPLING)
    perturb(model)
    after = engine.generate(REQUESTS, SAMPLING)
    same = all(torch.equal(a.token_ids, b.token_ids) for a, b in zip(after, before, strict=True))
    assert same is not engine.shares_weights


def test_weights_do_not_go_back(engine: Engine, model: PreTrainedModel) -> None:
    version = engine.weight_version + 3
    engine.sync_weights(ModelWeights(model), version)
    engine.sync_weights(ModelWeights(model), version)
    with pytest.raises(WeightSyncError, match=f"version {version - 1} after those of {version}"):
        engine.sync_weights(ModelWeights(model), version - 1)
    assert engine.weight_version == version


def test_tokens_of_others_are_scored(engine: Engine, model: PreTrainedModel) -> None:
    sequences = [torch.tensor([3 + (5 * i + i * j) % 13 for j in range(2 + 20 * i)]) for i in range(4)]
    scores = engine.score(sequences)
    for sequence, found in zip(sequences, scores, strict=True):
        with torch.no_grad():
            logits = model(input_ids=sequence[None]).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(-1, sequence[1:, None]).squeeze(-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)


def test_weights_of_another_model_do_not_fit(engine: Engine, tokenizer: PreTrainedTokenizerFast) -> None:
    version = engine.weight_version
    with pytest.raises(WeightSyncError):
        engine.sync_weights(ModelWeights(tiny_causal_lm(tokenizer, layers=1)), version + 1)
    assert engine.weight_version == version
    assert engine.generate(REQUESTS, SAMPLING)


def test_a_closed_engine_says_so(engine: Engine, lineup: tuple[str, str]) -> None:
    if lineup[0] in KILLED:
        pytest.skip(f"closed after it was killed, in {KILLED[lineup[0]]}")
    assert engine.health().alive
    engine.close()
    engine.close()
    assert not engine.health().alive
    with pytest.raises(EngineError, match="closed"):
        engine.generate(REQUESTS, SAMPLING)
