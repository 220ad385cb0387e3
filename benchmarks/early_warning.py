"""Do the default rules warn before the harm, and are they quiet where there is none?

    python benchmarks/early_warning.py record FOLDER --set final                # makes the runs; goes on where it was
    python benchmarks/early_warning.py judge FOLDER [--json FILE] [--plot PICTURE]
    python benchmarks/early_warning.py recovery FOLDER [--json FILE]            # --set guarded beside the same without

The runs are those of `collapses`: one fault each, or none, and for each the harm that it does, fixed beforehand. The
monitor is shown the numbers of a run step by step, as it would have been, and nothing of the configuration. A harm is
warned of if an alarm of severity warning or worse opens before its step. A run with a fault and without its harm is a
stressed survivor. Beside the rules stand fixed thresholds, as they are copied from guide to guide. Rounds of the final
set that had been judged before the rules were last chosen are told from those that had not.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from collapses import FIRST_UNSEEN, MODES, SETS, Setting, described, record
from collapses._harms import LOSS, NORM, REWARD, Rows, column
from rich.console import Console
from rich.table import Table

from rlstab.monitors import Monitor
from rlstab.record import RunFolder
from rlstab.trainers._derived import Derived

RULES = "default rules"
HELD_OUT = "eval/pass@1"
DERIVED = ("law/", "forecast/", "drift/initial/surprise", "eval/reward_gap")


def crossing(key: str, holds: Callable[[np.ndarray], np.ndarray]) -> Callable[[Rows], int | None]:
    """The first step at which a fixed threshold on one signal is passed."""

    def first(rows: Rows) -> int | None:
        steps, values = column(rows, key)
        passed: Sequence[int] = np.flatnonzero(holds(values)).tolist() if len(values) else []
        return steps[passed[0]] if len(passed) else None

    return first


FIXED = {
    "KL to the start > 0.3": crossing("drift/initial/kl", lambda x: x > 0.3),
    "entropy < half its start": crossing("policy/entropy", lambda x: x < 0.5 * x[0]),
    "gradient norm > 5": crossing(NORM, lambda x: ~(x <= 5)),
    "reward 20 % below its best": crossing(REWARD, lambda x: x < 0.8 * np.maximum.accumulate(x)),
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one run, and the first step at which each way of watching spoke.

    Args:
        setting: the run.
        steps: optimizer steps that it has.
        onset: the first step with the fault.
        harm: the step at which the harm had happened, if it did.
        alarms: opened at severity warning or worse: step and cause.
        first: step of the first word, by way of watching.
    """

    setting: Setting
    steps: int
    onset: int
    harm: int | None
    alarms: Sequence[tuple[int, str]]
    first: Mapping[str, int | None]

    @property
    def control(self) -> bool:
        """Whether nothing was wrong with the run."""
        return MODES[self.setting.mode].control

    @property
    def counted(self) -> bool:
        """Whether there was a fault and time to warn of its harm."""
        return not self.control and not MODES[self.setting.mode].sudden

    def lead(self, watch: str) -> int | None:
        """Steps from the first word to the harm; None unless the word came first."""
        first = self.first[watch]
        return self.harm - first if self.harm is not None and first is not None and first < self.harm else None


def judge(folder: Path) -> Verdict:
    """Replay one run."""
    setting = described(folder)
    mode = MODES[setting.mode]
    rows = [(row.step, row.values) for row in RunFolder.open(folder).metrics().rows]
    harms = [] if mode.control else [harm(rows) for harm in mode.harms]
    training = [(step, values) for step, values in rows if REWARD in values or LOSS in values]
    monitor, derived, opened = Monitor(), Derived(), []
    for step, values in by_step(rows):
        follows = derived.examined(values) if HELD_OUT in values else derived.update(step, values, turn=step % 10 == 1)
        alarms = monitor.observe(step, {**values, **follows}).alarms
        opened += [(a.step, a.cause) for a in alarms if a.change == "opened" and a.severity != "note"]
    first = {RULES: opened[0][0] if opened else None, **{name: bound(training) for name, bound in FIXED.items()}}
    return Verdict(
        setting=setting,
        steps=len(training),
        onset=mode.faults[setting.strength].onset,
        harm=min((step for step in harms if step is not None), default=None),
        alarms=opened,
        first=first,
    )


def by_step(rows: Rows) -> Rows:
    """The measurements of each step in one, then its evaluation; what follows from them is left to be derived anew.

    So runs that were recorded before a signal was thought of are judged by it like those that came after.
    """
    found: dict[tuple[int, bool], dict[str, float]] = {}
    for step, values in rows:
        for key, value in values.items():
            if not key.startswith(DERIVED):
                found.setdefault((step, key.startswith("eval/")), {})[key] = value
    return [(step, found[step, evaluated]) for step, evaluated in sorted(found)]


