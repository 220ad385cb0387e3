"""The experts that vLLM sent each token to: from its own flag, or recorded by our worker where that is refused."""

from __future__ import annotations

import dataclasses
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlstab.errors import ConfigError, EngineError, RoutingError
from rlstab.rollouts._served_routes import routes_from_vllm
from rlstab.rollouts._vllm_calls import Call, Completion
from rlstab.rollouts._vllm_cores import Core
from rlstab.rollouts._vllm_driver import Driver

__all__ = ["NATIVE", "RouteReader", "RouteStream", "RoutesOf", "no_experts", "route_settings"]

NATIVE = "enable_return_routed_experts"

RECORDED = {"enable_prefix_caching": False, "enforce_eager": True}
"""What our own recording needs: every token goes through a forward, and every forward through Python."""

logger = logging.getLogger("rlstab")

RoutesOf = Callable[[int, Completion], Awaitable[Tensor | None]]
"""Gives the routes of the finished request at a place of a call."""


def route_settings(owner: str, settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of vLLM with which routes come back.

    vLLM's own flag is taken wherever vLLM takes it: not on a CPU, nor with its model runner V1. It has not been run by
    our tests, which have no GPU, so taking it is logged.

    Args:
        owner: whose settings they are, for the error.
        settings: the arguments so far, the model's among them.
        given: those of them that the user set.

    Raises:
        ConfigError: if the user set one of `RECORDED` to what recording cannot work with.
    """
    native = {**settings, "enable_prefix_caching": True, NATIVE: True}
    if given.get("enable_prefix_caching", True) and _accepted(native):
        logger.warning(
            "%s: routes come from vLLM's own %s, of which the reading of its arrays is tested and no run on a GPU: "
            "routes/agreement must be near 1",
            owner,
            NATIVE,
        )
        return native
    for key, needed in RECORDED.items():
        if given.get(key, needed) != needed:
            raise ConfigError(
                f"{owner}: routes=True with {key}={given[key]}; expected {needed}: this vLLM refuses its own flag "
                "for routes, and their recording needs every token to pass through the model in Python"
            )
    return {**settings, **RECORDED}


def no_experts(owner: str) -> ConfigError:
    """The error of routes that are asked of a dense model."""
    return ConfigError(f"{owner}: routes=True of a model without experts: a dense model has no routes")


def _accepted(settings: Mapping[str, Any]) -> bool:
    """Does vLLM accept its own flag with these settings?"""
    from vllm import EngineArgs
    from vllm.platforms import current_platform

    # Older versions have the flag too, and return another array.
    if current_platform.is_cpu() or "aux_output_config" not in {field.name for field in dataclasses.fields(EngineArgs)}:
        return False
    try:
        EngineArgs(**settings).create_engine_config()
    except ValueError as refused:
        logger.info("vLLM refuses %s, routes are recorded by the engine instead: %s", NATIVE, refused)
        return False
    return True


class RouteFormat:
    """Finds the routes in what vLLM returns of a finished request.

    Args:
        owner: whose routes they are, for the errors.
        experts: the decoder layers that have experts, and how many each has.
        native: whether vLLM returns routes itself.

    Raises:
        ConfigError: if the model has no experts.
    """

    def __init__(self, owner: str, experts: tuple[list[int], int], *, native: bool) -> None:
        self._owner = owner
        self._layers, self._num_experts = experts
        self.native = native
        if not self._layers:
            raise no_experts(owner)

    def mark(self, call: Call) -> None:
        """Have the routes of a call recorded, where vLLM does not return them."""
        if not self.native:
            call.route_keys = [uuid.uuid4().hex for _ in call.prompt_sizes()]

    def routes(self, completion: Completion, recorded: str, prompt: int) -> Tensor | None:
        """The routes of prompt and completion but its last token, `[S, L, K]`, sparse layers only.

        None for a request that was aborted before it ran.

        Args:
            completion: what came of the request.
            recorded: what our worker recorded of it, if it does.
            prompt: number of prompt tokens.

        Raises:
            RoutingError: if a token has none.
        """
        found = self._of_vllm(completion.routed) if self.native else self._of_worker(recorded)
        tokens = prompt + len(completion.token_ids) - 1
        if found is not None and len(found) < tokens:
            raise RoutingError(
                f"{self._owner}: expected the routes of {tokens} tokens, got {len(found)}: they are truncated"
            )
        return None if found is None else found[:tokens].clone()  # a forward may run ahead of an interruption

    def _of_worker(self, text: str) -> Tensor | None:
        return routes_from_vllm(text, num_experts=self._num_experts) if text else None

    def _of_vllm(self, routed: npt.NDArray[Any] | None) -> Tensor | None:
        if routed is None:
            return None
        ids = routed[:, self._layers]
        return torch.from_numpy(ids.astype(np.uint8 if self._num_experts <= 256 else np.int16))


class RouteReader:
    """Reads the routes of finished calls.

    Args:
        core: vLLM, started with the settings of `route_settings`.
        native: whether vLLM returns routes itself.

    Raises:
        ConfigError: if the model has no experts, or this vLLM does not show which it chooses.
    """

    def __init__(self, core: Core, *, native: bool) -> None:
        self._core = core
        self._format = RouteFormat("VLLMEngine", core.call_workers("rlstab_experts")[0], native=native)
        if not native:
            core.call_workers("rlstab_record_routes")

    @contextmanager
    def reading(self, call: Call) -> Iterator[None]:
        """While vLLM answers a call; if it fails, what was recorded of it is forgotten."""
        self._format.mark(call)
        try:
            yield
        except BaseException:
            with suppress(EngineError):
                self._taken(call)
            raise

    def read(self, call: Call, completions: Sequence[Completion]) -> list[Tensor | None]:
        """The routes of each completion: see `RouteFormat.routes`."""
        rows = zip(completions, self._taken(call), call.prompt_sizes(), strict=True)
        return [self._format.routes(completion, recorded, prompt) for completion, recorded, prompt in rows]

    def _taken(self, call: Call) -> list[str]:
        if not call.route_keys:
            return [""] * len(call.prompt_sizes())
        texts: list[str] = self._core.call_workers("rlstab_take_routes", keys=call.route_keys)[0]
        return texts


class RouteStream:
    """Reads the routes of requests as they finish.

    Args:
        driver: vLLM, started with the settings of `route_settings`.
        form: how its routes are found.
    """

    def __init__(self, driver: Driver, form: RouteFormat) -> None:
        self._driver = driver
        self._format = form

    @classmethod
    async def begun(cls, driver: Driver, *, native: bool) -> RouteStream:
        """Reads routes from now on.

        Raises:
            ConfigError: if the model has no experts, or this vLLM does not show which it chooses.
        """
        form = RouteFormat("rlstab serve", (await driver.call_workers("rlstab_experts"))[0], native=native)
        if not native:
            await driver.call_workers("rlstab_record_routes")
        return cls(driver, form)

    @asynccontextmanager
    async def reading(self, call: Call) -> AsyncIterator[RoutesOf]:
        """While vLLM answers a call; what was recorded of requests that did not finish is forgotten."""
        self._format.mark(call)
        left = dict(enumerate(call.route_keys))
        prompts = call.prompt_sizes()

        async def routes_of(place: int, completion: Completion) -> Tensor | None:
            recorded = await self._taken([left.pop(place)]) if left else [""]
            return self._format.routes(completion, recorded[0], prompts[place])

        try:
            yield routes_of
        finally:
            if left:
                await self._taken(list(left.values()))

    async def _taken(self, keys: list[str]) -> list[str]:
        texts: list[str] = (await self._driver.call_workers("rlstab_take_routes", keys=keys))[0]
        return texts
