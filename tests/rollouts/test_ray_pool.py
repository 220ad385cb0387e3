"""A pool of engines in Ray actors: what one death changes (nothing but time), and what the last one does.

The pool of the contract goes on here, and ends in the last test.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial

import psutil
import pytest
import torch
from background import family_of, gone
from engines import MODELS, SMALL, LentEngine, peaked
from scoring import trainer_logprobs
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlstab.errors import ConfigError, EngineError
from rlstab.rollouts import (
    ModelWeights,
    RayEnginePool,
    Request,
    Rollout,
    Sampling,
    TransformersEngine,
    VLLMEngine,
)
from rlstab.rollouts._ray_actor import Hosted
from rlstab.rollouts._ray_weights import SentWeights
from rlstab.rollouts._replica import Replica

pytestmark = pytest.mark.ray

REQUESTS = [Request(prompt_ids=[3 + place % 13, 5]) for place in range(40)]
LONG = Sampling(max_new_tokens=200, stop_ids=(), seed=7)
SHORT = Sampling(max_new_tokens=50, stop_ids=(), seed=7)

Events = list[tuple[str, Mapping[str, object]]]


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return peaked(MODELS["dense"](tokenizer))


@pytest.fixture
def pool(lent: LentEngine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> RayEnginePool:
    pool = lent("ray", "dense", model, tokenizer)
    assert isinstance(pool, RayEnginePool)
    pool._batch = 5
    return pool


@pytest.fixture
def events(pool: RayEnginePool) -> Events:
    seen: Events = []
    pool.listen(lambda kind, fields: seen.append((kind, fields)))
    return seen


def process_of(pool: RayEnginePool, place: int) -> int:
    facts = pool._workers.living()[place].facts
    assert facts is not None
    return facts.process


def soon(seconds: float, act: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer


def until_all_live(pool: RayEnginePool, count: int = 2) -> None:
    pool._workers.await_all()
    assert len(pool._workers.living()) == pool.size == count


def tokens(rollouts: list[Rollout]) -> list[list[int]]:
    return [rollout.token_ids.tolist() for rollout in rollouts]


def test_a_death_in_generation_changes_no_sample(pool: RayEnginePool, events: Events) -> None:
    until_all_live(pool)
    began = time.monotonic()
    undisturbed = pool.generate(REQUESTS, LONG)
    took = time.monotonic() - began
    assert {rollout.engine for rollout in undisturbed} == {"ray-0", "ray-1"}
    victim = process_of(pool, 0)
    soon(took / 4, partial(os.kill, victim, signal.SIGKILL))
    rollouts = pool.generate(REQUESTS, LONG)
    assert [rollout.prompt_ids.tolist() for rollout in rollouts] == [list(asked.prompt_ids) for asked in REQUESTS]
    assert tokens(rollouts) == tokens(undisturbed)
    kind, fields = events[0]
    assert (kind, fields["engine"], fields["worker"], fields["process"]) == ("engine_died", "ray", "ray-0", victim)
    until_all_live(pool)
    assert events[1:] == [
        (
            "engine_returned",
            {"engine": "ray", "worker": "ray-0", "version": pool.weight_version, "process": process_of(pool, 0)},
        )
    ]


def test_an_engine_that_hangs_is_killed_and_may_be_left_out(pool: RayEnginePool, events: Events) -> None:
    until_all_live(pool)
    began = time.monotonic()
    undisturbed = pool.generate(REQUESTS, SHORT)
    took = time.monotonic() - began  # a busy machine is no hang
    pool._workers._patience, pool._workers._restarts = 3 + 4 * took, 0
    hanging = psutil.Process(process_of(pool, 0))
    soon(took / 4, hanging.suspend)
    rollouts = pool.generate(REQUESTS, SHORT)
    pool._workers._patience, pool._workers._restarts = 60.0, 3
    assert tokens(rollouts) == tokens(undisturbed)
    (kind, fields), *others = events
    assert (kind, fields["restarted"]) == ("engine_died", False)
    assert str(fields["cause"]).startswith("has given no answer for")
    assert not others
    assert pool.size == 1
    assert gone([hanging])
    with pytest.raises(ConfigError, match="size 0; expected at least 1"):
        pool.resize(0)
    pool.resize(2)
    assert tokens(pool.generate(REQUESTS, SHORT)) == tokens(rollouts)
    assert {rollout.engine for rollout in pool.generate(REQUESTS, SHORT)} == {"ray-1", "ray-2"}


def test_a_death_in_a_sync_leaves_no_engine_behind(pool: RayEnginePool, events: Events, model: PreTrainedModel) -> None:
    until_all_live(pool)
    victim, version = process_of(pool, 1), pool.weight_version + 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    os.kill(victim, signal.SIGSTOP)  # it can take no weights any more
    soon(0.5, partial(os.kill, victim, signal.SIGKILL))
    pool.sync_weights(ModelWeights(model), version)
    assert [kind for kind, _ in events] == ["engine_died"]
    until_all_live(pool)
    rollouts = pool.generate(REQUESTS, LONG)
    assert {rollout.engine for rollout in rollouts} == {"ray-1", "ray-2"}
    for rollout in rollouts:
        assert set(rollout.weight_versions.tolist()) == {version}
        torch.testing.assert_close(rollout.logprobs, trainer_logprobs(model, rollout), rtol=0, atol=1e-5)


def test_an_engine_with_other_weights_is_found(pool: RayEnginePool, model: PreTrainedModel) -> None:
    import ray

    until_all_live(pool)
    sequences = [torch.tensor([3, 4, 5, 6])]
    with torch.no_grad():
        expected = model(input_ids=sequences[0][None]).logits[0, :-1].log_softmax(-1)
        torch.testing.assert_close(
            pool.score(sequences)[0], expected.gather(-1, sequences[0][1:, None]).squeeze(-1), rtol=0, atol=1e-5
        )
        for parameter in model.parameters():
            parameter.mul_(1.05)
    stray = pool._workers.living()[1].actor
    ray.get(stray.sync.remote(SentWeights(ModelWeights(model)), pool.weight_version))
    with pytest.raises(EngineError, match=r"ray-\d and ray-\d give the same tokens log-probs that differ"):
        pool.score(sequences)


def test_without_a_seed_no_two_parts_are_alike(pool: RayEnginePool) -> None:
    """The processes begin with the same state of their generators."""
    alike = [Request(prompt_ids=[4, 5])] * 20
    sampling = Sampling(max_new_tokens=30, stop_ids=())
    torch.manual_seed(5)
    first = tokens(pool.generate(alike, sampling))
    assert len({tuple(ids) for ids in first}) == len(alike)
    assert tokens(pool.generate(alike, sampling)) != first
    torch.manual_seed(5)
    assert tokens(pool.generate(alike, sampling)) == first


def test_nothing_listens_beyond_the_loopback_address(pool: RayEnginePool) -> None:
    import ray

    assert ray.util.get_node_ip_address() == "127.0.0.1"
    assert ray.get_runtime_context().gcs_address.startswith("127.0.0.1:")
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_actors_do_not_stand_back_for_the_trainer(pool: RayEnginePool) -> None:
    assert psutil.Process(process_of(pool, 0)).nice() == psutil.Process().nice()


def test_errors_of_a_request_are_the_callers(pool: RayEnginePool) -> None:
    with pytest.raises(ConfigError, match="TransformersEngine: a request has images only"):
        pool.generate([Request(prompt_ids=[4], images=[torch.zeros(2, 2, 3, dtype=torch.uint8)])], LONG)
    assert pool.health().alive


def test_engines_without_a_place_are_an_error(
    pool: RayEnginePool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(EngineError, match=r"0 of 1 engines have started, .*nowhere-0 has not started within 2 s"):
        RayEnginePool(model, tokenizer, size=1, options={"resources": {"nowhere": 1}}, start_patience=2, name="nowhere")
    assert pool.health().alive


def test_what_cannot_be_a_pool_is_refused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    sharing = Hosted("ray-0", (TransformersEngine, Replica.of(model), tokenizer, "cpu"))
    with pytest.raises(ConfigError, match=r"expected an engine with a copy, such as partial\(TransformersEngine"):
        sharing.start(SentWeights(ModelWeights(model)), 0)
    for arguments, message in (
        ({"size": 0}, "size 0; expected at least 1"),
        ({"restarts": -1}, "restarts -1; expected at least 0"),
        ({"patience": 0}, "patience 0; expected a number of seconds above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            RayEnginePool(model, tokenizer, **arguments)  # type: ignore[arg-type]


def test_when_all_are_dead_it_says_so(pool: RayEnginePool, events: Events) -> None:
    until_all_live(pool)
    pool._workers._restarts = 0
    victims = [process_of(pool, place) for place in (0, 1)]
    for victim in victims:
        soon(0.2, partial(os.kill, victim, signal.SIGKILL))
    with pytest.raises(EngineError, match="ray: all engines are dead and none is left; the last: ray-"):
        pool.generate(REQUESTS, LONG)
    assert [(kind, fields["restarted"]) for kind, fields in events] == [("engine_died", False)] * 2
    assert pool.health().detail == "no engine is left"
    pool.close()
    pool.close()
    assert pool.health().detail == "closed"
    with pytest.raises(EngineError, match="closed"):
        pool.generate(REQUESTS, LONG)


@pytest.mark.vllm
@pytest.mark.faults
def test_a_vllm_inside_an_actor_dies_and_goes_with_it(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = partial(VLLMEngine, arguments=SMALL, in_process=False)
    events: Events = []
    with RayEnginePool(model, tokenizer, engine=engine, size=1, options={"num_cpus": 0.5}, patience=60) as pool:
        pool.listen(lambda kind, fields: events.append((kind, fields)))
        undisturbed = pool.generate(REQUESTS, LONG)
        pool.sync_weights(ModelWeights(model), 3)
        family = family_of(process_of(pool, 0))
        core = next(process for process in family if "EngineCor" in process.name())
        soon(0.2, core.kill)
        rollouts = pool.generate(REQUESTS, LONG)
        assert gone(family)
        until_all_live(pool, 1)
        family = family_of(process_of(pool, 0))
        assert len(family) > 2
        family[0].kill()
        assert gone(family)
    assert tokens(rollouts) == tokens(undisturbed)
    assert {version for rollout in rollouts for version in rollout.weight_versions.tolist()} == {3}
    assert [kind for kind, _ in events] == ["engine_died", "engine_returned"]
    assert "died in its own process" in str(events[0][1]["cause"])