def wilson(hits: int, runs: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    if not runs:
        return 0.0, 1.0
    z, p = 1.96, hits / runs
    centre, half = p + z * z / (2 * runs), z * math.sqrt(p * (1 - p) / runs + z * z / (4 * runs * runs))
    return max(0.0, (centre - half) / (1 + z * z / runs)), (centre + half) / (1 + z * z / runs)


def share(hits: int, runs: int) -> str:
    """A share with its 95 % interval, in words."""
    low, high = wilson(hits, runs)
    return f"{hits}/{runs} ({low:.2f}–{high:.2f})" if runs else "–"


def middle(values: Sequence[int]) -> str:
    """The median of whole steps, or nothing."""
    return f"{median(values):.0f}" if values else ""


def leads(verdicts: Sequence[Verdict], watch: str) -> list[int]:
    """The leads of the harms that were warned of."""
    return [lead for verdict in verdicts if (lead := verdict.lead(watch)) is not None]


def groups(verdicts: Sequence[Verdict]) -> tuple[list[Verdict], list[Verdict], list[Verdict]]:
    """Harmed runs, controls, and stressed survivors."""
    harmed = [v for v in verdicts if v.counted and v.harm is not None]
    return harmed, [v for v in verdicts if v.control], [v for v in verdicts if v.counted and v.harm is None]


def by_mode(verdicts: Sequence[Verdict]) -> Table:
    """A row for each failure mode, controls together."""
    table = Table("mode", "runs", "harmed", "warned before", "lead", "delay", "survivors", "flagged")
    for name in dict.fromkeys("controls" if v.control else v.setting.mode for v in verdicts):
        rows = [v for v in verdicts if name == ("controls" if v.control else v.setting.mode)]
        harmed, survived = [v for v in rows if v.harm is not None], [v for v in rows if v.harm is None]
        ahead = leads(harmed, RULES)
        delays = [first - v.onset for v in harmed if (first := v.first[RULES]) is not None]
        flagged = sum(v.first[RULES] is not None for v in survived)
        counts = (len(rows), len(harmed), len(ahead) if harmed else "")
        table.add_row(name, *map(str, counts), middle(ahead), middle(delays), str(len(survived)), str(flagged))
    return table


def by_watch(verdicts: Sequence[Verdict]) -> Table:
    """A row for each way of watching."""
    harmed, controls, survivors = groups(verdicts)
    table = Table("watch", "harms warned of before", "median lead", "controls flagged", "stressed survivors flagged")
    for name in (RULES, *FIXED):
        ahead = leads(harmed, name)
        flagged = [share(sum(v.first[name] is not None for v in group), len(group)) for group in (controls, survivors)]
        table.add_row(name, share(len(ahead), len(harmed)), middle(ahead), *flagged)
    return table


def summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The figures, for machines."""
    harmed, controls, survivors = groups(verdicts)
    alarms, steps = sum(len(v.alarms) for v in controls), sum(v.steps for v in controls)
    watches = {}
    for name in (RULES, *FIXED):
        ahead = leads(harmed, name)
        watches[name] = {
            "harms warned of before": [len(ahead), len(harmed), *np.round(wilson(len(ahead), len(harmed)), 3)],
            "median lead": median(ahead) if ahead else None,
            "controls flagged": _flagged(controls, name),
            "stressed survivors flagged": _flagged(survivors, name),
        }
    return {
        "watches": watches,
        "alarms per 1000 steps of the controls": [alarms, steps, round(1000 * alarms / max(steps, 1), 2)],
        "warned before, of harmed": by_sign(verdicts),
        "modes without an early sign": unannounced(verdicts),
    }


def _flagged(verdicts: Sequence[Verdict], watch: str) -> list[float]:
    hits = sum(v.first[watch] is not None for v in verdicts)
    return [hits, len(verdicts), *np.round(wilson(hits, len(verdicts)), 3)]


def by_sign(verdicts: Sequence[Verdict]) -> dict[str, list[int]]:
    """For each mode how many harms were warned of before, and how many there were."""
    harmed = [v for v in verdicts if v.harm is not None]
    of_mode = {
        mode: [v for v in harmed if v.setting.mode == mode] for mode in dict.fromkeys(v.setting.mode for v in harmed)
    }
    return {mode: [len(leads(runs, RULES)), len(runs)] for mode, runs in of_mode.items()}


def unannounced(verdicts: Sequence[Verdict]) -> list[str]:
    """Modes of which less than half of the harms are warned of before, those among them whose harm is sudden."""
    return [mode for mode, (warned, harmed) in by_sign(verdicts).items() if warned < harmed / 2]


def parts(verdicts: Sequence[Verdict]) -> dict[str, Sequence[Verdict]]:
    """The rounds that had not been judged when the rules were chosen, those that had, and all."""
    unseen = [v for v in verdicts if v.setting.seed >= FIRST_UNSEEN]
    earlier = [v for v in verdicts if v.setting.seed < FIRST_UNSEEN]
    return {"unseen rounds": unseen, "earlier rounds": earlier, "all": verdicts} if unseen else {"all": verdicts}


def _compact(verdict: Verdict) -> dict[str, Any]:
    kept = asdict(verdict)
    del kept["setting"]
    return {"run": verdict.setting.name, **kept}


def plot(verdicts: Sequence[Verdict], target: Path) -> None:
    """Draw the lead of every harm, by mode, and how the ways of watching compare."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    harmed, controls, survivors = groups(verdicts)
    modes = sorted({v.setting.mode for v in harmed}, reverse=True)
    for row, mode in enumerate(modes):
        runs = [v for v in harmed if v.setting.mode == mode]
        ahead = leads(runs, RULES)
        left.plot(ahead, row + _spread(len(ahead)), "o", color="#1f6f8b", markersize=6, alpha=0.75, markeredgewidth=0)
        missed = len(runs) - len(ahead)
        left.plot([-12] * missed, row + _spread(missed), "x", color="#c44e00", markersize=6)
    left.set_yticks(range(len(modes)), [mode.replace("_", " ") for mode in modes], fontsize=9)
    left.axvline(0, color="#8a929b", linewidth=1)
    left.set_xlabel("steps from the first warning to the harm (orange cross: no warning before)", fontsize=9)
    left.set_title(f"{len(harmed)} harmful runs: how early the default rules warn", fontsize=10, loc="left")
    _compare(right, harmed, controls, survivors)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors="#3c4450")
    figure.savefig(target)


