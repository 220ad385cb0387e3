import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from monitor_vectors import vector
from torch import Tensor, nn
from torch.distributed import init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from two_processes import in_two_processes

from rlstab.errors import ConfigError
from rlstab.optim import SPAM, StableSPAM, ZClip, global_norm
from rlstab.optim._spam import spam_clip, spam_warmup


def double(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def trace(
    optimizer_of: Callable[[nn.Parameter], torch.optim.Optimizer], gradients: list[Any]
) -> tuple[list[Tensor], Any]:
    """The weight after each step, and the state at the end."""
    weight = nn.Parameter(torch.zeros(len(gradients[0]), dtype=torch.float64))
    optimizer, found = optimizer_of(weight), []
    for gradient in gradients:
        weight.grad = double(gradient)
        optimizer.step()
        assert torch.equal(weight.grad, double(gradient)), "the gradient is left as it is"
        found.append(weight.detach().clone())
    return found, optimizer.state[weight]


# --- Stable-SPAM ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reset", "compat", "expected"),
    [
        (0, "paper", "no_reset"),
        (0, "released", "no_reset"),
        (3, "paper", "reset_gap3_intended (separate counters, moments zeroed before use)"),
        (3, "released", "reset_gap3_released_code"),
    ],
)
def test_vector_of_stable_spam(reset: int, compat: Any, expected: str) -> None:
    found = vector("stable_spam")
    hyper, steps = found["hyper"], found[expected]
    settings = {
        "lr": hyper["lr"],
        "betas": tuple(hyper["betas"]),
        "gamma1": hyper["gamma1"],
        "gamma2": hyper["gamma2"],
        "theta": hyper["theta(gamma3)"],
        "eps": hyper["eps"],
        "weight_decay": hyper["wd"],
    }
    weights, _ = trace(lambda w: StableSPAM([w], reset=reset, compat=compat, **settings), found["grads"])
    for weight, step in zip(weights, steps, strict=True):
        torch.testing.assert_close(weight, double(step["p"]), rtol=1e-7, atol=1e-10)
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = StableSPAM([weight], reset=reset, compat=compat, **settings)
    for gradient, step in zip(found["grads"], steps, strict=True):
        weight.grad = double(gradient)
        optimizer.step()
        state = optimizer.state[weight]
        count = step["t"] if compat == "paper" or step["t"] <= max(reset, 3) else state["step"]
        threshold = state["threshold"] / (1 - settings["theta"] ** count)
        torch.testing.assert_close(threshold, double(step["adaclip_threshold"]), rtol=1e-7, atol=0)


def test_the_released_reset_inflates_the_threshold() -> None:
    def threshold(compat: Any) -> float:
        """Right after the step that follows a reset, for gradients of 1."""
        _, state = trace(lambda w: StableSPAM([w], reset=50, compat=compat), [[1.0, -1.0]] * 51)
        count = state["seen"] if compat == "paper" else state["step"]
        return float(state["threshold"] / (1 - 0.999**count))

    assert threshold("paper") == pytest.approx(1.0)
    assert threshold("released") > 20


