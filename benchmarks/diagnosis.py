"""Does the diagnosis name the cause? Short seeded runs, each with one fault put in, are recorded and then diagnosed.

    python benchmarks/diagnosis.py record FOLDER [--only FAULT ...] [--seeds 0 1 ...]
    python benchmarks/diagnosis.py repair FOLDER [--only FAULT ...] [--seeds 0 1 ...]
    python benchmarks/diagnosis.py score FOLDER [--seeds 2 3 ...] [--json FILE]
    python benchmarks/diagnosis.py keep FOLDER TARGET     # what the tests read: few digits, one table a run
    python benchmarks/diagnosis.py plot PICTURE           # of what was kept, for the documentation

A run is the quick start's (`configs/quickstart.yaml`, shorter) with the changes of its fault. The diagnosis reads the
metrics and events that such a run leaves, and nothing of this file; where the configuration is part of the evidence, it
is the recipe's, which says nothing of a fault in the engine, the rewards or the gradient.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from faults import FAULTS, record

from rlstab.record import Run, read_run
from rlstab.report import explain, write_fix


def host_only(run: Run) -> Run:
    """What the same run leaves without rlstab: the log of the host."""
    ours = ("mismatch/", "objective/", "policy/", "drift/", "eval/")
    rows = [
        replace(row, values={key: value for key, value in row.values.items() if not key.startswith(ours)})
        for row in run.metrics.rows
    ]
    return Run(name=run.name, source="trainer_state.json", metrics=replace(run.metrics, rows=tuple(rows)))


def score(place: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Which cause is named first, by the fault that was put in; on the whole run folder and on the host's log."""
    table: dict[str, dict[str, dict[str, int]]] = {"run folder": {}, "host's log": {}}
    for folder in sorted(place.glob("*/trainer_state.json")):
        name, _, seed = folder.parent.name.rpartition("-")
        if name not in FAULTS or int(seed) not in seeds:
            continue
        runs = {"run folder": read_run(folder.parent), "host's log": host_only(read_run(folder))}
        for source, run in runs.items():
            claims = explain(run).claims
            named = claims[0].name if claims else "none"
            row = table[source].setdefault(FAULTS[name].cause or "none", {})
            row[named] = row.get(named, 0) + 1
    return {source: {"confusion": rows, **_shares(rows)} for source, rows in table.items()}


