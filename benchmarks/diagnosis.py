"""Does the diagnosis name the cause? The runs of `collapses`, one fault each, are diagnosed from what they leave.

    python benchmarks/early_warning.py record FOLDER --set final
    python benchmarks/diagnosis.py score FOLDER [--json FILE]
    python benchmarks/diagnosis.py repair FOLDER [--only RUN ...] [--json FILE]  # again, with the changes that it gives
    python benchmarks/diagnosis.py keep FOLDER TARGET --only RUN ...  # what the tests read: one table a run
    python benchmarks/diagnosis.py plot PICTURE           # of what was kept, for the documentation

The diagnosis reads the metrics and events that a run leaves, and nothing of the fault; where the configuration is part
of the evidence, it is the recipe's, which says nothing of a fault in the engine, the rewards or the gradient. Scored
are the runs that were harmed, and the controls; what came through a fault unharmed is listed apart.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from collapses import MODES, described, record
from early_warning import judge, wilson

from rlstab.record import Run, diagnosis_of, read_run
from rlstab.report import write_fix

HOSTS = ("train/", "completions/", "rewards/", "clip_ratio/")


def host_only(run: Run) -> Run:
    """What the same run leaves without rlstab: the log of the host."""
    rows = [
        replace(row, values={key: value for key, value in row.values.items() if key.startswith(HOSTS)})
        for row in run.metrics.rows
    ]
    return Run(name=run.name, source="trainer_state.json", metrics=replace(run.metrics, rows=tuple(rows)))


def runs(place: Path, only: Sequence[str] = ()) -> Iterator[Path]:
    """The folders of the runs without a guard, or of those named."""
    folders = [path.parent for path in sorted(place.glob("*/collapse.json"))]
    yield from (folder for folder in folders if not described(folder).guarded and (not only or folder.name in only))


def score(place: Path) -> dict[str, Any]:
    """Which cause is named first, by the one that was put in; on the whole run folder and on the host's log."""
    tables: dict[str, dict[str, dict[str, dict[str, int]]]] = {
        source: {"harmed": {}, "unharmed": {}} for source in ("run folder", "host's log")
    }
    for folder in runs(place):
        mode, verdict = MODES[described(folder).mode], judge(folder)
        group = "harmed" if verdict.harm is not None or mode.control else "unharmed"
        read = {"run folder": read_run(folder), "host's log": host_only(read_run(folder / "trainer_state.json"))}
        for source, run in read.items():
            claims = diagnosis_of(run).claims
            named = claims[0].name if claims else "none"
            row = tables[source][group].setdefault(mode.cause or "none", {})
            row[named] = row.get(named, 0) + 1
    return {
        source: {
            "confusion": table["harmed"],
            **_shares(table["harmed"]),
            "survivors of a fault, and what is named": table["unharmed"],
        }
        for source, table in tables.items()
    }


