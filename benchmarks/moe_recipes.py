"""R3, R2 and RSPO beside GRPO and GSPO: one mixture of experts, one task, in two settings.

    python benchmarks/moe_recipes.py --json FILE [--settings noisy stale] [--seeds N] [--steps N] [--plot FILE]

A tiny model (2 layers) is warmed up to sort six digits. `noisy`: 8 experts, 2 per token; the engine's routers sample
with noise on their logits, so that engine and trainer run other experts for most tokens; every batch makes four
updates. `stale`: 32 experts, 4 per token; the engine samples with the trainer's own routers, and every batch makes 32
updates (eight parts, four times each), in the course of which the trainer's routers move away from those that sampled:
this is what R2 and RSPO are for. RSPO without the router shift is GMPO, so that stands beside it. Runs that FILE holds
are not run again: a benchmark that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from moe_mismatch import TASK, DisturbedEngine, noise, spread, trainer_of
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from rlstab.losses import Objective, presets
from rlstab.models import tiny_moe, tiny_tokenizer
from rlstab.recipes import WarmUp, evaluate, warm_up
from rlstab.record import RunFolder
from rlstab.rollouts import TransformersEngine
from rlstab.trainers import Replay

COLORS = ("#c44e52", "#dd8452", "#4c72b0", "#55a868", "#8172b3")
CURVES = {
    "reward": "train/reward",
    "k3": "mismatch/k3",
    "flips": "routes/flip_share",
    "own_flips": "routes/own_flip_share",
    "shift": "routes/shift",
    "shift_p10": "routes/shift_p10",
    "shift_floored": "routes/shift_floored",
    "clipped": "objective/policy/clip_region",
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method: its objective, and whose routes it replays."""

    objective: Callable[[], Objective]
    replay: Replay | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What makes engine and trainer run other experts: the model, its engine, and `updates` a batch, `epochs` times."""

    engine: Callable[..., Any]
    experts: int
    top_k: int
    updates: int
    epochs: int
    learning_rate: float
    arms: dict[str, Arm]


PLAIN = {"GRPO": Arm(objective=presets.grpo), "GSPO": Arm(objective=presets.gspo)}
R3 = {"GRPO + R3": Arm(objective=presets.grpo, replay="R3"), "GSPO + R3": Arm(objective=presets.gspo, replay="R3")}
SHIFT = {
    "GRPO + R2": Arm(objective=presets.grpo, replay="R2"),
    "GMPO": Arm(objective=presets.gmpo),
    "RSPO": Arm(objective=presets.rspo),
}
SETTINGS = {
    "noisy": Setting(
        engine=partial(DisturbedEngine, disturbance=noise(2.0)),
        experts=8,
        top_k=2,
        updates=4,
        epochs=1,
        learning_rate=1e-3,
        arms=PLAIN | R3,
    ),
    "stale": Setting(
        engine=partial(TransformersEngine, routes=True),
        experts=32,
        top_k=4,
        updates=8,
        epochs=4,
        learning_rate=1e-3,
        arms=PLAIN | SHIFT,
    ),
}


@cache
def warm(seed: int, steps: int, experts: int, top_k: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that has seen demonstrations of which 70 % have one wrong digit."""
    tokenizer = tiny_tokenizer(TASK.alphabet)
    model = tiny_moe(tokenizer, experts=experts, experts_per_token=top_k, seed=seed)
    warm_up(model, tokenizer, TASK, WarmUp(steps=steps), seed=seed)
    return model, tokenizer


def trained(setting: Setting, arm: Arm, *, seed: int, steps: int, rows: int, warmup: int) -> dict[str, Any]:
    """The curves of one run, and what its weights are worth on held-out prompts with undisturbed routers."""
    model, tokenizer = copy.deepcopy(warm(seed, warmup, setting.experts, setting.top_k))
    folder = Path(tempfile.mkdtemp())
    run = RunFolder.create(folder / "run", config_text="benchmark: moe_recipes\n")
    with contextlib.redirect_stdout(io.StringIO()):
        trainer_of(
            model,
            tokenizer,
            folder,
            seed=seed,
            steps=steps,
            rows=rows,
            updates=setting.updates,
            epochs=setting.epochs,
            learning_rate=setting.learning_rate,
            objective=arm.objective(),
            engine=setting.engine,
            replay=arm.replay,
            run=run,
        ).train()
    table = [row.values for row in run.metrics().rows]
    held_out = TASK.prompts(200, split="test")
    score = evaluate(model, tokenizer, TASK, held_out, samples=4, ks=(1,), max_new_tokens=8)
    curves = {name: [round(row[key], 6) for row in table if key in row] for name, key in CURVES.items()}
    return {"pass_at_1": score.pass_at[1].mean, "curves": curves}


