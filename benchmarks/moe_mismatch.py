"""Mixtures of experts: distance of trainer and engine with and without replay of the engine's routes, and its cost.

    python benchmarks/moe_mismatch.py [--parts static rl cost] [--models gentle recipe] [--seeds N] [--json FILE]
                                      [--plot FILE]

A tiny model (8 experts, 2 per token, 2 layers, 64 wide) is warmed up to sort six digits. There are two: `recipe` is the
Qwen3 MoE of the embedded recipes with their warm-up (tied head, experts 64 wide, steps of 4e-3 on 64 demonstrations),
`gentle` a Mixtral with a head of its own and experts 32 wide (steps of 2e-3 on 128 demonstrations).

The engine is disturbed while it samples: router or weights in fewer bits, or noise on the router's logits. "Blocks in
fp8" rounds the matrices of attention, routers and experts and leaves embedding, head and norms, as engines do. `static`
scores the samples once with the trainer's own choices and once along the engine's routes. What is left under replay is
not routing: rounding of weights and gate values, which no choice of experts undoes, so 1/factor is its share of k3.
Beside it stand the shares of k3 on the tokens that a flipped pair reaches (their own, or of a token before) and on the
one worst token: where the latter is large, a seed's factor is that of its worst token.

`rl` trains with strong router noise, with and without `replay="R3"`. `cost` times sampling with and without recording,
and whole steps with and without replay, in turn, by the CPU time of the process; what a batch does with its routes, as
a share of such a step; and the same for a million tokens of a large model (48 layers, 8 of 128 experts).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import torch
import transformers
import trl
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from rlstab.losses import Objective, presets
from rlstab.models import isolated_rng
from rlstab.recipes import TinyModel, WarmUp, warm_up
from rlstab.record import RunFolder
from rlstab.rollouts import Engine, Health, Request, Rollout, Sampling, TransformersEngine, WeightSource
from rlstab.routing import Routers, Routes, flipped
from rlstab.tasks import SortDigits
from rlstab.trainers import GRPOConfig, Signals, StableGRPOTrainer

TASK = SortDigits(digits=6)
COST_MODEL = TinyModel(hidden=256, layers=4, heads=4, experts=8)
MODELS = {
    "gentle": WarmUp(learning_rate=2e-3, batch_size=128),
    "recipe": WarmUp(learning_rate=4e-3, batch_size=64),
}
SHARED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
)
Disturbance = Callable[[nn.Module], contextlib.AbstractContextManager[None]]


class RouterLogits(TorchFunctionMode):
    """Within a router: logits as `change` makes them of hidden states and weight."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            return self.change(args[0], args[1])
        return func(*args, **(kwargs or {}))