def _shares(rows: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    faulty = {cause: row for cause, row in rows.items() if cause != "none"}
    right = sum(row.get(cause, 0) for cause, row in faulty.items())
    known = sum(sum(row.values()) for row in faulty.values())
    well, all_well = rows.get("none", {}).get("none", 0), sum(rows.get("none", {}).values())
    return {
        "named first and right": [right, known, *_rounded(right, known)],
        "healthy, and none named": [well, all_well, *_rounded(well, all_well)],
    }


def _rounded(hits: int, number: int) -> tuple[float, float]:
    low, high = wilson(hits, number)
    return round(low, 3), round(high, 3)


KEPT = (
    "train/reward", "train/reward_std", "train/frac_reward_zero_std", "train/grad_norm", "train/learning_rate",
    "policy/entropy", "objective/loss", "objective/policy/loss", "objective/drift/loss", "completions/mean_length",
    "completions/clipped_ratio", "mismatch/k1", "mismatch/k3", "mismatch/f2", "mismatch/max_abs", "mismatch/ess_token",
    "mismatch/bucket/0.01-0.1/mean_abs", "mismatch/bucket/0.5-1/mean_abs",
    "mismatch/bucket/0.01-0.1/share", "mismatch/bucket/0.1-0.5/share",
    "drift/initial/kl", "drift/moving/kl", "routes/own_flip_share", "routes/flip_share", "routes/k3_flipped",
    "routes/k3_agreeing", "rewards/reward/mean", "rewards/longer_is_better/mean",
    "eval/pass@1", "eval/pass@1_se", "eval/pass@8", "eval/pass@8_se", "eval/reward", "eval/reward_se",
)  # fmt: skip


def keep(folder: Path, target: Path) -> None:
    """Write a run as a table of four digits, under the name of its mode, with its recipe beside it."""
    target.mkdir(parents=True, exist_ok=True)
    run, name = read_run(folder), described(folder).mode
    keys = [key for key in KEPT if run.has(key)]
    lines = [["step", *keys]]
    for row in run.metrics.rows:
        lines.append([str(row.step), *(f"{row.values[key]:.4g}" if key in row.values else "" for key in keys)])
    (target / f"{name}.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    recipe = "".join(line for line in run.config.splitlines(True) if not line.startswith("output:"))
    (target / f"{name}.yaml").write_text(recipe)


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A harmed run, and the same run again with the changes that its diagnosis gives.

    Args:
        run: name of the run.
        cause: what was named first.
        changes: of the recipe, as `key: value`; none where no setting repairs it.
        harm: the step of its harm, before and after.
        state: what the diagnosis says of it, before and after.
    """

    run: str
    cause: str
    changes: Sequence[str]
    harm: tuple[int | None, int | None]
    state: tuple[str, str]

    @property
    def heals(self) -> bool:
        """Whether the second run did no harm and has not collapsed."""
        return self.harm[1] is None and self.state[1] != "collapsed"


def repair(folder: Path, place: Path) -> Repair | None:
    """Run a harmed run again with the changes that its diagnosis gives; None if it was not harmed, or has no cause."""
    broken, harm = read_run(folder), judge(folder).harm
    diagnosis = diagnosis_of(broken)
    if (diagnosis.state != "collapsed" and harm is None) or not diagnosis.claims:
        return None
    recipe = place / f"{folder.name}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.unlink(missing_ok=True)
    changes = write_fix(broken, diagnosis, recipe)
    after: tuple[int | None, str] = harm, diagnosis.state
    if changes:
        setting = described(folder)
        again = record(setting, MODES[setting.mode].faults[setting.strength], place, recipe=recipe)
        after = judge(again.path).harm, diagnosis_of(Run.of(again)).state
    cause = diagnosis.claims[0].name
    return Repair(
        run=folder.name, cause=cause, changes=changes, harm=(harm, after[0]), state=(diagnosis.state, after[1])
    )


def repairs(folders: Iterable[Path], place: Path) -> dict[str, Any]:
    """What became of harmed runs, for machines, each printed as it is known."""
    found: list[Repair] = []
    for folder in folders:
        one = repair(folder, place)
        if one is not None:
            found.append(one)
            print(f"{one.run:40} {'healed' if one.heals else 'not healed'} {asdict(one)}", flush=True)
    healed, tried = sum(one.heals for one in found), sum(bool(one.changes) for one in found)
    return {
        "healed by the changes of the first cause": [healed, tried, *_rounded(healed, tried)],
        "runs": [{**asdict(one), "heals": one.heals} for one in found],
    }


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
    """Score, repair, keep, or plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["score", "repair", "keep", "plot"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", type=Path, nargs="?", default=Path("tests/monitors/recorded"))
    parser.add_argument("--only", nargs="*", default=[], help="names of run folders")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.command == "plot":
        plot(chosen.folder)
    elif chosen.command == "keep":
        for folder in runs(chosen.folder, chosen.only):
            keep(folder, chosen.target)
    else:
        if chosen.command == "score":
            figures = score(chosen.folder)
            print(json.dumps(figures, indent=1))
        else:
            figures = repairs(runs(chosen.folder, chosen.only), chosen.folder / "fixed")
        if chosen.json is not None:
            chosen.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
