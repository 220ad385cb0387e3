"""`VLLMServerEngine` and servers that misbehave, and the key; vLLM itself is in test_vllm_server.py."""

from __future__ import annotations

import asyncio
import base64
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from odd_servers import OddServer, good_answer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlstab.cli import main
from rlstab.errors import ConfigError, EngineError
from rlstab.models import tiny_causal_lm, tiny_moe
from rlstab.rollouts import Request, Sampling, ServerKey, ServerSettings, VLLMServerEngine
from rlstab.rollouts._server_key import KeyCheck

SAMPLING = Sampling(max_new_tokens=3, seed=0)
REQUESTS = [Request(prompt_ids=[5, 6]), Request(prompt_ids=[7])]
SECRET = "0123456789abcdef-secret"


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny_causal_lm(tokenizer)


def engine_of(
    model: PreTrainedModel, *servers: OddServer, silence: float = 5.0, patience: float = 5.0
) -> VLLMServerEngine:
    return VLLMServerEngine(model, url=[server.url for server in servers], silence=silence, patience=patience)


def answers(document: dict[str, Any]) -> list[dict[str, Any] | bytes]:
    return [good_answer(place) for place in range(len(document["requests"]))]


def changed(**fields: object) -> Callable[[dict[str, Any]], list[dict[str, Any] | bytes]]:
    """Answers that differ from good ones."""
    return lambda document: [good_answer() | fields]


def test_good_answers_become_rollouts(model: PreTrainedModel) -> None:
    with OddServer(answers) as server, engine_of(model, server) as engine:
        assert (engine.dtype, engine.weight_version, engine.health().alive) == (torch.float32, 0, True)
        rollouts = engine.generate(REQUESTS, SAMPLING)
        assert [rollout.prompt_ids.tolist() for rollout in rollouts] == [[5, 6], [7]]
        assert all(rollout.logprobs.tolist() == [-0.5] * 3 for rollout in rollouts)
        assert {rollout.engine for rollout in rollouts} == {"vllm-server"}
        assert server.calls[0]["sampling"]["stop_ids"] == [model.generation_config.eos_token_id]
    assert engine.health().detail == "closed"


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (changed(token_ids=[5, 99999, 5]), "token_ids is .*expected whole numbers from 0 up to 15"),
        (changed(token_ids=[5, True, 5]), "token_ids is"),
        (changed(token_ids=[5] * 4, logprobs=[-0.5] * 4, versions=[[0, 4]]), "4 tokens; expected 1 to 3"),
        (changed(token_ids=[], logprobs=[], versions=[]), "0 tokens"),
        (changed(logprobs=[-0.5]), "logprobs is .*expected a list of 3"),
        (changed(logprobs=[-0.5, 0.5, -0.5]), "logprobs hold something else"),
        (changed(logprobs=[-0.5, "x", -0.5]), "logprobs hold something else"),
        (changed(versions=[[0, 2]]), "versions are .*cover 3 tokens"),
        (changed(versions=[[4, 3]]), "versions is .*from 0 up to 3"),
        (changed(versions=[[2, 3]]), "versions are .*grow up to 0"),
        (changed(versions=[[0, 1, 2]]), "versions are"),
        (changed(reason="tired"), "reason is 'tired'"),
        (changed(reason="stop"), "ends with token 5; expected a stop token"),
        (changed(kept=[[5]] * 3), "kept sets that nobody asked for"),
        (changed(routes="AQID"), "routes that nobody asked for"),
        (changed(waited=-1.0), "a time of -1.0"),
        (changed(extra=1), "expected an object with"),
        (changed(place=7), "an answer to question 7 of 2"),
        (lambda document: [good_answer(0), good_answer(0)], "two answers to one question"),
        (lambda document: [], "ended its answer early"),
        (lambda document: [b"[]\n"], "a line that is no object"),
        (lambda document: [b"<html>\n"], "is not JSON"),
        (lambda document: [b"x" * 10_000], "an answer of more than 4288 bytes"),
        (lambda document: [b"[" * 4000 + b"\n"], "is not JSON"),
    ],
)
def test_answers_that_are_none(
    model: PreTrainedModel, lines: Callable[[dict[str, Any]], list[dict[str, Any] | bytes]], complaint: str
) -> None:
    with (
        OddServer(lines) as odd,
        engine_of(model, odd, patience=0.2) as engine,
        pytest.raises(EngineError, match=rf"no server is left.*({complaint})"),
    ):
        engine.generate(REQUESTS, SAMPLING)


