"""Short seeded runs with one fault put in each, for `benchmarks/diagnosis.py`.

A run is the quick start's (`configs/quickstart.yaml`, shorter) with the changes of its fault.
"""

import json
import random
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback

from rlstab.errors import EngineError
from rlstab.recipes import PretrainedModel, Recipe, TinyModel, evaluate, read_recipe, warm_up
from rlstab.record import RunFolder
from rlstab.rollouts import Engine, Health, Request, Rollout, Sampling, TransformersEngine, WeightSource
from rlstab.tasks import EmbeddedTask
from rlstab.trainers import GRPOConfig, Periodically, StableGRPOTrainer

QUICKSTART = Path(__file__).resolve().parents[1] / "configs/quickstart.yaml"
STEPS, EVERY = 100, 20
MIDDLE = 30
COMMON = {
    "trainer.max_steps": STEPS,
    "trainer.per_device_train_batch_size": 128,
    "trainer.steps_per_generation": 1,
    "evaluation.samples": 16,
    "evaluation.ks": [1, 16],
    "evaluation.prompts": 100,
    "prompts": 2048,
    "signals.sync": False,  # it would stop a run with a faulty engine at once; other stacks have no such check
}
PLAIN = {"objective.terms.policy": {"class_path": "ClippedSurrogate", "init_args": {"low": 0.2, "high": 0.28}}}

Reward = Callable[..., list[float | None]]
Weights = Mapping[str, Tensor]


class Held(WeightSource):
    """Weights as they were when they were taken."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As in `WeightSource`."""
        yield from self._weights.items()


class Faulty(Engine):
    """A copy of the policy that samples with other weights, another distribution or another prompt than it should."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        lag: int = 0,
        every: int = 1,
        change: Callable[[str, Tensor], Tensor] | None = None,
        top_p: float = 1.0,
        prefix: Sequence[str] = (),
        routes: bool = False,
    ) -> None:
        self._inner = TransformersEngine(model, tokenizer, share=False, routes=routes)
        self._kept: deque[Weights] = deque(maxlen=lag + 1)
        self._every = every
        self._change = change
        self._top_p = top_p
        self._prefix = tuple(tokenizer.convert_tokens_to_ids(list(prefix)))
        self._version = 0

    id = property(lambda self: "faulty")
    shares_weights = property(lambda self: False)
    weight_version = property(lambda self: self._version)
    dtype = property(lambda self: self._inner.dtype)
    returns_routes = property(lambda self: self._inner.returns_routes)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """As in `Engine`."""
        asked = [Request(prompt_ids=(*self._prefix, *request.prompt_ids)) for request in requests]
        if self._top_p < 1:
            sampling = replace(sampling, top_p=self._top_p, truncation="renormalise")
        rollouts = self._inner.generate(asked, sampling)
        return [
            replace(rollout, prompt_ids=torch.tensor(request.prompt_ids), kept=None)
            for request, rollout in zip(requests, rollouts, strict=True)
        ]

    def score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """As in `Engine`."""
        return self._inner.score(sequences)

    def sync_weights(self, source: WeightSource, version: int) -> None:
        """As in `Engine`."""
        self._version = version
        if version % self._every == 0:
            change = self._change or (lambda name, tensor: tensor)
            self._kept.append({name: change(name, tensor).clone() for name, tensor in source.named_tensors()})
        self._inner.sync_weights(Held(self._kept[0]), version)

    def health(self) -> Health:
        """As in `Engine`."""
        return self._inner.health()

    def close(self) -> None:
        """As in `Engine`."""
        self._inner.close()


def quantised(name: str, weights: Tensor, *, bits: int) -> Tensor:
    """A matrix with a few levels per row; vectors as they are."""
    if weights.dim() < 2:
        return weights
    largest = 2 ** (bits - 1) - 1
    scale = weights.abs().amax(-1, keepdim=True) / largest
    rounded: Tensor = (weights / scale).round().clamp(-largest, largest) * scale
    return rounded


def other_routers(name: str, weights: Tensor) -> Tensor:
    """The weights of routers with noise of their own size, the same at every sync; others as they are."""
    if not name.endswith("mlp.gate.weight"):
        return weights
    noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
    return weights + weights.std() * noise.to(weights)


def longer_is_better(completions: Sequence[str], **columns: Any) -> list[float]:
    """A proxy that pays for length."""
    return [len(completion) / 6 for completion in completions]


class Dying:
    """A reward that returns 0 for everything once it is dead, as one whose service is down."""

    __name__ = "reward"

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self.dead = False

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float | None]:
        return [0.0] * len(completions) if self.dead else self._reward(completions=completions, **columns)


class Coin:
    """A reward that says nothing: the policy wanders, and only its reference could hold it."""

    __name__ = "coin"

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        return [float(self._rng.random() < 0.5) for _ in completions]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is done to a run: changes of the recipe, and what no recipe says."""

    cause: str | None
    changes: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] | None = None
    proxy: bool = False
    dead: bool = False
    coin: bool = False
    gradient: Callable[[int, Tensor], Tensor] | None = None
    activation: Callable[[int, Tensor], Tensor] | None = None


