"""What happens inside one call of a router: its top-k is read, and replaced where a choice is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rlstab.errors import RoutingError, ShapeError

_TOP_K = {torch.topk, Tensor.topk}
_MASK = {torch.masked_fill, Tensor.masked_fill}
_PROJECT = {functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__}
_SIGMOID = {torch.sigmoid, Tensor.sigmoid, functional.sigmoid}


def _has_route(given: Tensor) -> Tensor:
    return given[:, :1] >= 0


class Choice(TorchFunctionMode):
    """Active while one router runs: sees its torch calls, among them the one top-k over its experts.

    That call returns the given experts with the values that the router's own scores have there, so whatever the router
    does with values and ids stays its own code, and its gradient too. A mask over experts (of group-limited routing)
    does not act on tokens whose experts are given: it would set their values to zero.

    Args:
        name: the router, for messages.
        experts: number of experts.
        top_k: number of experts per token.
        given: ids for each token, −1 where it chooses for itself; None where all do.
        scored: whether the router's log-probs will be asked for.
    """

    def __init__(self, name: str, experts: int, top_k: int, given: Tensor | None, *, scored: bool) -> None:
        super().__init__()
        self.native: Tensor | None = None
        self._name = name
        self._experts = experts
        self._top_k = top_k
        self._given = given
        self._scored = scored
        self._hits = 0
        self._logits: Tensor | None = None
        self._sigmoid = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Watch the calls that matter, and pass on all others."""
        kwargs = kwargs or {}
        if func in _TOP_K and self._over_experts(args[0] if args else kwargs["input"], *args[1:2], **kwargs):
            return self._choose(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in _MASK and self._given is not None and result.shape[1:] == (self._experts,):
            return torch.where(_has_route(self._given), args[0], result)
        if self._scored and not self._hits:
            if func in _PROJECT and result.shape[-1] == self._experts:
                self._logits = result.detach()
            self._sigmoid |= func in _SIGMOID
        return result

    def _over_experts(self, scores: Tensor, k: int | None = None, **others: Any) -> bool:
        return scores.dim() == 2 and scores.shape[-1] == self._experts and others.get("k", k) == self._top_k

    def _choose(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self._hits += 1
        native = func(*args, **kwargs)
        self.native = native[1]
        if self._given is None:
            return native
        if len(self._given) != len(self.native):
            raise ShapeError(
                f"{self._name}: expected routes for the {len(self.native)} tokens of the forward, padding included, "
                f"got {len(self._given)}"
            )
        chosen = torch.where(_has_route(self._given), self._given, self.native)
        scores: Tensor = args[0] if args else kwargs["input"]
        return torch.return_types.topk((scores.gather(-1, chosen), chosen))

    def finish(self) -> Tensor:
        """The router's own choice, once it has returned.

        Raises:
            RoutingError: unless it took exactly one top-k over its experts.
        """
        if self._hits != 1 or self.native is None:
            raise RoutingError(
                f"{self._name}: expected one top-{self._top_k} over {self._experts} experts per call, got "
                f"{self._hits}: its choice can be neither read nor replaced"
            )
        return self.native

    def logprobs(self, experts: Tensor) -> Tensor:
        """The router's log-probs of `experts`, float32: log-softmax of its logits, or log-sigmoid if it uses sigmoids.

        Raises:
            RoutingError: if the router does not project onto its experts before it chooses.
        """
        if self._logits is None:
            raise RoutingError(
                f"{self._name}: expected a projection onto {self._experts} experts before the choice, got none: its "
                "log-probs cannot be read, its routes can"
            )
        logits = self._logits.float()
        scores = functional.logsigmoid(logits) if self._sigmoid else functional.log_softmax(logits, dim=-1)
        return scores.gather(-1, experts)
