"""`rlstab serve` with vLLM: its key, LoRA and uploads, servers that hang, and servers that are killed.

The server of the contract goes on here, with a second one, and both are killed in the last tests.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from background import InBackground, family_of, gone
from engines import MODELS, SECRET, SMALL, checkpoint, contract_server, peaked
from odd_servers import OddServer
from peft import LoraConfig, get_peft_model
from scoring import trainer_logprobs
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlstab.cli import main
from rlstab.errors import ConfigError, EngineError
from rlstab.rollouts import (
    ModelWeights,
    Request,
    Rollout,
    Sampling,
    ServerProcess,
    SyncVerifier,
    VLLMServerEngine,
)

pytestmark = pytest.mark.vllm

REQUESTS = [Request(prompt_ids=[3 + place % 13, 5]) for place in range(48)]
LONG = Sampling(max_new_tokens=200, stop_ids=(), seed=3)
SHORT = Sampling(max_new_tokens=20, seed=0)
PROMPTS = [[4, 5, 6], [7, 8], [9]]

Events = list[tuple[str, dict[str, Any]]]
Running = Callable[..., ServerProcess]


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return peaked(MODELS["dense"](tokenizer))


@pytest.fixture
def server() -> ServerProcess:
    return contract_server()


@pytest.fixture(scope="module")
def second() -> Iterator[Running]:
    """A second server: the one that runs, or a new one."""
    started: list[ServerProcess] = []

    def running(port: int = 0) -> ServerProcess:
        if not started or started[-1].process.poll() is not None:
            started.append(ServerProcess(str(checkpoint()), arguments=SMALL, port=port))
        return started[-1]

    yield running
    for one in started:
        one.close()


def engine_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *urls: str, **settings: Any
) -> tuple[VLLMServerEngine, Events]:
    events: Events = []
    engine = VLLMServerEngine(model, tokenizer, url=urls, **settings)
    engine.listen(lambda kind, fields: events.append((kind, dict(fields))))
    return engine, events


def client_of(server: ServerProcess, key: str | None) -> httpx.Client:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=server.url, headers=headers, trust_env=False, timeout=60)


def assert_all_there(rollouts: list[Rollout], model: PreTrainedModel, version: int) -> None:
    assert [rollout.prompt_ids.tolist() for rollout in rollouts] == [list(one.prompt_ids) for one in REQUESTS]
    for rollout in rollouts:
        assert len(rollout.token_ids) == LONG.max_new_tokens
        assert set(rollout.weight_versions.tolist()) == {version}
        torch.testing.assert_close(rollout.logprobs, trainer_logprobs(model, rollout), rtol=0, atol=1e-5)


def test_no_route_opens_without_the_key(server: ServerProcess, model: PreTrainedModel, tmp_path: Path) -> None:
    authorised = client_of(server, SECRET)
    assert authorised.get("/rlstab/status").json()["protocol"] == 2
    described = authorised.get("/openapi.json").json()["paths"]
    routes = [(method, path) for path, methods in described.items() for method in methods]
    routes += [("post", f"/rlstab/{name}") for name in ("generate", "score", "weights")]
    routes += [("put", "/rlstab/files/x"), ("get", "/rlstab/status"), ("get", "/docs"), ("get", "/none")]
    assert {"/v1/completions", "/health", "/metrics"} <= set(described)
    with httpx.Client(base_url=server.url, trust_env=False) as stranger:
        for headers in ({}, {"Authorization": "Bearer 0123456789abcdef"}):
            codes = {
                (method, path): stranger.request(method, path, headers=headers).status_code for method, path in routes
            }
            assert {route: code for route, code in codes.items() if code != 401} == {}
    (tmp_path / "key").write_text("another key".replace(" ", "-") * 2)
    with pytest.raises(ConfigError, match="the server refuses the key"):
        VLLMServerEngine(model, url=server.url, key_file=tmp_path / "key")


def test_the_servers_own_routes_serve(server: ServerProcess) -> None:
    with client_of(server, SECRET) as client:
        served = client.get("/v1/models").json()["data"][0]["id"]
        asked = {"model": served, "prompt": [4, 5], "max_tokens": 3, "ignore_eos": True, "return_token_ids": True}
        assert len(client.post("/v1/completions", json=asked).json()["choices"][0]["token_ids"]) == 3
        assert client.post("/rlstab/generate", content=b"[]").status_code == 422
        assert client.post("/rlstab/generate", content=b"{}").status_code == 409
        assert client.put("/rlstab/files/..%2Fx?offset=0", content=b"x").status_code == 404


def test_adapters_travel_alone(
    server: ServerProcess, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    engine, _ = engine_of(adapted, tokenizer, server.url, upload=True)
    with engine:
        verifier = SyncVerifier(engine, adapted, SHORT)
        assert verifier.start(PROMPTS, 1).mean_abs < 1e-5
        first = engine._files.paths
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.05)
        report = verifier.sync(2)
        assert report.mean_abs < 1e-5
        assert abs(report.staleness) < 1e-3
        assert engine._files.paths["base"] == first["base"]
        assert engine._files.paths["changes"] != first["changes"]
        assert engine._files.paths["changes"].stat().st_size < first["base"].stat().st_size / 10


def test_check_with_a_server(
    server: ServerProcess, tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    peaked(MODELS["dense"](tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert main(["check", str(tmp_path), "--engine", "server", "--url", server.url, "--tokens", "20"]) == 0
    assert "agreement" in capfd.readouterr().out


def test_nonsense_beside_a_true_server(
    server: ServerProcess, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with OddServer(lambda document: [b"nonsense\n"]) as odd:
        engine, events = engine_of(model, tokenizer, server.url, odd.url)
        with engine:
            assert_all_there(engine.generate(REQUESTS, LONG), model, 0)
            assert [(kind, fields["worker"]) for kind, fields in events] == [("engine_died", odd.url)]


def test_a_server_that_hangs_is_left_out_until_it_is_back(
    server: ServerProcess,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    second: Running,
) -> None:
    other = second()
    engine, events = engine_of(model, tokenizer, server.url, other.url, silence=6.0)
    with engine:
        other.process.send_signal(signal.SIGSTOP)
        try:
            assert_all_there(engine.generate(REQUESTS, LONG), model, 0)
        finally:
            other.process.send_signal(signal.SIGCONT)
        (died,) = events
        assert died[0] == "engine_died"
        assert died[1]["worker"] == other.url
        assert "no sign of life" in str(died[1]["cause"])
        engine.sync_weights(ModelWeights(model), 1)
        assert engine.health().detail == ""


def test_killed_while_it_samples(
    server: ServerProcess,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    second: Running,
) -> None:
    other = second()
    engine, events = engine_of(model, tokenizer, server.url, other.url, patience=600.0)
    with engine:
        expected = engine.generate(REQUESTS, LONG)
        sampling = InBackground(lambda: engine.generate(REQUESTS, LONG))
        time.sleep(random.Random(2).uniform(0.05, 0.2))
        other.process.kill()
        sampling.join(300)
        assert_all_there(sampling.result, model, 0)
        assert all(torch.equal(a.token_ids, b.token_ids) for a, b in zip(sampling.result, expected, strict=True))
        ((kind, fields),) = events
        assert (kind, fields["worker"]) == ("engine_died", other.url)
        assert int(fields["requests"]) > 0
        other.process.wait()
        assert second(port=int(other.url.rpartition(":")[2])).url == other.url
        deadline = time.monotonic() + 60
        while len(events) == 1 and time.monotonic() < deadline:
            assert_all_there(engine.generate(REQUESTS, LONG), model, 0)
        assert events[1][0] == "engine_returned"
        assert engine.health().detail == ""


def test_killed_while_it_takes_weights(
    server: ServerProcess,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    second: Running,
) -> None:
    other = second()
    engine, events = engine_of(model, tokenizer, server.url, other.url, patience=60.0)
    with engine:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
        cores = family_of(other.process.pid)[1:]
        for core in cores:
            core.suspend()  # so that the kill falls into the sync
        syncing = InBackground(lambda: engine.sync_weights(ModelWeights(model), 1))
        time.sleep(random.Random(3).uniform(0.3, 0.6))
        other.process.kill()
        for core in cores:
            core.resume()
        syncing.join(60)
        assert syncing.error is None
        assert engine.weight_version == 1
        assert [(kind, fields["worker"]) for kind, fields in events] == [("engine_died", other.url)]
        assert_all_there(engine.generate(REQUESTS, LONG), model, 1)


def test_with_all_servers_dead_it_ends_with_an_error(
    server: ServerProcess, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine, events = engine_of(model, tokenizer, server.url, patience=1.0)
    with engine:
        family = family_of(server.process.pid)
        assert len(family) > 2
        sampling = InBackground(lambda: engine.generate(REQUESTS, LONG))
        time.sleep(0.1)
        server.process.kill()
        sampling.join(60)
        assert "no server is left" in str(sampling.error)
        assert server.url in str(sampling.error)
        assert not engine.health().alive
        with pytest.raises(EngineError, match="no server is left"):
            engine.sync_weights(ModelWeights(model), 1)
        assert {kind for kind, _ in events} == {"engine_died"}
        assert gone(family)
        server._log.seek(0)
        said = server._log.read().decode() + json.dumps(events) + str(sampling.error) + repr(vars(engine))
        assert SECRET not in said
