"""SPAM and Stable-SPAM: AdamW that clips spikes of single elements and forgets its moments now and then."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rlstab.errors import ConfigError
from rlstab.optim._gradients import local, whole

Moments = dict[str, Any]


def spam_clip(
    gradient: Float[Tensor, "*shape"], second_moment: Float[Tensor, "*shape"], *, theta: float
) -> Float[Tensor, "*shape"]:
    r"""Elements with $g^2 > \theta v$ held at $\operatorname{sgn}(g) \sqrt{\theta v}$, where there is a $v$.

    >>> spam_clip(torch.tensor([0.5, -2.0]), torch.tensor([1e-4, 1e-4]), theta=5000.0)
    tensor([ 0.5000, -0.7071])
    """
    limit = (theta * second_moment).sqrt()
    return torch.where((second_moment > 0) & (gradient.abs() > limit), gradient.sign() * limit, gradient)


def spam_warmup(k: int, *, steps: int) -> float:
    r"""The factor of the learning rate `k` steps after a reset: $1 - 0.99 \cdot \frac12 (1 + \cos(\pi k/(N + 1)))$.

    >>> round(spam_warmup(0, steps=150), 6), spam_warmup(151, steps=150)
    (0.01, 1.0)
    """
    return 1 - 0.99 * (1 + math.cos(math.pi * k / (steps + 1))) / 2 if k <= steps else 1.0


class _Spam(Optimizer):
    """AdamW around `_prepared`, which makes of a gradient what enters the moments.

    Moments are laid out as their parameter is, and at least in float32.
    """

    below_one: ClassVar[tuple[str, ...]] = ("betas",)

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        for key, value in defaults.items():
            high, wanted = (1, "from 0 to below 1") if key in self.below_one else (math.inf, "of at least 0")
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, str) and not 0 <= number < high:
                    raise ConfigError(f"{type(self).__name__}.{key}: expected a number {wanted}, got {value!r}")
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, with the state in the dtype that it was saved in."""
        super().load_state_dict(state_dict)
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(own, saved, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        weight, state = local(parameter), self.state[parameter]
        if not state:
            zeros = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
            state |= {"seen": 0, "step": 0, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            self._begin(state, local(zeros))
        state["seen"] += 1
        state["step"] += 1
        gradient = self._prepared(parameter.grad, state, group)
        first, second = map(local, self._moments(state, group))
        beta1, beta2 = group["betas"]
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step = state["step"]
        denominator = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        rate = group["lr"] * self._warmup(state, group)
        weight.mul_(1 - rate * group["weight_decay"])
        weight.add_((first / (1 - beta1**step) / denominator).to(weight.dtype), alpha=-rate)

    def _begin(self, state: Moments, zeros: Tensor) -> None:
        """Further state of a parameter."""

    @abstractmethod
    def _prepared(self, gradient: Tensor, state: Moments, group: dict[str, Any]) -> Tensor:
        """The local shard of the gradient, in the moments' dtype, clipped; the gradient itself stays as it is."""

    @abstractmethod
    def _moments(self, state: Moments, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The moments to use in this step, forgotten where that is due."""

    def _warmup(self, state: Moments, group: dict[str, Any]) -> float:
        """The factor of the learning rate."""
        return 1.0


class StableSPAM(_Spam):
    r"""Stable-SPAM: AdamW on gradients whose outliers are clipped and whose norm is normalised, tensor by tensor.

    AdaClip: with $T \leftarrow \theta T + (1 - \theta) \max|g|$, debiased to $\hat T$, elements beyond $\hat T$ are
    scaled by $\hat T / \max|g|$, which keeps their order. AdaGN: $g \leftarrow \frac{g}{\|g\|} \cdot
    \frac{\hat a}{\sqrt{\hat b} + \epsilon}$ with running means $a$ of the norm ($\gamma_1$) and $b$ of its square
    ($\gamma_2$). MoRet: every `reset` steps the moments begin anew. Maximum and norm are those of the whole tensor
    where it is sharded. Gradients must not be clipped before; after AdaGN the norm of each tensor is near 1, so watch
    it before the optimizer.

    At a reset the released class still uses the old moments in that step, and lets the counter of the clip begin anew
    too, which inflates $\hat T$ by $1/(1 - \theta^{k+1})$ for the $k$ steps after it (500 times at first, still 1.6
    times after 1000 steps), so that AdaClip is mostly off: `compat="released"` does the same. Its schedule that lowers
    $\beta_1$ and $\gamma_1$ over a run is not offered.

    Stabilises: spikes of single elements and of layers, low-precision training above all.

    Differs: the resets of the released class inflate the clip's threshold; `compat` has them.

    Proof: vector `stable_spam`.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay of first and second moment.
        eps: added to denominators.
        weight_decay: decoupled weight decay.
        gamma1: decay of the mean norm; 0.85 in the paper's BF16 runs.
        gamma2: decay of the mean squared norm; 0.99999 there.
        theta: decay of the clip's threshold.
        reset: steps between resets; 0 for none.
        compat: `paper`, or `released` for the resets of the released class.

    Raises:
        ConfigError: for numbers out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = StableSPAM([weight], lr=0.1)
        >>> weight.grad = torch.tensor([0.3, -0.4]); optimizer.step(); weight.data
        tensor([-0.1000,  0.1000])

    Reference: Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam, https://arxiv.org/abs/2502.17055
    """

    below_one = ("betas", "gamma1", "gamma2", "theta")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma1: float = 0.7,
        gamma2: float = 0.9,
        theta: float = 0.999,
        reset: int = 1000,
        compat: Literal["paper", "released"] = "paper",
    ) -> None:
        if compat not in ("paper", "released"):
            raise ConfigError(f"StableSPAM.compat: expected 'paper' or 'released', got {compat!r}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "gamma1": gamma1}
        super().__init__(params, defaults | {"gamma2": gamma2, "theta": theta, "reset": reset, "compat": compat})

    def _begin(self, state: Moments, zeros: Tensor) -> None:
        for name in ("threshold", "norm", "square"):
            state[name] = zeros.new_zeros(())

    def _prepared(self, gradient: Tensor, state: Moments, group: dict[str, Any]) -> Tensor:
        count = state["step"] if group["compat"] == "released" else state["seen"]
        dtype, shard = state["exp_avg"].dtype, local(gradient)
        largest = whole(gradient.abs().max()).to(dtype)
        state["threshold"].lerp_(largest, 1 - group["theta"])
        limit = state["threshold"] / (1 - group["theta"] ** count)
        shard = shard.to(dtype)
        shard = torch.where(shard.abs() > limit, shard / largest * limit, shard)  # keeps their order
        norm = _joined_norm(shard, gradient)
        state["norm"].lerp_(norm, 1 - group["gamma1"])
        state["square"].lerp_(norm.square(), 1 - group["gamma2"])
        mean = state["norm"] / (1 - group["gamma1"] ** count)
        root = (state["square"] / (1 - group["gamma2"] ** count)).sqrt()
        normalised: Tensor = shard / torch.where(norm > 0, norm, 1.0) * (mean / (root + group["eps"]))
        return normalised

    def _moments(self, state: Moments, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        first, second = state["exp_avg"], state["exp_avg_sq"]
        if group["reset"] and state["seen"] % group["reset"] == 0:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(first), torch.zeros_like(second)
            state["step"] = 1
            if group["compat"] == "paper":
                return state["exp_avg"], state["exp_avg_sq"]
        return first, second


def _joined_norm(shard: Tensor, gradient: Tensor) -> Tensor:
    """The norm of a tensor of which each rank holds a shard, laid out as `gradient` is."""
    if not isinstance(gradient, DTensor):
        return _norm(shard)
    mesh, placements = gradient.device_mesh, gradient.placements
    laid_out = DTensor.from_local(shard, mesh, placements, shape=gradient.shape, stride=gradient.stride())
    return whole(_norm(laid_out))


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm


class SPAM(_Spam):
    r"""SPAM: AdamW that clips gradient elements far beyond their second moment, and resets its momentum.

    Elements with $g^2 > \theta v$, $v$ the second moment of the steps before, become $\operatorname{sgn}(g)
    \sqrt{\theta v}$. Every `reset` steps both moments begin anew, and the learning rate rises again from a hundredth
    along a cosine over `warmup` steps; the counter of Adam's bias correction goes on. In the first 20 steps, and in the
    20 after a reset, nothing is clipped.

    Stabilises: spikes of single gradient elements, and what they leave in the moments.

    Proof: vector `spam`.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay of first and second moment.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        theta: $\theta$.
        reset: steps between resets; 0 for none.
        warmup: steps of the warm-up after a reset.

    Raises:
        ConfigError: for numbers out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = SPAM([weight], lr=0.1)
        >>> weight.grad = torch.tensor([0.3]); optimizer.step(); weight.data
        tensor([-0.1000])

    Reference: SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training, https://arxiv.org/abs/2501.06842
    """

    calm = 20

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        theta: float = 5000.0,
        reset: int = 500,
        warmup: int = 150,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "theta": theta}
        super().__init__(params, defaults | {"reset": reset, "warmup": warmup})

    def _since_reset(self, state: Moments, group: dict[str, Any]) -> int:
        return int(state["seen"] % group["reset"] if group["reset"] else state["seen"])

    def _prepared(self, gradient: Tensor, state: Moments, group: dict[str, Any]) -> Tensor:
        shard = local(gradient).to(state["exp_avg"].dtype)
        if state["seen"] < self.calm or self._since_reset(state, group) < self.calm:
            return shard
        return spam_clip(shard, local(state["exp_avg_sq"]), theta=group["theta"])

    def _moments(self, state: Moments, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if group["reset"] and self._since_reset(state, group) == 0:
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
        return state["exp_avg"], state["exp_avg_sq"]

    def _warmup(self, state: Moments, group: dict[str, Any]) -> float:
        if not group["reset"] or state["seen"] < group["reset"]:
            return 1.0
        return spam_warmup(self._since_reset(state, group), steps=group["warmup"])