def ends(row: dict[str, Any]) -> dict[str, float]:
    """Means over the last fifth of a run."""
    return {name: statistics.fmean(curve[-max(1, len(curve) // 5) :]) for name, curve in row["curves"].items() if curve}


COLUMNS = {
    "reward": "reward of the samples",
    "k3": "k3",
    "flips": "flipped pairs",
    "own_flips": "own choice flipped",
    "clipped": "clipped",
    "shift": "shift, mean",
    "shift_p10": "p10",
    "shift_floored": "below 0.8",
}


def print_setting(name: str, rows: Sequence[dict[str, Any]], console: Console) -> None:
    """A row for each arm, over seeds."""
    title = f"{name}: median (range) over seeds, last fifth of the updates"
    table = Table("method", "pass@1 of the trainer", *COLUMNS.values(), title=title)
    for arm in SETTINGS[name].arms:
        of = [row for row in rows if row["setting"] == name and row["arm"] == arm]
        if of:
            last = [ends(row) for row in of]
            columns = [[end[key] for end in last if key in end] for key in COLUMNS]
            table.add_row(arm, spread([row["pass_at_1"] for row in of]), *(spread(c) if c else "" for c in columns))
    console.print(table)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Reward and k3 of every run, a column for each setting."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    names = [name for name in SETTINGS if any(row["setting"] == name for row in rows)]
    figure, axes = plt.subplots(2, len(names), figsize=(5 * len(names), 6), layout="constrained", squeeze=False)
    for column, name in enumerate(names):
        for color, arm in zip(COLORS, SETTINGS[name].arms, strict=False):
            of = [row for row in rows if row["setting"] == name and row["arm"] == arm]
            for line, (axis, key) in enumerate(zip(axes[:, column], ("reward", "k3"), strict=True)):
                for place, row in enumerate(of):
                    label = arm if not line and not place else "_"
                    axis.plot(smooth(row["curves"][key]), color=color, linewidth=1, alpha=0.8, label=label)
        axes[0, column].set(title=name, ylabel="reward of the samples")
        axes[1, column].set(yscale="log", xlabel="update", ylabel="mismatch/k3, nats/token")
        axes[0, column].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)


def smooth(curve: Sequence[float], width: int = 8) -> list[float]:
    """Means over the last few values."""
    return [statistics.fmean(curve[max(0, at - width + 1) : at + 1]) for at in range(len(curve))]


def keep(found: dict[str, Any], path: Path) -> None:
    """Write the file whole or not at all."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(found) + "\n")
    beside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", help="only these methods")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--rows", type=int, default=64, help="completions per update")
    parser.add_argument("--warmup", type=int, default=300, help="steps of supervised warm-up")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="draw all runs into this file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    found: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": 1,
        "torch": torch.__version__,
        "runs": [],
    }
    if given.json.exists():
        found = json.loads(given.json.read_text())
    sizes = {"steps": given.steps, "rows": given.rows, "warmup": given.warmup}
    done = {(row["setting"], row["arm"], row["seed"]) for row in found["runs"]}
    for seed in range(given.seeds):
        for name in given.settings:
            for arm in given.arms or SETTINGS[name].arms:
                if (name, arm, seed) not in done:
                    row = trained(SETTINGS[name], SETTINGS[name].arms[arm], seed=seed, **sizes)
                    found["runs"].append({"setting": name, "arm": arm, "seed": seed, **sizes, **row})
                    keep(found, given.json)
    for name in given.settings:
        print_setting(name, found["runs"], Console(width=220))
    if given.plot is not None:
        draw(found["runs"], given.plot)


if __name__ == "__main__":
    main()