@contextmanager
def routers_that(model: nn.Module, *, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Change how the routers make logits, while the block runs."""
    modules = [module for router in Routers(model).routers for module in router.modules]
    for module in modules:
        vars(module)["forward"] = partial(_changed, module.forward, RouterLogits(change))
    try:
        yield
    finally:
        for module in modules:
            del vars(module)["forward"]


def _changed(forward: Callable[..., Any], mode: RouterLogits, hidden: Tensor) -> Any:
    with mode:
        return forward(hidden)


@contextmanager
@torch.no_grad()
def weights_in(
    model: nn.Module, *, rounded: Callable[[Tensor], Tensor], matrices: Literal["all", "blocks"] = "all"
) -> Iterator[None]:
    """Round the weights while the block runs: all of them, or the matrices of the decoder's blocks."""
    chosen = [p for name, p in model.named_parameters() if matrices == "all" or (p.dim() > 1 and ".layers." in name)]
    exact = {parameter: parameter.detach().clone() for parameter in chosen}
    for parameter in exact:
        parameter.copy_(rounded(parameter))
    try:
        yield
    finally:
        for parameter, value in exact.items():
            parameter.copy_(value)


def bf16(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().float()


def fp8(tensor: Tensor) -> Tensor:
    scale = tensor.abs().amax() / 448
    return (tensor / scale).to(torch.float8_e4m3fn).float() * scale


def noise(sigma: float) -> Disturbance:
    def change(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        return logits + sigma * torch.randn_like(logits)

    return partial(routers_that, change=change)


DISTURBANCES: dict[str, Disturbance] = {
    "router's inputs in bf16": partial(routers_that, change=lambda hidden, weight: bf16(hidden) @ bf16(weight).T),
    "router in bf16": partial(routers_that, change=lambda hidden, weight: bf16(bf16(hidden) @ bf16(weight).T)),
    "weights in bf16": partial(weights_in, rounded=bf16),
    "all weights in fp8": partial(weights_in, rounded=fp8),
    "blocks in fp8": partial(weights_in, rounded=fp8, matrices="blocks"),
    "router noise 0.01": noise(0.01),
    "router noise 0.1": noise(0.1),
    "router noise 0.3": noise(0.3),
    "router noise 1": noise(1.0),
}


@final
class DisturbedEngine(Engine):
    """Samples with the trainer's own weights, disturbed while it does, and returns its routes."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, disturbance: Disturbance) -> None:
        self._engine = TransformersEngine(model, tokenizer, routes=True)
        self._disturbed = partial(disturbance, model)

    id = property(lambda self: self._engine.id)
    weight_version = property(lambda self: self._engine.weight_version)
    shares_weights = property(lambda self: True)
    returns_routes = property(lambda self: True)
    dtype = property(lambda self: self._engine.dtype)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        with self._disturbed():
            return self._engine.generate(requests, sampling)

    def score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        return self._engine.score(sequences)

    def sync_weights(self, source: WeightSource, version: int) -> None:
        self._engine.sync_weights(source, version)

    def health(self) -> Health:
        return self._engine.health()

    def close(self) -> None:
        self._engine.close()


def warmed(seed: int, steps: int, name: str = "recipe") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that has seen demonstrations of which 70 % have one wrong digit."""
    with isolated_rng(seed):
        model, tokenizer = TinyModel(experts=8).load(TASK, seed=seed)
        if name == "gentle":
            config = model.config.to_dict()
            shared = {key: config[key] for key in SHARED}
            sizes: dict[str, Any] = {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2}
            model = MixtralForCausalLM(MixtralConfig(**shared, **sizes, tie_word_embeddings=False))
        warm_up(model, tokenizer, TASK, replace(MODELS[name], steps=steps))
    return model, tokenizer


# --- one policy, its samples scored twice -----------------------------------------------------------------


def static(seed: int, prompts: int, warmup: int, name: str) -> list[dict[str, Any]]:
    model, tokenizer = warmed(seed, warmup, name)
    texts: list[str] = TASK.prompts(prompts, split="test")["prompt"]
    requests = [Request(prompt_ids=tokenizer(text)["input_ids"]) for text in texts for _ in range(8)]
    return [
        {"seed": seed, "model": name, "engine": engine, **scored(model, tokenizer, requests, disturbance)}
        for engine, disturbance in DISTURBANCES.items()
    ]


@torch.no_grad()
def scored(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], disturbance: Disturbance
) -> dict[str, float]:
    """k3 per token and the share of flipped pairs, without and with replay, and on which tokens k3 stands."""
    engine = DisturbedEngine(model, tokenizer, disturbance=disturbance)
    rollouts = engine.generate(requests, Sampling(max_new_tokens=8, seed=0))
    rows = [torch.cat([rollout.prompt_ids, rollout.token_ids]) for rollout in rollouts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    routers = Routers(model)
    taken = [r.routed_experts for r in rollouts if r.routed_experts is not None]
    brought = Routes.padded([Routes(experts=e, valid=torch.ones(len(e)).bool()) for e in taken], mask)
    sampler = torch.cat([rollout.logprobs for rollout in rollouts])
    own = completion_mask(rollouts, ids)
    found: dict[str, float] = {}
    for name, watch in {"native": routers.recording(), "replayed": routers.replaying(brought)}.items():
        with watch as watched:
            logps = model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        delta = (logps.gather(-1, ids[:, 1:, None]).squeeze(-1)[own] - sampler).double()
        k3 = delta.expm1() - delta
        flips = flipped(watched.routes(len(ids)).experts, brought.experts) & brought.valid.unsqueeze(-1)
        found |= {f"k3_{name}": k3.mean().item(), f"flips_{name}": flips[:, :-1][own].float().mean().item()}
        if name == "native":
            reached = flips.any(-1).cummax(-1).values[:, :-1][own]
            found |= {"on_reached": (k3[reached].sum() / k3.sum()).item(), "on_worst": (k3.amax() / k3.sum()).item()}
    return found


def completion_mask(rollouts: Sequence[Rollout], ids: Tensor) -> Tensor:
    """Where the prediction of a completion's token stands, `[B, T - 1]`."""
    place = torch.arange(ids.shape[1] - 1)
    starts = torch.tensor([len(rollout.prompt_ids) - 1 for rollout in rollouts])[:, None]
    return (place >= starts) & (place < starts + torch.tensor([len(r.token_ids) for r in rollouts])[:, None])


# --- training -----------------------------------------------------------------


def trainer_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    seed: int,
    steps: int,
    rows: int = 128,
    updates: int = 1,
    epochs: int = 1,
    learning_rate: float = 5e-4,
    objective: Objective | None = None,
    **extra: Any,
) -> StableGRPOTrainer:
    """A trainer that logs to memory: `rows` completions for each of `updates` updates, all of them `epochs` times."""
    return StableGRPOTrainer(
        model,
        TASK.reward,
        GRPOConfig(
            str(folder / "host"),
            seed=seed,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=rows,
            steps_per_generation=updates,
            num_iterations=epochs,
            num_generations=8,
            max_completion_length=8,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            router_aux_loss_coef=0.0,
        ),
        objective=objective or presets.dapo(),
        train_dataset=TASK.prompts(1024, split="train", seed=seed),
        processing_class=tokenizer,
        signals=Signals(drift=False),
        **extra,
    )


def trained(seed: int, steps: int, replay: str | None, warmup: int, rows: int, name: str) -> dict[str, Any]:
    """k3, flips and the sampler's reward at the start and over the last fifth, with router noise of 2."""
    model, tokenizer = warmed(seed, warmup, name)
    folder = Path(tempfile.mkdtemp())
    run = RunFolder.create(folder / "run", config_text="benchmark: moe_mismatch\n")
    engine = partial(DisturbedEngine, disturbance=noise(2.0))
    with contextlib.redirect_stdout(io.StringIO()):
        trainer_of(
            model, tokenizer, folder, seed=seed, steps=steps, rows=rows, engine=engine, replay=replay, run=run
        ).train()
    table = [row.values for row in run.metrics().rows]
    last = table[-max(1, steps // 5) :]
    keys = {"k3": "mismatch/k3", "ess": "mismatch/ess_token", "reward": "train/reward", "flips": "routes/flip_share"}
    ends = {f"{name}_end": statistics.fmean(row[key] for row in last) for name, key in keys.items()}
    curve = {name: [row[key] for row in table] for name, key in keys.items()}
    return {"seed": seed, "replay": replay, "k3_start": table[0]["mismatch/k3"], **ends, "curve": curve}


# --- cost -----------------------------------------------------------------


def cpu_seconds(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def in_turn(arms: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Median over rounds of each arm's seconds over those of the first, which is timed twice."""
    first = next(iter(arms))
    arms = {**arms, "again": arms[first]}
    for timed in arms.values():
        timed()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds):
        names = list(arms)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(arms[name]())
    ratios = {n: statistics.median(t / b for t, b in zip(times[n], times[first], strict=True)) for n in arms}
    return {"seconds": statistics.median(times[first]), "ratios": {n: r for n, r in ratios.items() if n != first}}


def sampling_seconds(routes: bool) -> float:
    """CPU time of 64 completions of 32 tokens."""
    model, tokenizer = COST_MODEL.load(TASK, seed=0)
    texts = [*TASK.prompts(16, split="train")["prompt"]] * 4
    requests = [Request(prompt_ids=tokenizer(text)["input_ids"]) for text in texts]
    sampling = Sampling(max_new_tokens=32, seed=0, stop_ids=())
    engine = TransformersEngine(model, tokenizer, routes=routes)
    return cpu_seconds(partial(engine.generate, requests, sampling))


def training_seconds(replay: str | None) -> float:
    """CPU time of four steps of 64 completions."""
    model, tokenizer = COST_MODEL.load(TASK, seed=0)
    engine = partial(TransformersEngine, routes=replay is not None)
    folder = Path(tempfile.mkdtemp())
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = trainer_of(model, tokenizer, folder, seed=0, steps=4, engine=engine, replay=replay, rows=64)
        return cpu_seconds(trainer.train)


def cost(rounds: int) -> dict[str, Any]:
    sampling = {"plain": partial(sampling_seconds, False), "recording": partial(sampling_seconds, True)}
    training = {"plain": partial(training_seconds, None), "replay": partial(training_seconds, "R3")}
    found = {"sampling": in_turn(sampling, rounds), "four steps": in_turn(training, rounds)}
    own = moving(rounds, rows=64, tokens=14, layers=COST_MODEL.layers, top_k=2)
    share = own["seconds"] / (found["four steps"]["seconds"] / 4)
    million = moving(3, rows=500, tokens=2000, layers=48, top_k=8)
    return {**found, "moving": {"share of a step": share, "million tokens": million}}


def moving(rounds: int, *, rows: int, tokens: int, layers: int, top_k: int) -> dict[str, float]:
    """CPU time of what a batch does with its routes: padded for the old pass, the update and its signals, cut once."""
    experts = torch.randint(128, (tokens, layers, top_k), dtype=torch.uint8)
    travelling = [Routes(experts=experts.clone(), valid=torch.ones(tokens).bool()) for _ in range(rows)]
    mask = torch.ones(8, tokens)

    def move() -> None:
        for start in range(0, rows, 8):
            part = travelling[start : start + 8]
            for _ in range(3):
                batch = Routes.padded(part, mask[: len(part)])
            batch.rows(mask[: len(part)])

    megabytes = sum(routes.nbytes for routes in travelling) / 1e6
    return {"megabytes": megabytes, "seconds": statistics.median(cpu_seconds(move) for _ in range(rounds))}


# --- tables -----------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2g} ({min(values):.2g} to {max(values):.2g})"


def print_static(rows: Sequence[dict[str, Any]], console: Console) -> None:
    columns = ("model", "engine", "flipped pairs", "k3", "k3 with replay", "factor", "of all", "reached", "worst")
    table = Table(*columns, title="median (range) over seeds; factor of all seeds' samples together; shares of k3")
    for name, engine in dict.fromkeys((row["model"], row["engine"]) for row in rows):
        of = [row for row in rows if (row["model"], row["engine"]) == (name, engine)]
        without, replayed = [row["k3_native"] for row in of], [row["k3_replayed"] for row in of]
        table.add_row(
            name,
            engine,
            spread([row["flips_native"] for row in of]),
            spread(without),
            spread(replayed),
            spread([one / other for one, other in zip(without, replayed, strict=True)]),
            f"{sum(without) / sum(replayed):.2g}",
            *(f"{statistics.median(row[key] for row in of):.0%}" for key in ("on_reached", "on_worst")),
        )
    console.print(table)


def print_rl(rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(
        "replay", "k3 at step 1", "k3 at the end", "ESS", "sampler's reward", "flipped pairs", title="router noise 2"
    )
    for replay in (None, "R3"):
        of = [row for row in rows if row["replay"] == replay]
        keys = ("k3_start", "k3_end", "ess_end", "reward_end", "flips_end")
        table.add_row(str(replay), *(spread([row[key] for row in of]) for key in keys))
    console.print(table)


def print_cost(found: dict[str, Any], console: Console) -> None:
    table = Table("what", "CPU seconds", "ratio", "noise", title="cost")
    for what in ("sampling", "four steps"):
        result, ratios = found[what], found[what]["ratios"]
        (arm,) = set(ratios) - {"again"}
        table.add_row(f"{what}: {arm}", f"{result['seconds']:.3f}", f"{ratios[arm]:.3f}", f"{ratios['again']:.3f}")
    moved = found["moving"]["million tokens"]
    table.add_row(f"moving {moved['megabytes']:.0f} MB of routes", f"{moved['seconds']:.3f}", "", "")
    table.add_row("moving routes, share of such a step", "", f"{found['moving']['share of a step']:.4f}", "")
    console.print(table)


def draw(found: dict[str, Any], path: Path) -> None:
    """The k3 of every engine and seed without and with replay, and the course of training."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    static = [row for row in found["static"] if row["model"] == "gentle"]
    engines = list(dict.fromkeys(row["engine"] for row in static))
    for place, (key, label) in enumerate({"k3_native": "own choices", "k3_replayed": "routes replayed"}.items()):
        color = ("#c44e52", "#4c72b0")[place]
        for row in static:
            at = engines.index(row["engine"]) + 0.2 * (place - 0.5)
            left.plot(at, row[key], "o", color=color, markersize=4, alpha=0.7, label=label)
            label = "_"
    left.set(yscale="log", ylabel="k3, nats/token", title="One policy, every seed: trainer against engine")
    shorter = {"router's ": "router's\n", "all ": "all\n", " in ": "\nin ", "router noise ": "noise\n"}
    labels = engines
    for long, short in shorter.items():
        labels = [label.replace(long, short) for label in labels]
    left.set_xticks(range(len(engines)), labels)
    left.legend(frameon=False)
    for row in found["rl"]:
        color, label = ("#c44e52", "no replay") if row["replay"] is None else ("#4c72b0", 'replay="R3"')
        right.plot(row["curve"]["k3"], color=color, linewidth=1, label=label if row["seed"] == 0 else "_")
    right.set(yscale="log", xlabel="step", ylabel="mismatch/k3", title="Training with router noise 2")
    right.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["static", "rl", "cost"], default=["static", "rl", "cost"])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="the first trains too")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=256, help="completions per step of rl")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=300, help="steps of supervised warm-up")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="draw static and rl into this file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    console = Console(width=200)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "threads": 1, **versions}
    if "static" in given.parts:
        models = [(seed, name) for seed in range(given.seeds) for name in given.models]
        found["static"] = [row for seed, name in models for row in static(seed, given.prompts, given.warmup, name)]
        print_static(found["static"], console)
    if "rl" in given.parts:
        arms = [(seed, replay) for seed in range(given.seeds) for replay in (None, "R3")]
        sizes = {"steps": given.steps, "warmup": given.warmup, "rows": given.rows, "name": given.models[0]}
        found["rl"] = [trained(seed, replay=replay, **sizes) for seed, replay in arms]
        print_rl(found["rl"], console)
    if "cost" in given.parts:
        found["cost"] = cost(given.rounds)
        print_cost(found["cost"], console)
    if given.plot is not None:
        draw(found, given.plot)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