def routes_of(*ids: int) -> str:
    return base64.b64encode(bytes(ids)).decode()


def test_routes_are_those_of_the_model(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_moe(tokenizer, experts=4, experts_per_token=2)
    ids = [0, 1, 2, 3, 3, 0, 1, 2, 2, 1, 0, 3]  # of three inputs (one of the prompt), two layers, two experts each
    request = [Request(prompt_ids=[7])]
    with (
        OddServer(changed(routes=routes_of(*ids))) as server,
        VLLMServerEngine(model, url=server.url, routes=True) as engine,
    ):
        assert engine.returns_routes
        (rollout,) = engine.generate(request, SAMPLING)
        assert rollout.routed_experts is not None
        assert rollout.routed_experts.dtype == torch.uint8
        assert rollout.routed_experts.flatten().tolist() == ids
    for text, complaint in (
        (None, "routes are None; expected 2 experts of 4 for each of 3 tokens and 2 layers"),
        (7, "routes are 7"),
        ("no base64!", "routes are 'no base64!'"),
        (routes_of(*ids[:-1]), "cannot reshape array of size 11"),
        (routes_of(*ids[:-1], 4), "expected expert ids below 4, got 4"),
        (routes_of(*ids[:-2], 3, 3), "the same one twice"),
    ):
        with (
            OddServer(changed(routes=text)) as odd,
            VLLMServerEngine(model, url=odd.url, routes=True, patience=0.2) as engine,
            pytest.raises(EngineError, match=f"no server is left.*{complaint}"),
        ):
            engine.generate(request, SAMPLING)
    with pytest.raises(ConfigError, match="expected a mixture of experts"):
        VLLMServerEngine(tiny_causal_lm(tokenizer), url="http://127.0.0.1:9", routes=True)
    with (
        OddServer(status={"routes": False}) as without,
        pytest.raises(ConfigError, match="routes=True with a server that returns none; start it with --routes"),
    ):
        VLLMServerEngine(model, url=without.url, routes=True)


def test_nothing_is_lost_when_a_server_answers_nonsense(model: PreTrainedModel) -> None:
    events: list[tuple[str, object]] = []

    def half(document: dict[str, Any]) -> list[dict[str, Any] | bytes]:
        return [good_answer(0), b"nonsense\n"]

    with OddServer(half) as odd, OddServer(answers) as good, engine_of(model, odd, good) as engine:
        engine.listen(lambda kind, fields: events.append((kind, fields["worker"])))
        rollouts = engine.generate([Request(prompt_ids=[3 + i % 13]) for i in range(200)], SAMPLING)
        assert [rollout.prompt_ids.tolist() for rollout in rollouts] == [[3 + i % 13] for i in range(200)]
        assert len(odd.calls) >= 1
        assert events == [("engine_died", odd.url)]
        asked = sum(len(call["requests"]) for call in (*odd.calls, *good.calls))
        assert asked == 200 + sum(len(call["requests"]) - 1 for call in odd.calls)  # what was finished is kept


def test_a_refusal_is_the_callers_error(model: PreTrainedModel) -> None:
    with (
        OddServer(lambda document: [{"error": "top_p of a strange kind"}]) as server,
        engine_of(model, server) as engine,
    ):
        with pytest.raises(EngineError, match="top_p of a strange kind"):
            engine.generate(REQUESTS, SAMPLING)
        assert engine.health().alive
        with pytest.raises(EngineError, match=r"prompt of 256 tokens.*max_model_len=256"):
            engine.generate([Request(prompt_ids=[5] * 256)], SAMPLING)
        with pytest.raises(ConfigError, match="VLLMServerEngine: a request has images"):
            engine.generate([Request(prompt_ids=[5], images=[torch.zeros(1, 1, 3, dtype=torch.uint8)])], SAMPLING)


def test_logits_that_are_not_finite(model: PreTrainedModel) -> None:
    nan = changed(logprobs=[-0.5, float("nan"), -0.5])
    with OddServer(nan) as server, engine_of(model, server) as engine, pytest.raises(EngineError, match="not finite"):
        engine.generate(REQUESTS, SAMPLING)


def test_silence_is_death(model: PreTrainedModel) -> None:
    with (
        OddServer(answers, pause=2.0) as mute,
        engine_of(model, mute, silence=0.2, patience=0.3) as engine,
        pytest.raises(EngineError, match=r"no server is left .*gave no sign of life for too long"),
    ):
        engine.generate(REQUESTS, SAMPLING)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"status": {"protocol": 99}}, "speaks version 99 of the protocol"),
        ({"status": {"context": "much"}}, "context is 'much'; expected int"),
        ({"status": {"fault": "its core has died"}}, "vLLM its core has died"),
        ({"code": 500}, "status 500"),
    ],
)
def test_servers_that_cannot_be_used(model: PreTrainedModel, settings: dict[str, Any], complaint: str) -> None:
    with OddServer(**settings) as odd, pytest.raises(EngineError, match=complaint):
        engine_of(model, odd, patience=0.2)