def _spread(runs: int) -> np.ndarray:
    return np.linspace(-0.25, 0.25, runs) if runs > 1 else np.zeros(runs)


def _compare(axes: Any, *of: Sequence[Verdict]) -> None:
    """Shares with their intervals, for each way of watching."""
    harmed, controls, survivors = of
    kinds = (
        ("harms warned of before", "#1f6f8b", [len(leads(harmed, name)) for name in (RULES, *FIXED)], harmed),
        ("controls flagged", "#c44e00", _counts(controls), controls),
        ("stressed survivors flagged", "#e3b04b", _counts(survivors), survivors),
    )
    names = [RULES, *FIXED][::-1]
    for place, (label, colour, counts, runs) in enumerate(kinds):
        shares = np.array([hits / max(len(runs), 1) for hits in counts[::-1]])
        bounds = np.array([wilson(hits, len(runs)) for hits in counts[::-1]])
        errors = np.abs(bounds.T - shares)
        at = np.arange(len(names)) + 0.27 * (1 - place)
        axes.barh(at, shares, 0.24, color=colour, label=label)
        axes.errorbar(shares, at, xerr=errors, fmt="none", ecolor="#3c4450", elinewidth=0.9, capsize=2)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("share of the runs, with 95 % Wilson intervals", fontsize=9)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, frameon=False, columnspacing=1.0)


def _counts(verdicts: Sequence[Verdict]) -> list[int]:
    return [sum(v.first[name] is not None for v in verdicts) for name in (RULES, *FIXED)]


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """A run with the guard on, beside the same run without.

    Args:
        run: name of the run.
        alone: what the run ended with, as a share of the best of both: reward and held-out pass@1.
        guarded: the same with the guard.
        lost: steps of each rollback that were undone.
        stopped: whether the guard gave up and stopped the run.
    """

    run: str
    alone: tuple[float, float]
    guarded: tuple[float, float]
    lost: Sequence[int]
    stopped: bool


def recoveries(place: Path) -> Iterator[Recovery]:
    """Every guarded run of a folder that has its twin."""
    for folder in sorted(path.parent for path in place.glob("*-guarded-*/collapse.json")):
        twin = folder.with_name(folder.name.replace("-guarded", ""))
        if not (twin / "collapse.json").exists():
            continue
        events = RunFolder.open(folder).events()
        ends, bests = zip(_ends_and_bests(twin), _ends_and_bests(folder), strict=True)
        best = [max(*of_both, 1e-9) for of_both in zip(*bests, strict=True)]
        alone, guarded = ((end[0] / best[0], end[1] / best[1]) for end in ends)
        yield Recovery(
            run=twin.name,
            alone=alone,
            guarded=guarded,
            lost=[step - back for step, back in undone(folder)],
            stopped=bool(events.of("stopped")),
        )


def undone(folder: Path) -> list[tuple[int, int]]:
    """The rollbacks of a run: the step that had ended, and the one that it went back to."""
    backs = RunFolder.open(folder).events().of("rolled_back")
    return [(event.step or 0, int(str(event.fields["to"]))) for event in backs]


