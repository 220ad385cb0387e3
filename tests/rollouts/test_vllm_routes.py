"""Experts that vLLM sent each token to, whatever its scheduler did with the prompt on the way."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from engines import MODELS, SMALL, peaked
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlstab.errors import ConfigError, RoutingError
from rlstab.models import tiny_tokenizer
from rlstab.rollouts import (
    Engine,
    ModelWeights,
    Request,
    Rollout,
    Sampling,
    ServerProcess,
    VLLMEngine,
    VLLMServerEngine,
)
from rlstab.routing import Routers

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="made for vLLM on a CPU, where it refuses its own flag"),
]

# Prompts in pieces of 32 tokens at most, and a cache that holds two of the longest requests.
CROWDED: dict[str, Any] = {
    **SMALL,
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 32,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 1 << 20,
}

REQUESTS = [
    Request(prompt_ids=[3 + (7 * (i // 2) + j) % 13 for j in range(1 + (17 * (i // 2)) % 60)], max_new_tokens=limit)
    for i, limit in enumerate([5 + 7 * i % 115 for i in range(40)])
]
ENDLESS = Sampling(max_new_tokens=120, stop_ids=())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer("0123456789+= ")


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return peaked(MODELS["moe"](tokenizer))


@pytest.fixture(scope="module")
def preempted() -> Iterator[list[str]]:
    """The requests of this process that vLLM has preempted."""
    from vllm.v1.core.sched.scheduler import Scheduler

    found: list[str] = []
    preempt = Scheduler._preempt_request

    def noted(scheduler: Scheduler, request: Any, *timing: Any, **how: Any) -> Any:
        found.append(request.request_id)
        return preempt(scheduler, request, *timing, **how)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Scheduler, "_preempt_request", noted)
        yield found


@pytest.fixture(scope="module", params=["in this process", "a server"])
def engine(
    request: pytest.FixtureRequest,
    preempted: list[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engine]:
    if request.param == "in this process":
        with VLLMEngine(model, tokenizer, arguments=CROWDED, routes=True) as made:
            yield made
        return
    folder = tmp_path_factory.mktemp("moe")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with (
        ServerProcess(str(folder), arguments=CROWDED, options={"routes": True}) as server,
        VLLMServerEngine(model, tokenizer, url=server.url, routes=True) as engine,
    ):
        yield engine


def assert_trainers(model: PreTrainedModel, rollouts: list[Rollout]) -> None:
    """The routes are those of a whole forward, in order and type too."""
    for rollout in rollouts:
        with torch.no_grad(), Routers(model).recording() as own:
            model(input_ids=torch.cat([rollout.prompt_ids, rollout.token_ids])[None])
        assert rollout.routed_experts is not None
        assert rollout.routed_experts.dtype == torch.uint8
        assert torch.equal(rollout.routed_experts, own.routes(rows=1).experts[0, :-1])


def test_routes_are_those_of_the_trainer(engine: Engine, model: PreTrainedModel, preempted: list[str]) -> None:
    preempted.clear()
    assert engine.returns_routes
    engine.score([torch.tensor([4, 5, 6])])  # is not recorded
    rollouts = engine.generate(REQUESTS, ENDLESS)
    assert [len(rollout.token_ids) for rollout in rollouts] == [request.max_new_tokens for request in REQUESTS]
    assert_trainers(model, rollouts)
    assert preempted or isinstance(engine, VLLMServerEngine)


def test_routes_follow_new_weights(engine: Engine, model: PreTrainedModel) -> None:
    with torch.no_grad():
        for router in Routers(model).routers:
            router.modules[0].get_parameter("weight").neg_()
    engine.sync_weights(ModelWeights(model), engine.weight_version + 1)
    assert_trainers(model, engine.generate(REQUESTS[:8], ENDLESS))
    if isinstance(engine, VLLMServerEngine):  # one that does not want them gets none from the same server
        with VLLMServerEngine(model, url=engine._links[0].url) as other:
            assert [rollout.routed_experts for rollout in other.generate(REQUESTS[:2], ENDLESS)] == [None, None]


def test_rows_of_a_request() -> None:
    from rlstab.rollouts._vllm_routes_worker import _Rows

    def ids(*values: int) -> Any:
        return np.array(values, dtype=np.uint8).reshape(-1, 1, 1)

    rows = _Rows(3, ids(0))
    rows.write(0, ids(1, 2))
    rows.write(0, ids(11, 12, 13))  # preempted before the prompt was through
    rows.write(3, ids(14))
    rows.write(0, ids(21, 22, 23, 24, 25))  # preempted, with the next tokens sampled from 13 and 14
    rows.write(5, ids(*range(26, 200)))
    assert rows.whole().ravel().tolist() == [11, 12, 13, 14, *range(25, 200)]
    rows.write(180, ids(1))  # a cache supplied what lies between
    with pytest.raises(RoutingError, match="got gaps: a cache supplied tokens"):
        rows.whole()


@pytest.mark.parametrize("setting", [{"enable_prefix_caching": True}, {"enforce_eager": False}])
def test_settings_under_which_routes_would_have_gaps(
    setting: dict[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    ((key, value),) = setting.items()
    with pytest.raises(ConfigError, match=f"routes=True with {key}={value}; expected {not value}"):
        VLLMEngine(model, tokenizer, arguments={**SMALL, **setting}, routes=True)


def test_a_dense_model_has_no_routes(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="routes=True of a model without experts"):
        VLLMEngine(MODELS["dense"](tokenizer), tokenizer, arguments=SMALL, routes=True)