def every_tenth_times_hundred(step: int, gradient: Tensor) -> Tensor:
    return gradient * 100 if step >= MIDDLE and step % 10 == 0 else gradient


def nan_in_the_middle(step: int, values: Tensor) -> Tensor:
    return values * torch.nan if step == MIDDLE else values


COUNTDOWN = {
    "task": {"class_path": "Countdown", "init_args": {}},
    "trainer.max_completion_length": 12,
    "warmup.steps": 1000,
    "warmup.noise": 0.0,
}

MOVING = {
    "objective.terms": {
        "policy": PLAIN["objective.terms.policy"],
        "drift": {"class_path": "ReverseKL", "init_args": {"coef": 0.05, "reference": "moving"}},
    },
    "trainer.sync_ref_model": True,
    "trainer.ref_model_sync_steps": 4,
    "trainer.ref_model_mixup_alpha": 0.9,
}

EXPERTS = {"model.init_args.experts": 8}

FAULTS = {
    "healthy": Fault(cause=None),
    "healthy_two_updates": Fault(cause=None, changes={"trainer.steps_per_generation": 2}),
    "healthy_slow": Fault(cause=None, changes={"trainer.learning_rate": 2e-4}),
    "healthy_moving": Fault(cause=None, changes=MOVING),
    "healthy_experts": Fault(cause=None, changes=EXPERTS, engine={"routes": True}),
    "router": Fault(cause="router_drift", changes=PLAIN | EXPERTS, engine={"routes": True, "change": other_routers}),
    "staleness": Fault(cause="staleness", changes=PLAIN | {"trainer.learning_rate": 6e-4}, engine={"lag": 8}),
    "stale_weights": Fault(cause="stale_weights", changes=PLAIN, engine={"every": 10**6}),
    "engine_precision": Fault(
        cause="engine_precision",
        changes=PLAIN | {"trainer.learning_rate": 1.5e-3},
        engine={"change": partial(quantised, bits=3)},
    ),
    "truncated_sampling": Fault(cause="truncated_sampling", changes=PLAIN, engine={"top_p": 0.7}),
    "template": Fault(cause="template", changes=PLAIN, engine={"prefix": ("=", "0")}),
    "learning_rate": Fault(cause="learning_rate", changes=PLAIN | {"trainer.learning_rate": 4e-3}),
    "gradient_spike": Fault(
        cause="gradient_spike",
        changes=PLAIN | {"trainer.max_grad_norm": 1e9, "trainer.learning_rate": 1e-3},
        gradient=every_tenth_times_hundred,
    ),
    "entropy": Fault(cause="entropy_collapse", changes=PLAIN | {"prompts": 16, "trainer.learning_rate": 8e-4}),
    "diversity": Fault(
        cause="diversity_collapse", changes=PLAIN | COUNTDOWN | {"prompts": 32, "trainer.learning_rate": 3e-4}
    ),
    "length": Fault(cause="reward_hacking", changes=PLAIN | {"trainer.max_completion_length": 24}, proxy=True),
    "saturated": Fault(
        cause="saturated_data",
        changes=PLAIN | {"warmup.noise": 0.0, "warmup.steps": 600, "trainer.learning_rate": 1e-4},
    ),
    "too_hard": Fault(cause="too_hard_data", changes=PLAIN | {"warmup.steps": 12}),
    "nan_backward": Fault(cause="not_finite", changes=PLAIN, gradient=nan_in_the_middle),
    "nan_forward": Fault(cause="not_finite", changes=PLAIN, activation=nan_in_the_middle),
    "dead_reward": Fault(cause="dead_reward", changes=PLAIN, dead=True),
    "reference_drift": Fault(
        cause="reference_drift",
        changes=MOVING | {"trainer.learning_rate": 1e-3},
        coin=True,
    ),
}