def _ends_and_bests(folder: Path) -> tuple[tuple[float, float], tuple[float, float]]:
    """Reward and held-out score of the last tenth of a run, and the best of each; steps that were undone are left out.

    The best reward is that of ten steps in a row. The last evaluation is of the policy that the run ends with.
    """
    metrics, backs = RunFolder.open(folder).metrics(), undone(folder)
    reward, skill = metrics.series(REWARD), metrics.series("eval/pass@1")
    kept = [
        value
        for step, value in zip(reward.steps, reward.values, strict=True)
        if not any(to < step <= end for end, to in backs)
    ] or [reward.values[0]]  # back at the start, whose samples the first step has rewarded
    means = np.convolve(kept, np.ones(10) / 10, "valid") if len(kept) >= 10 else np.array(kept)
    return (float(means[-20:].mean()), float(skill.values[-1])), (float(means.max()), float(skill.values.max()))


def recovery(place: Path, console: Console) -> dict[str, Any]:
    """Print what the guard made of collapsing runs."""
    found = list(recoveries(place))
    table = Table("run", "reward: end/best alone", "guarded", "held-out: alone", "guarded", "rollbacks, steps lost", "")
    for row in found:
        shares = (row.alone[0], row.guarded[0], row.alone[1], row.guarded[1])
        lost = ", ".join(map(str, row.lost))
        table.add_row(row.run, *(f"{value:.2f}" for value in shares), lost, "stopped" if row.stopped else "")
    console.print(table)
    figures: dict[str, Any] = {}
    for at, name in enumerate(("reward", "held-out pass@1")):
        for side, ends in (("alone", [row.alone for row in found]), ("guarded", [row.guarded for row in found])):
            kept = sum(end[at] >= 0.9 for end in ends)
            figures[f"{name} ends above the best − 10 %, {side}"] = share(kept, len(found))
    lost_steps = [steps for row in found for steps in row.lost]
    figures["rollbacks, and the median of the steps that each undid"] = [len(lost_steps), middle(lost_steps)]
    for name, figure in figures.items():
        console.print(f"{name}: {figure}")
    return {**figures, "runs": [asdict(row) for row in found]}


def dumped(figures: Mapping[str, Any]) -> str:
    """The figures as JSON, with a line for each run."""
    head = json.dumps({key: value for key, value in figures.items() if key != "runs"}, indent=1)
    runs = ",\n".join(f"  {json.dumps(run)}" for run in figures["runs"])
    return f'{head[:-2]},\n "runs": [\n{runs}\n ]\n}}\n'


def judgement(verdicts: Sequence[Verdict], console: Console) -> dict[str, Any]:
    """Print how the rules did, by rounds."""
    figures: dict[str, Any] = {}
    for name, part in parts(verdicts).items():
        figures[name] = found = summary(part)
        console.print(f"\n{name}", by_mode(part), by_watch(part), sep="\n")
        alarms, steps, rate = found["alarms per 1000 steps of the controls"]
        console.print(f"alarms per 1000 steps of the controls: {rate:.2f} ({alarms} in {steps})")
        console.print(f"modes without an early sign: {', '.join(found['modes without an early sign']) or 'none'}")
    return {**figures, "runs": [_compact(verdict) for verdict in verdicts]}


def make(place: Path, settings: Sequence[Setting], console: Console) -> None:
    """Make the runs of a set that are not there yet."""
    torch.set_num_threads(1)
    for setting in settings:
        folder = record(setting, MODES[setting.mode].faults[setting.strength], place)
        rewards = folder.metrics().series(REWARD).values
        console.print(f"{setting.name:45} reward {rewards[:10].mean():.2f} → {rewards[-10:].mean():.2f}")


def main() -> None:
    """Make runs, judge them, or compare guarded ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["record", "judge", "recovery"])
    parser.add_argument("folder", type=Path, help="holds the run folders")
    parser.add_argument("--set", choices=list(SETS), default="final")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--plot", type=Path, help="file for the picture")
    arguments = parser.parse_args()
    console = Console(width=130)
    if arguments.command == "record":
        make(arguments.folder, SETS[arguments.set], console)
        return
    if arguments.command == "recovery":
        figures = recovery(arguments.folder, console)
    else:
        folders = [path.parent for path in sorted(arguments.folder.glob("*/collapse.json"))]
        verdicts = [judge(folder) for folder in folders if not described(folder).guarded]
        figures = judgement(verdicts, console)
        if arguments.plot is not None:
            plot(next(iter(parts(verdicts).values())), arguments.plot)
    if arguments.json is not None:
        arguments.json.write_text(dumped(figures))


if __name__ == "__main__":
    main()
