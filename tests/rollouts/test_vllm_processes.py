"""vLLM in processes of its own: new weights under requests in flight, and its death.

The engine of the contract goes on here, and is killed in the last test.
"""

import copy
import time

import psutil
import pytest
import torch
from background import InBackground
from engines import MODELS, LentEngine, peaked
from scoring import trainer_logprobs
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlstab.errors import EngineError
from rlstab.rollouts import ModelWeights, Request, Sampling, VLLMEngine
from rlstab.rollouts._vllm_cores import OwnProcesses

pytestmark = pytest.mark.vllm

REQUESTS = [Request(prompt_ids=[3 + place % 13, 5]) for place in range(16)]
LONG = Sampling(max_new_tokens=200, stop_ids=())


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return peaked(MODELS["dense"](tokenizer))


@pytest.fixture
def engine(lent: LentEngine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> VLLMEngine:
    engine = lent("vllm in processes of its own", "dense", model, tokenizer)
    assert isinstance(engine, VLLMEngine)
    return engine


def until_tokens_come(core: OwnProcesses, count: int) -> None:
    goal, deadline = core.driver.tokens + count, time.monotonic() + 60
    while core.driver.tokens < goal:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_weights_change_under_requests_in_flight(engine: VLLMEngine, model: PreTrainedModel) -> None:
    assert isinstance(engine._core, OwnProcesses)
    old, version = copy.deepcopy(model), engine.weight_version
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    sampling = InBackground(lambda: engine.generate(REQUESTS, LONG))
    until_tokens_come(engine._core, 50 * len(REQUESTS))
    engine.sync_weights(ModelWeights(model), version + 1)
    sampling.join(60)
    assert len(sampling.result) == len(REQUESTS)
    for rollout in sampling.result:
        before = rollout.weight_versions == version
        assert 0 < int(before.sum()) < len(before) == LONG.max_new_tokens
        assert rollout.weight_versions.tolist() == [version] * int(before.sum()) + [version + 1] * int((~before).sum())
        expected = torch.where(before, trainer_logprobs(old, rollout), trainer_logprobs(model, rollout))
        torch.testing.assert_close(rollout.logprobs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("blow", ["hangs", "dies"])
def test_a_core_that_hangs_or_dies_is_an_error(engine: VLLMEngine, model: PreTrainedModel, blow: str) -> None:
    """One that dies while it samples and takes weights: both calls find it, long before their patience ends."""
    core, version = engine._core, engine.weight_version + 1
    assert isinstance(core, OwnProcesses)
    core._patience = 3.0 if blow == "hangs" else 600.0
    process = psutil.Process(core.driver.processes[0].pid)
    sampling = InBackground(lambda: engine.generate(REQUESTS, LONG))
    until_tokens_come(core, len(REQUESTS))
    process.suspend()  # so that the death falls into both
    if blow == "dies":
        syncing = InBackground(lambda: engine.sync_weights(ModelWeights(model), version))
        time.sleep(0.5)
        process.kill()
        syncing.join(60)
        assert "died in its own process" in str(syncing.error)
    sampling.join(60)
    expected = {"hangs": "no sign of life for 3 s and was killed", "dies": "died in its own process"}
    assert expected[blow] in str(sampling.error)
    assert not engine.health().alive
    with pytest.raises(EngineError, match="make a new engine"):
        engine.generate(REQUESTS, LONG)
    with pytest.raises(EngineError, match="make a new engine"):
        engine.sync_weights(ModelWeights(torch.nn.Linear(1, 1)), 10**6)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.generate(REQUESTS, LONG)
    assert all(process.exitcode is not None for process in core.driver.processes)
