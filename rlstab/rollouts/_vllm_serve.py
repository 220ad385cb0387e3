"""`rlstab serve`: vLLM's own server, with the arguments that make it agree with a trainer, and a key before it."""

from __future__ import annotations

import asyncio
import socket
from argparse import Namespace
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from rlstab.errors import ConfigError, EngineError
from rlstab.rollouts._held_folder import HeldFolder
from rlstab.rollouts._server_key import KeyCheck, ServerKey, check_address
from rlstab.rollouts._vllm_calls import Limits
from rlstab.rollouts._vllm_cores import environment_defaults
from rlstab.rollouts._vllm_driver import Driver, InFlight
from rlstab.rollouts._vllm_follow import follow_leader, leader_environment
from rlstab.rollouts._vllm_routes import NATIVE, RouteStream, route_settings
from rlstab.rollouts._vllm_server import ServerRoutes, WeightTransfer
from rlstab.rollouts._vllm_settings import check_settings, engine_defaults

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

__all__ = ["ServerSettings", "serve"]

WATCH = 0.5
"""Seconds between two looks at the engine."""


ENCRYPTION = ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers")
"""Arguments of vLLM's server that go on to uvicorn."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How to serve a model for `VLLMServerEngine`.

    Args:
        host: address to bind; one that other machines reach needs a key.
        port: port to bind; 0 takes a free one.
        key: what every request must carry.
        dtype: precision to sample in; that of the checkpoint by default.
        transfer: how weights come: in a `file` that the server sees or is uploaded, or over `nccl` from the trainer's
            GPU.
        in_flight: what happens to requests in flight at a sync: see `VLLMEngine`.
        patience: seconds without a token, or for an update of weights, after which the server ends itself.
        arguments: arguments of vLLM's engine and of its server, which go before all defaults.
        kept_limit: most tokens recorded per position for `truncation="renormalise"` without `top_k`.
        routes: return the experts that every token went to, of a mixture of experts: see `VLLMEngine`.
        repair: bring vLLM's CPU backend up to date after each sync.

    Raises:
        ConfigError: if another machine could reach it without a key, or if there is no GPU for NCCL.

    Example:
        >>> ServerSettings(port=8001).host
        '127.0.0.1'
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: ServerKey | None = None
    dtype: torch.dtype | None = None
    transfer: WeightTransfer = "file"
    in_flight: InFlight = "keep"
    patience: float = 300.0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    kept_limit: int = 1024
    routes: bool = False
    repair: bool = True

    def __post_init__(self) -> None:
        check_address(self.host, self.key)
        if self.transfer == "nccl" and not torch.cuda.is_available():
            raise ConfigError("rlstab serve: transfer nccl without a CUDA device; expected file")


def serve(model: str, settings: ServerSettings) -> None:
    """Serve a model until the process is asked to end.

    Beside vLLM's own routes it has those of `VLLMServerEngine`. A line on the standard output says when it is ready.

    Args:
        model: folder or name of a checkpoint, with its tokenizer.
        settings: how.

    Raises:
        ConfigError: if the settings cannot be honoured.
        EngineError: if vLLM died, or hangs.

    Example:
        ```python
        serve("checkpoint", ServerSettings(port=8001))
        ```
    """
    follow_leader()
    check_settings("rlstab serve", settings.arguments, patience=settings.patience, kept_limit=settings.kept_limit)
    environment = {
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        **leader_environment(),
    }
    with environment_defaults(environment), closing(HeldFolder("uploads")) as folder:
        engine, frontend = _arguments(model, settings)
        eager = {"TORCHDYNAMO_DISABLE": "1"} if engine["enforce_eager"] else {}
        with environment_defaults(eager):
            asyncio.run(_served(engine, frontend, settings, folder.path))


def _arguments(model: str, settings: ServerSettings) -> tuple[dict[str, Any], Namespace]:
    """Arguments of vLLM's engine, and of its server."""
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    dtype = settings.dtype or AutoConfig.from_pretrained(model).dtype or torch.float32
    frontend = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", model])
    engine = engine_defaults(dtype)
    if settings.transfer == "nccl":
        engine["weight_transfer_config"] = {"backend": "nccl"}
    known = {entry.name for entry in fields(AsyncEngineArgs)}
    for name, value in settings.arguments.items():
        if name in known:
            engine[name] = value
        elif name in vars(frontend) and name not in ("host", "port", "api_key"):
            setattr(frontend, name, value)
        else:
            raise ConfigError(f"rlstab serve: arguments name {name}, which neither vLLM's engine nor its server takes")
    engine["model"] = model
    return route_settings("rlstab serve", engine, settings.arguments) if settings.routes else engine, frontend


async def _served(arguments: dict[str, Any], frontend: Namespace, settings: ServerSettings, folder: Path) -> None:
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.launchers.launcher import create_server_socket
    from vllm.v1.engine.async_llm import AsyncLLM

    bound = create_server_socket((settings.host, settings.port), reuse_port=False)
    try:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        driver = Driver(engine, in_flight=settings.in_flight)
        try:
            if settings.transfer == "file":
                await driver.start_transfer({"repair": settings.repair})
            text = engine.model_config.hf_text_config
            limits = Limits(context=driver.context, vocabulary=text.vocab_size, kept=settings.kept_limit)
            experts = await RouteStream.begun(driver, native=NATIVE in arguments) if settings.routes else None
            routes = ServerRoutes(
                driver, limits, folder=folder, transfer=settings.transfer, patience=settings.patience, experts=experts
            )
            await _run(engine, frontend, routes, bound, settings)
        finally:
            engine.shutdown(timeout=0.0)
            driver.kill()
    finally:
        bound.close()


async def _run(
    engine: AsyncLLM, frontend: Namespace, routes: ServerRoutes, bound: socket.socket, settings: ServerSettings
) -> None:
    """Serve until asked to end; a vLLM that is dead or hangs is an error."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.launcher import serve_http

    tasks = await engine.get_supported_tasks()
    app = build_app(frontend, tasks, engine.model_config)
    await init_app_state(engine, app.state, frontend, tasks)
    app.mount("/rlstab", routes)
    app.middleware_stack = KeyCheck(app.middleware_stack or app.build_middleware_stack(), settings.key)
    host, port = bound.getsockname()[:2]
    encryption = {name: vars(frontend)[name] for name in ENCRYPTION}
    options = {"access_log": False, "log_level": "warning", "timeout_graceful_shutdown": 1, **encryption}
    serving = asyncio.create_task(serve_http(app, bound, host=host, port=port, **options))
    scheme = "https" if frontend.ssl_certfile else "http"
    address = f"[{host}]" if ":" in host else host
    announced = False
    while not serving.done():
        await asyncio.wait([serving], timeout=WATCH)
        if not (announced or serving.done()) and app.state.server.started:
            announced = True
            print(f"rlstab serve: {frontend.model} at {scheme}://{address}:{port}", flush=True)
        if routes.fault:
            serving.cancel()
            raise EngineError(f"rlstab serve: vLLM {routes.fault}; its log says why. Start the server anew")
    await (await serving)