def _shares(rows: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    faulty = {cause: row for cause, row in rows.items() if cause != "none"}
    right, all_ = (
        sum(row.get(cause, 0) for cause, row in faulty.items()),
        sum(sum(row.values()) for row in faulty.values()),
    )
    well = rows.get("none", {})
    return {
        "named first and right": [right, all_, *_wilson(right, all_)],
        "healthy, and none named": [
            well.get("none", 0),
            sum(well.values()),
            *_wilson(well.get("none", 0), sum(well.values())),
        ],
    }


def _wilson(hits: int, number: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share."""
    if number == 0:
        return 0.0, 1.0
    middle = (hits + z**2 / 2) / (number + z**2)
    half = z / (number + z**2) * (hits * (number - hits) / number + z**2 / 4) ** 0.5
    return round(middle - half, 3), round(middle + half, 3)


KEPT = (
    "train/reward", "train/reward_std", "train/frac_reward_zero_std", "train/grad_norm", "train/learning_rate",
    "policy/entropy", "objective/loss", "objective/policy/loss", "objective/drift/loss", "completions/mean_length",
    "completions/clipped_ratio", "mismatch/k1", "mismatch/k3", "mismatch/f2", "mismatch/max_abs", "mismatch/ess_token",
    "drift/initial/kl", "drift/moving/kl", "routes/own_flip_share", "routes/flip_share", "routes/k3_flipped",
    "routes/k3_agreeing", "rewards/reward/mean", "rewards/longer_is_better/mean",
    "eval/pass@1", "eval/pass@1_se", "eval/pass@16", "eval/pass@16_se", "eval/reward", "eval/reward_se",
)  # fmt: skip


def keep(place: Path, target: Path, seed: int) -> None:
    """Write each run of a seed as a table of four digits, with its recipe beside it."""
    target.mkdir(parents=True, exist_ok=True)
    for name in FAULTS:
        run = read_run(place / f"{name}-{seed}")
        keys = [key for key in KEPT if run.has(key)]
        lines = [["step", *keys]]
        for row in run.metrics.rows:
            lines.append([str(row.step), *(f"{row.values[key]:.4g}" if key in row.values else "" for key in keys)])
        (target / f"{name}.csv").write_text("".join(",".join(line) + "\n" for line in lines))
        recipe = "".join(line for line in run.config.splitlines(True) if not line.startswith("output:"))
        (target / f"{name}.yaml").write_text(recipe)


def repair(place: Path, name: str, seed: int) -> str:
    """Run a collapsed run again with the changes that its diagnosis gives, and say what became of it."""
    broken = read_run(place / f"{name}-{seed}")
    diagnosis = explain(broken)
    recipe = place / f"{name}-{seed}.fixed.yaml"
    recipe.unlink(missing_ok=True)
    if diagnosis.state != "collapsed":
        return f"{diagnosis.state}, nothing to repair"
    changes = write_fix(broken, diagnosis, recipe)
    if not changes:
        return f"{diagnosis.claims[0].name}: no setting repairs it"
    again = explain(Run.of(record(name, seed, place / "fixed", recipe=recipe)))
    return f"{diagnosis.claims[0].name} → {again.state}: {'; '.join(changes)}"


PANELS = (
    ("healthy", "healthy: entropy falls, too", "policy/entropy"),
    ("staleness", "sampler 8 updates behind: k3 from 0 to a plateau", "mismatch/k3"),
    ("stale_weights", "weights never arrive: k1 grows on and on", "mismatch/k1"),
    ("truncated_sampling", "top-p 0.7: k1 far above k3, from step 1", "mismatch/k1"),
    ("learning_rate", "learning rate 4e-3: entropy jumps", "policy/entropy"),
    ("gradient_spike", "spikes without a clip", "train/grad_norm"),
    ("entropy", "16 prompts: learned by heart (dots: held-out)", "policy/entropy"),
    ("length", "paid for length", "completions/mean_length"),
    ("dead_reward", "reward function dies: no gradient", "train/grad_norm"),
)


def plot(target: Path) -> None:
    """Draw the recorded runs of the tests: the reward, and beside it what gives the cause away."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), dpi=110, layout="constrained")
    for axes, (name, title, key) in zip(figure.subplots(3, 3).flat, PANELS, strict=True):
        metrics = read_run(Path("tests/monitors/recorded") / f"{name}.csv").metrics
        reward, tell, held_out = (metrics.series(wanted) for wanted in ("train/reward", key, "eval/pass@1"))
        axes.plot(*reward, color="#8a929b", linewidth=1.2)
        axes.plot(*held_out, "o", color="#8a929b", markersize=4)
        axes.set_title(title, fontsize=10, loc="left")
        axes.tick_params(labelsize=8, colors="#5c6570")
        other = axes.twinx()
        other.plot(*tell, color="#c44e00", linewidth=1.4)
        other.set_ylabel(key, fontsize=8, color="#c44e00")
        other.tick_params(labelsize=8, colors="#c44e00")
    figure.supxlabel("optimizer step (grey: reward; orange: the signal that gives the cause away)", fontsize=9)
    figure.savefig(target)


def main() -> None:
    """Record, repair, score, keep, or plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["record", "repair", "score", "keep", "plot"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", type=Path, nargs="?", default=Path("tests/monitors/recorded"))
    parser.add_argument("--only", nargs="*", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.command == "plot":
        plot(chosen.folder)
    elif chosen.command == "keep":
        keep(chosen.folder, chosen.target, chosen.seeds[0])
    elif chosen.command == "score":
        found = json.dumps(score(chosen.folder, chosen.seeds), indent=1)
        print(found)
        if chosen.json is not None:
            chosen.json.write_text(found + "\n")
    elif chosen.command == "repair":
        for seed in chosen.seeds:
            for name in chosen.only:
                print(f"{name:20} seed {seed}  {repair(chosen.folder, name, seed)}", flush=True)
    else:
        for seed in chosen.seeds:
            for name in chosen.only:
                rewards = record(name, seed, chosen.folder).metrics().series("train/reward").values
                print(f"{name:20} seed {seed}  reward {rewards[:5].mean():.2f} → {rewards[-5:].mean():.2f}", flush=True)


if __name__ == "__main__":
    main()