def record(name: str, seed: int, place: Path, *, recipe: Path | None = None) -> RunFolder:
    """Run one fault once and return the folder; one that is there already is kept.

    Args:
        name: The fault.
        seed: The seed of everything.
        place: Where the run folder goes.
        recipe: Another recipe than that of the fault; what no recipe says stays as it is.
    """
    fault, output = FAULTS[name], place / f"{name}-{seed}"
    if (output / "trainer_state.json").exists():
        return RunFolder.open(output)
    shutil.rmtree(output, ignore_errors=True)
    changes = {**COMMON, **fault.changes} if recipe is None else {}
    settings = {**changes, "seed": seed, "output": str(output)}
    read = read_recipe(recipe or QUICKSTART, [(key, json.dumps(value)) for key, value in settings.items()])
    folder = RunFolder.create(output, config_text=read.text)
    trainer = _trainer(read.recipe, fault, folder, place)
    try:
        trainer.train()
        folder.append_event("finished", step=trainer.state.global_step)
    except EngineError as error:  # what a run with NaN in its weights ends with
        print(f"{name} ends at step {trainer.state.global_step}: {error}")
    trainer.state.save_to_json(str(output / "trainer_state.json"))
    return folder


def _trainer(recipe: Recipe, fault: Fault, folder: RunFolder, place: Path) -> StableGRPOTrainer:
    assert isinstance(recipe.task, EmbeddedTask)
    model, tokenizer = PretrainedModel(name=str(_warmed(recipe, place))).load(recipe.task, seed=recipe.seed)
    args = _arguments(recipe, folder)
    rewards = _rewards(recipe.task, fault, recipe.seed)
    trainer = StableGRPOTrainer(
        model,
        rewards,
        args,
        objective=recipe.objective,
        advantage=recipe.advantage,
        signals=recipe.signals,
        run=folder,
        engine=recipe.engine if fault.engine is None else partial(Faulty, **fault.engine),
        replay=recipe.replay,
        train_dataset=recipe.task.prompts(recipe.prompts, split="train", seed=recipe.seed),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    _break(trainer, fault, rewards)
    held_out = recipe.task.prompts(recipe.evaluation.prompts, split="test", seed=recipe.seed)

    def examine(step: int) -> None:
        result = evaluate(
            model, tokenizer, recipe.task, held_out, samples=16, ks=(1, 16), max_new_tokens=args.max_completion_length
        )
        values = {f"eval/pass@{k}": estimate for k, estimate in result.pass_at.items()} | {"eval/reward": result.reward}
        folder.append_metrics(step, {key: value.mean for key, value in values.items()})
        folder.append_metrics(step, {f"{key}_se": value.se for key, value in values.items()})

    examine(0)
    trainer.add_callback(Periodically(EVERY, examine))
    return trainer


def _rewards(task: EmbeddedTask, fault: Fault, seed: int) -> list[Any]:
    if fault.coin:
        return [Coin(seed)]
    first = Dying(task.reward) if fault.dead else task.reward
    return [first, longer_is_better] if fault.proxy else [first]


def _arguments(recipe: Recipe, folder: RunFolder) -> GRPOConfig:
    own = {
        "output_dir": str(folder.path / "checkpoints"),
        "seed": recipe.seed,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
    }
    return GRPOConfig(**{**recipe.trainer, **own})


def _warmed(recipe: Recipe, place: Path) -> Path:
    """The warmed-up model of a recipe, made once."""
    assert isinstance(recipe.model, TinyModel)
    assert isinstance(recipe.task, EmbeddedTask)
    assert recipe.warmup is not None
    warmth = recipe.warmup
    kind = f"{recipe.task.name}-{recipe.model.experts}-{warmth.steps}-{warmth.noise}-{recipe.seed}"
    kept = place / "initial" / kind
    if not kept.exists():
        model, tokenizer = recipe.model.load(recipe.task, seed=recipe.seed)
        warm_up(model, tokenizer, recipe.task, warmth, seed=recipe.seed)
        model.save_pretrained(kept)
        tokenizer.save_pretrained(kept)
    return kept


def _break(trainer: StableGRPOTrainer, fault: Fault, rewards: Sequence[Any]) -> None:
    """Put the fault into the rewards, the gradients, or the activations of the second block while it trains."""
    if fault.dead:
        trainer.add_callback(Periodically(MIDDLE, lambda step: setattr(rewards[0], "dead", True)))
    if fault.gradient is not None:
        for parameter in trainer.model.parameters():
            parameter.register_hook(partial(_at_step, trainer, fault.gradient))
    if fault.activation is not None:
        layer: nn.Module = trainer.model.get_submodule("model.layers.1.mlp")
        layer.register_forward_hook(partial(_in_training, trainer, fault.activation))


def _at_step(trainer: StableGRPOTrainer, change: Callable[[int, Tensor], Tensor], values: Tensor) -> Tensor:
    return change(trainer.state.global_step + 1, values)


def _in_training(
    trainer: StableGRPOTrainer, change: Callable[[int, Tensor], Tensor], layer: nn.Module, _: Any, output: Tensor
) -> Tensor:
    return change(trainer.state.global_step + 1, output) if torch.is_grad_enabled() else output