def test_servers_of_two_precisions(model: PreTrainedModel) -> None:
    with (
        OddServer() as one,
        OddServer(status={"dtype": "bfloat16"}) as other,
        pytest.raises(ConfigError, match="servers sample in bfloat16, float32"),
    ):
        engine_of(model, one, other)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"url": []}, "0 urls"),
        ({"url": ["http://a", "http://a"]}, "2 urls; expected one or several that differ"),
        ({"url": "ftp://a"}, "a url is not an address"),
        ({"url": f"http://user:{SECRET}@a"}, "a url is not an address"),
        ({"url": "http://a", "silence": 0}, "silence 0"),
        ({"url": "http://a", "max_in_flight": 0}, "max_in_flight 0"),
    ],
)
def test_settings_that_make_no_sense(model: PreTrainedModel, settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"VLLMServerEngine: {complaint}") as caught:
        VLLMServerEngine(model, **settings)
    assert SECRET not in str(caught.value)


def test_the_key_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLSTAB_SERVER_KEY", raising=False)
    assert ServerKey.read(None) is None
    (tmp_path / "key").write_text(f"{SECRET}\n")
    key = ServerKey.read(tmp_path / "key")
    assert key is not None
    assert key.header == f"Bearer {SECRET}"
    assert SECRET not in repr(key) + str(key) + repr(ServerSettings(key=key))
    with pytest.raises(TypeError, match="does not travel"):
        pickle.dumps(key)
    monkeypatch.setenv("RLSTAB_SERVER_KEY", "short")
    with pytest.raises(ConfigError, match="at least 16 printable") as caught:
        ServerKey.read(None)
    assert "short" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read"):
        ServerKey.read(tmp_path / "none")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "trainer.example"])
def test_other_addresses_need_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match=f"--host {host} is reachable from other machines"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, key=ServerKey(SECRET)).host == host


def test_this_machines_own_addresses_do_not() -> None:
    assert [ServerSettings(host=host).host for host in ("127.0.0.1", "::1", "localhost")]


@pytest.mark.parametrize(
    "headers", [[], [b"Bearer wrong"], [b"Basic x"], [SECRET.encode()], [b"Bearer x", b"Bearer y"]]
)
@pytest.mark.parametrize(("kind", "method"), [("http", "GET"), ("http", "OPTIONS"), ("websocket", "")])
def test_nobody_passes_without_the_key(headers: list[bytes], kind: str, method: str) -> None:
    passed, sent = asyncio.run(asked(kind, method, headers))
    assert not passed
    assert sent[0].get("status") == 401 or sent[0] == {"type": "websocket.close", "code": 1008}
    assert SECRET not in str(sent)


def test_the_key_opens() -> None:
    assert asyncio.run(asked("http", "GET", [f"Bearer {SECRET}".encode()]))[0]
    assert asyncio.run(asked("lifespan", "", []))[0]


async def asked(kind: str, method: str, headers: list[bytes]) -> tuple[bool, list[dict[str, Any]]]:
    """Does a request come through, and what is sent back?"""
    passed, sent = False, []

    async def app(scope: object, receive: object, send: object) -> None:
        nonlocal passed
        passed = True

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "method": method, "path": "/", "headers": [(b"authorization", one) for one in headers]}
    await KeyCheck(app, ServerKey(SECRET))(scope, receive, send)
    return passed, sent


def test_the_command_refuses_other_addresses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RLSTAB_SERVER_KEY", raising=False)
    assert main(["serve", "model", "--host", "0.0.0.0"]) == 2
    assert "--host 0.0.0.0 is reachable from other machines" in capsys.readouterr().err
    (tmp_path / "key").write_text(SECRET)
    refused = [
        "serve",
        "model",
        "--host",
        "0.0.0.0",
        "--key-file",
        str(tmp_path / "key"),
        "--arguments",
        "{dtype: half}",
    ]
    assert main(refused) == 2
    said = capsys.readouterr().err
    assert "vLLM is not installed" in said or "arguments name dtype" in said
    assert SECRET not in said