def test_gradients_of_zero_are_no_trouble() -> None:
    weights, _ = trace(lambda w: StableSPAM([w], lr=0.1), [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert all(weight.isfinite().all() for weight in weights)
    assert weights[0].tolist() == [0.0, 0.0]


def test_a_spike_is_held_where_adam_is_thrown() -> None:
    gradients = [[0.1, -0.1]] * 30 + [[100.0, -0.1]] + [[0.1, -0.1]] * 10
    ours, _ = trace(lambda w: StableSPAM([w], lr=0.01, gamma1=0.85, gamma2=0.999), gradients)
    adam, _ = trace(lambda w: torch.optim.AdamW([w], lr=0.01, weight_decay=0.0), gradients)
    moved = [(weights[40] - weights[30])[0].abs().item() for weights in (ours, adam)]
    usual = [(weights[29] - weights[19])[0].abs().item() for weights in (ours, adam)]
    assert abs(moved[0] / usual[0] - 1) < 0.5
    assert moved[1] / usual[1] > 2 or moved[1] / usual[1] < 0.5


# --- SPAM ----------------------------------------------------------------------------


def test_vector_of_spam() -> None:
    found = vector("spam")
    clipped = spam_clip(double(found["g"]), double(found["v_prev"]), theta=found["theta"])
    torch.testing.assert_close(clipped, double(found["clipped"]), rtol=1e-9, atol=0)
    assert clipped[1].item() == pytest.approx(found["limit"])
    scales = [spam_warmup(k, steps=150) for k in range(6)]
    assert scales == pytest.approx(found["warmup_scale(step 0..5, N=150)"], rel=1e-9)


def test_spam_without_spikes_is_adamw() -> None:
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn(60, 3, generator=draw, dtype=torch.float64).tolist()
    ours, _ = trace(lambda w: SPAM([w], lr=0.1, weight_decay=0.1, reset=0), gradients)
    adam, _ = trace(lambda w: torch.optim.AdamW([w], lr=0.1, weight_decay=0.1, eps=1e-6), gradients)
    torch.testing.assert_close(ours, adam)


def test_spam_clips_after_its_calm_steps_only() -> None:
    spike = [[1e-3]] * 18 + [[1.0]]
    _, early = trace(lambda w: SPAM([w]), spike)  # step 19
    _, late = trace(lambda w: SPAM([w]), [[1e-3]] * 19 + [[1.0]])  # step 20
    assert early["exp_avg"].item() > 0.09
    second = (1 - 0.999**19) * 1e-6
    held = (5000 * second) ** 0.5
    assert late["exp_avg"].item() == pytest.approx(0.9 * (1 - 0.9**19) * 1e-3 + 0.1 * held)


def test_spam_resets_its_moments_and_warms_up_again() -> None:
    gradients = [[1.0]] * 12
    weights, state = trace(lambda w: SPAM([w], lr=0.1, reset=10, warmup=3, eps=0.0), gradients)
    steps = [-(b - a).item() for a, b in pairwise(weights)]
    assert steps[:8] == pytest.approx([0.1] * 8)
    bias = [(0.1 * k) / (1 - 0.9**t) / ((0.001 * r) / (1 - 0.999**t)) ** 0.5 for k, r, t in ((1, 1, 10),)]
    assert steps[8] == pytest.approx(0.1 * 0.01 * bias[0])
    assert state["exp_avg"].item() == pytest.approx(0.271)  # three steps since
    assert state["step"] == 12  # Adam's counter goes on


# --- both ----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [SPAM, StableSPAM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_from_a_checkpoint(optimizer: Any, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn(9, 4, generator=draw).to(dtype)

    def run(weight: nn.Parameter, steps: torch.optim.Optimizer, part: Tensor) -> None:
        for gradient in part:
            weight.grad = gradient.clone()
            steps.step()

    first = nn.Parameter(torch.ones(4, dtype=dtype))
    steps = optimizer([first], lr=0.1, reset=4)
    run(first, steps, gradients[:6])
    second = nn.Parameter(first.detach().clone())
    resumed = optimizer([second], lr=0.1, reset=4)
    resumed.load_state_dict(copy.deepcopy(steps.state_dict()))
    assert resumed.state[second]["exp_avg"].dtype == torch.float32
    run(first, steps, gradients[6:])
    run(second, resumed, gradients[6:])
    assert torch.equal(first, second)


@pytest.mark.parametrize("optimizer", [SPAM, StableSPAM])
def test_decay_is_decoupled_and_closures_are_run(optimizer: Any) -> None:
    weight = nn.Parameter(double([2.0]))
    steps = optimizer([weight], lr=0.1, weight_decay=0.5)

    def closure() -> Tensor:
        steps.zero_grad()
        loss = 0.0 * weight.sum()
        loss.backward()
        return loss

    assert steps.step(closure) == 0
    assert weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5))


def shards_beside_whole_tensors() -> str:
    """`same`, if the shards of two processes have the norms and updates of whole tensors."""
    init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 3, generator=draw), torch.randn(4, generator=draw)]
    for optimizer in (StableSPAM, SPAM):
        whole = [torch.nn.Parameter(x.clone()) for x in start]
        shards = [torch.nn.Parameter(distribute_tensor(x.clone(), mesh, [Shard(0)])) for x in start]
        ours, theirs = optimizer(shards, lr=0.1), optimizer(whole, lr=0.1)
        clips = ZClip(warmup=2), ZClip(warmup=2)
        for step in range(30):
            for p, q in zip(whole, shards, strict=True):
                p.grad = torch.randn(p.shape, generator=draw) * (50.0 if step in (9, 25) else 1.0)
                q.grad = distribute_tensor(p.grad.clone(), mesh, [Shard(0)])
            assert abs(global_norm(whole) - global_norm(shards)) <= 1e-5 * global_norm(whole)
            a, b = clips[0].apply(whole), clips[1].apply(shards)
            assert (a.limit is None) == (b.limit is None)
            ours.step()
            theirs.step()
        for p, q in zip(whole, shards, strict=True):
            torch.testing.assert_close(q.full_tensor(), p.data)  # type: ignore[attr-defined]
            assert ours.state[q]["exp_avg"].shape == q.shape
    return "same"


def test_sharded_gradients_have_the_norms_of_whole_ones() -> None:
    assert in_two_processes(shards_beside_whole_tensors) == ["same", "same"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda w: StableSPAM([w], lr=-1.0), r"StableSPAM\.lr: expected a number of at least 0, got -1\.0"),
        (lambda w: StableSPAM([w], betas=(0.9, 1.0)), r"StableSPAM\.betas: expected a number from 0 to below 1"),
        (lambda w: StableSPAM([w], theta=1.0), r"StableSPAM\.theta: expected a number from 0 to below 1"),
        (lambda w: StableSPAM([w], compat="code"), r"StableSPAM\.compat: expected 'paper' or 'released'"),  # type: ignore[arg-type]
        (lambda w: SPAM([w], theta=-1.0), r"SPAM\.theta: expected a number of at least 0"),
        (lambda w: SPAM([w], reset=-1), r"SPAM\.reset"),
    ],
)
def test_refusals(build: Callable[[nn.Parameter], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(nn.Parameter(torch.zeros(1)))
