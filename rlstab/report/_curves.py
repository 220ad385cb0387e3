"""Which curves a page shows, and what is marked on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from rlstab.monitors import Diagnosis
from rlstab.record import Run, Series, numbers
from rlstab.report._chart import Line, Mark, chart, legend

MARKS = 24
ALARMS = {"alarm", "rolled_back", "stopped", "step_skipped", "scaled", "not_finite", "non_finite", "resume"}


class Curves(NamedTuple):
    """A chart of the page: title, what it shows, its signals with their names, and how its heights run."""

    title: str
    shows: str
    signals: tuple[tuple[str, str], ...]
    log: bool = False
    zero: bool = False


CURVES = (
    Curves(
        "Reward",
        "mean of the sampled completions; dots: held-out, ± 2 standard errors",
        (("train/reward", "training"), ("eval/reward", "held-out"), ("eval/pass@1", "held-out pass@1")),
    ),
    Curves(
        "Drift",
        "exact KL to the references, nats/token",
        (("drift/initial/kl", "to the start"), ("drift/moving/kl", "to moving"), ("train/kl", "to the reference (k3)")),
        zero=True,
    ),
    Curves(
        "Trainer against sampler",
        "nats/token; k1 and k3 estimate the KL, |Δ| is the largest difference of one token",
        (
            ("mismatch/k1", "|k1|"),
            ("mismatch/k3", "k3"),
            ("mismatch/max_abs", "largest |Δ|"),
            ("sampling/sampling_logp_difference/mean", "mean |Δ| (host)"),
        ),
        log=True,
    ),
    Curves(
        "Trainer against sampler, by probability",
        "mean |Δ| of the tokens to which the sampler gave such a probability, nats",
        tuple((f"mismatch/bucket/{name}/mean_abs", name) for name in ("0-0.001", "0.01-0.1", "0.1-0.5", "0.5-1")),
        log=True,
    ),
    Curves(
        "Importance weights",
        "share of the samples that weighting leaves effective; share of the tokens with a ratio outside [1/2, 2]",
        (
            ("mismatch/ess_token", "effective, tokens"),
            ("mismatch/ess_sequence", "effective, sequences"),
            ("mismatch/f2", "ratio outside [1/2, 2]"),
        ),
        zero=True,
    ),
    Curves(
        "Entropy",
        "of the policy at the sampled tokens, nats/token",
        (("policy/entropy", "policy"), ("train/entropy", "policy (host)"), ("eval/entropy", "held-out")),
        zero=True,
    ),
    Curves("Gradient norm", "before clipping", (("train/grad_norm", "norm"),), log=True),
    Curves(
        "Shares",
        "of groups without a signal, of completions that were cut, of tokens that a clip stops",
        (
            ("train/frac_reward_zero_std", "groups of equal reward"),
            ("completions/clipped_ratio", "cut completions"),
            ("policy/clip_fraction_low", "clipped below"),
            ("policy/clip_fraction_high", "clipped above"),
        ),
        zero=True,
    ),
    Curves("Length", "of the completions, tokens", (("completions/mean_length", "mean"),), zero=True),
)


def line(run: Run, key: str, name: str) -> Line:
    """Return one signal as a line; signals of evaluations are taken from events too, and have errors."""
    if not key.startswith("eval/"):
        return Line(name, run.metrics.series(key))
    found = {
        row.step: (row.values[key], row.values.get(f"{key}_se", 0.0)) for row in run.metrics.rows if key in row.values
    }
    for event in run.events.of("evaluation"):
        values = numbers(event.fields.get("values"))
        if event.step is not None and key in values:
            found[event.step] = (values[key], values.get(f"{key}_se", 0.0))
    columns = np.array([found[step] for step in sorted(found)], dtype=np.float64).reshape(-1, 2)
    return Line(name, Series(np.array(sorted(found), dtype=np.int64), columns[:, 0]), np.nan_to_num(columns[:, 1]))


def figures(run: Run, marks: Sequence[Mark]) -> list[str]:
    """Return a figure for every kind of curve that the run has data for, and one each for terms and rewards."""
    shown = [*CURVES, *_of_rewards(run), *_of_terms(run), *_of_passes(run)]
    drawn = [(curves, [line(run, key, name) for key, name in _known_once(run, curves)]) for curves in shown]
    return [figure(curves, lines, marks) for curves, lines in drawn if any(len(found.series.steps) for found in lines)]


def figure(curves: Curves, lines: Sequence[Line], marks: Sequence[Mark]) -> str:
    """Return a chart with its title and the names of its lines."""
    drawing = chart(lines, marks, title=f"{curves.title}: {curves.shows}", log=curves.log, zero=curves.zero)
    return (
        f"<figure><figcaption><b>{escape(curves.title)}</b> <span>{escape(curves.shows)}</span></figcaption>"
        f"{legend(lines)}{drawing}</figure>"
    )


def _known_once(run: Run, curves: Curves) -> list[tuple[str, str]]:
    """Leave the host's own entropy and KL out where there is ours."""
    double = {"train/entropy": "policy/entropy", "train/kl": "drift/initial/kl", "eval/reward": "eval/pass@1"}
    double |= {"sampling/sampling_logp_difference/mean": "mismatch/k3"}
    held = {key for event in run.events.of("evaluation") for key in numbers(event.fields.get("values"))}
    return [
        (key, name)
        for key, name in curves.signals
        if not (key in double and (run.has(double[key]) or double[key] in held))
    ]


def _of_rewards(run: Run) -> Iterator[Curves]:
    names = [key.split("/")[1] for key in run.metrics.keys() if key.startswith("rewards/") and key.endswith("/mean")]  # noqa: SIM118
    if len(names) > 1:
        yield Curves("Reward functions", "mean of each", tuple((f"rewards/{name}/mean", name) for name in names[:6]))


def _of_terms(run: Run) -> Iterator[Curves]:
    keys = [key for key in run.metrics.keys() if key.startswith("objective/") and key.endswith("/loss")]  # noqa: SIM118
    terms = tuple((key, key.split("/")[1]) for key in keys if key.count("/") == 2)
    if terms:
        yield Curves("Terms of the objective", "loss of each, before its coefficient", terms[:6])


def _of_passes(run: Run) -> Iterator[Curves]:
    logged = {key for row in run.metrics.rows for key in row.values if key.startswith("eval/pass@")}
    logged |= {key for event in run.events.of("evaluation") for key in numbers(event.fields.get("values"))}
    keys = sorted((key for key in logged if key.removeprefix("eval/pass@").isdigit()), key=lambda key: int(key[10:]))
    if len(keys) > 1:
        passes = tuple((key, key.removeprefix("eval/")) for key in keys[:6])
        yield Curves(
            "pass@k", "chance that one of k completions of a held-out prompt is right; ± 2 standard errors", passes
        )


def marks_of(run: Run, diagnosis: Diagnosis) -> list[Mark]:
    """Return what the charts mark, in order: causes, harm, alarms and actions; at most a few, causes and harm first."""
    found = [(claim.since, "cause", claim.title) for claim in diagnosis.claims]
    found += [(harm.since or 0, "harm", harm.says) for harm in diagnosis.harm]
    for event in run.events.rows:
        if event.kind in ALARMS and event.step is not None and event.fields.get("change") != "cleared":
            says = str(event.fields.get("message", event.kind)).removeprefix(f"step {event.step}: ")
            found.append((event.step, "alarm", says))
    kept = sorted(found[:MARKS], key=lambda entry: entry[0])
    return [Mark(step, number, kind, says) for number, (step, kind, says) in enumerate(kept, start=1)]
