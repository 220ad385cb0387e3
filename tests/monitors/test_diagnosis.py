"""The cause named is the one that was put in; what is claimed has numbers; nothing is claimed of a healthy run.

The tables in `recorded/` are real: runs of the quick start's model, 100 steps each or 300, one fault a run, kept by
`benchmarks/diagnosis.py keep`.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from rlstab.monitors import Claim, Curve, Diagnosis, Happening, Trace, diagnose, explanations
from rlstab.record import diagnosis_of, edited, read_run

RUNS = Path(__file__).parent / "recorded"
CAUSES = {
    "healthy": None,
    "healthy_two_updates": None,
    "healthy_slow": None,
    "healthy_moving": None,
    "healthy_experts": None,
    "router": "router_drift",
    "staleness": "staleness",
    "stale_weights": "stale_weights",
    "engine_precision": "engine_precision",
    "truncated_sampling": "truncated_sampling",
    "template": "template",
    "template_studied": "template",
    "engine_precision_studied": "engine_precision",
    "learning_rate": "learning_rate",
    "learning_rate_studied": "learning_rate",
    "learning_rate_small": "learning_rate",
    "gradient_spike": "gradient_spike",
    "gradient_spike_studied": "gradient_spike",
    "entropy": "entropy_collapse",
    "diversity": "diversity_collapse",
    "length": "reward_hacking",
    "saturated": "saturated_data",
    "too_hard": "too_hard_data",
    "nan_backward": "not_finite",
    "nan_forward": "not_finite",
    "dead_reward": "dead_reward",
    "reference_drift": "reference_drift",
}
COLLAPSED = {
    "engine_precision_studied",
    "staleness",
    "learning_rate",
    "gradient_spike",
    "entropy",
    "length",
    "nan_backward",
    "nan_forward",
    "dead_reward",
    "reference_drift",
}


@cache
def diagnosis(name: str) -> Diagnosis:
    run = replace(read_run(RUNS / f"{name}.csv"), config=(RUNS / f"{name}.yaml").read_text())
    return diagnosis_of(run)


def first(name: str) -> Claim:
    return diagnosis(name).claims[0]


def test_every_recorded_run_is_tested() -> None:
    assert {path.stem for path in RUNS.glob("*.csv")} == set(CAUSES)


def test_every_known_cause_has_a_run() -> None:
    assert {entry.name for entry in explanations()} == {cause for cause in CAUSES.values() if cause}


@pytest.mark.parametrize(("name", "cause"), CAUSES.items())
def test_the_cause_that_was_put_in_is_named_first(name: str, cause: str | None) -> None:
    found = diagnosis(name)
    assert (found.claims[0].name if found.claims else None) == cause
    assert found.state == ("healthy" if cause is None else "collapsed" if name in COLLAPSED else "warning")
    assert found.exit_code == ("healthy", "warning", "collapsed").index(found.state)


@pytest.mark.parametrize("name", [name for name, cause in CAUSES.items() if cause])
def test_a_claim_has_numbers_and_a_remedy(name: str) -> None:
    claim = first(name)
    assert 0.5 <= claim.sure <= 1
    assert all(re.search(r"\d|born|traced|is off", line) for line in claim.evidence), claim.evidence
    assert claim.remedy.endswith(".")
    assert not any("nan" in line.split() for line in claim.evidence)


def test_where_a_number_was_born() -> None:
    backward, forward = (" ".join(first(name).evidence) for name in ("nan_backward", "nan_forward"))
    assert "at step 30 these were not finite: train/grad_norm" in backward
    assert "born in the backward pass" in backward
    assert "born in the forward pass of the model" in forward


def test_the_mass_that_is_never_sampled_is_measured() -> None:
    (mass,) = re.findall(
        r"([\d.]+)% of the policy's mass is never sampled", " ".join(first("truncated_sampling").evidence)
    )
    assert 5 < float(mass) < 15


def test_a_lag_is_told_from_weights_that_never_come() -> None:
    assert "k1 was" in " ".join(first("stale_weights").evidence)
    assert first("staleness").since < 10
    names = [claim.name for claim in diagnosis("staleness").claims]
    assert "stale_weights" not in names


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("staleness", "objective.init_args.terms.policy.init_args.ratio"),
        ("learning_rate", "trainer.learning_rate"),
        ("gradient_spike", "trainer.max_grad_norm"),
        ("entropy", "prompts"),
        ("diversity", "objective.init_args.terms.drift"),
        ("saturated", "task.init_args.digits"),
        ("saturated", "trainer.max_completion_length"),
        ("too_hard", "warmup.steps"),
        ("router", "replay"),
        ("reference_drift", "objective.init_args.terms.drift.init_args.reference"),
    ],
)
def test_the_lines_to_change_are_lines_of_this_recipe(name: str, key: str) -> None:
    edits = {edit.key: edit.value for edit in first(name).edits}
    assert key in edits
    recipe = (RUNS / f"{name}.yaml").read_text()
    assert edited(recipe, edits) != recipe


@pytest.mark.parametrize("name", ["stale_weights", "template"])
def test_what_no_setting_repairs_changes_none(name: str) -> None:
    assert first(name).edits == ()
    assert "No setting of the loss repairs this" in first(name).remedy


def test_the_remedy_for_lag_is_not_given_for_a_static_mismatch() -> None:
    assert not any("ratio" in edit.key for edit in first("engine_precision").edits)
    assert "Do not clip against the engine" in first("engine_precision").remedy


def test_routes_that_flip_are_no_matter_of_precision() -> None:
    assert "engine_precision" not in [claim.name for claim in diagnosis("router").claims]
    assert "of the (token, layer) pairs run other experts" in " ".join(first("router").evidence)


@pytest.mark.parametrize("name", ["healthy", "learning_rate_studied", "gradient_spike_studied", "dead_reward"])
def test_the_log_of_a_host_is_enough_for_some(name: str) -> None:
    hosts = ("train/", "completions/", "rewards/")
    run = read_run(RUNS / f"{name}.csv")
    rows = [
        replace(
            row,
            values={
                ("train/entropy" if key == "policy/entropy" else key): value
                for key, value in row.values.items()
                if key == "policy/entropy" or key.startswith(hosts)
            },
        )
        for row in run.metrics.rows
    ]
    claims = diagnosis_of(replace(run, metrics=replace(run.metrics, rows=tuple(rows)))).claims
    assert (claims[0].name if claims else None) == CAUSES[name]
    assert all("mismatch/k3" in claim.unread for claim in claims)


def test_a_rate_too_high_brings_no_reward_for_the_way_it_goes() -> None:
    evidence = " ".join(first("learning_rate_studied").evidence)
    (gain,) = re.findall(r"nats/token from the start brought (\S+) standard deviations", evidence)
    assert abs(float(gain)) < 0.15
    assert "when entropy was down to 60%" in evidence
    assert not any(claim.name == "diversity_collapse" for claim in diagnosis("learning_rate_studied").claims)


def test_where_most_groups_teach_nothing_a_lesson_is_no_spike() -> None:
    rng = np.random.default_rng(0)
    norms = np.where(rng.random(200) < 0.4, rng.uniform(0.5, 2.0, 200), 1e-4)
    reward = np.r_[np.full(100, 0.9), np.full(100, 0.5)] + 0.02 * rng.normal(size=200)
    steps = np.arange(200)

    def claimed(norms: np.ndarray) -> list[str]:
        curves = {"train/grad_norm": Curve(steps, norms), "train/reward": Curve(steps, reward)}
        return [claim.name for claim in diagnose(Trace(curves=curves)).claims]

    assert "gradient_spike" not in claimed(norms)
    assert "gradient_spike" in claimed(np.where(steps == 99, 50.0, norms))


def test_a_rate_too_high_may_show_in_dips_that_the_reward_recovers_from() -> None:
    assert "the reward dipped from 0.873 to 0.7" in first("learning_rate_small").evidence
    metrics = read_run(RUNS / "learning_rate_small.csv").metrics
    reward, far = (Curve(*metrics.series(key)) for key in ("train/reward", "drift/initial/kl"))

    def claimed(far: Curve) -> list[str]:
        return [
            claim.name for claim in diagnose(Trace(curves={"train/reward": reward, "drift/initial/kl": far})).claims
        ]

    assert claimed(far) == ["learning_rate"]
    assert claimed(far._replace(values=far.values / 2)) == []


def test_a_lag_behind_ever_larger_steps_is_not_taken_for_weights_that_never_come() -> None:
    steps = np.arange(100)
    grows = np.where(steps == 0, 0.0, 0.06 * 1.03**steps)

    def claimed(reward: np.ndarray, start: float) -> list[str]:
        values = {"mismatch/k1": grows, "mismatch/k3": grows, "train/reward": reward, "drift/initial/kl": start * grows}
        curves = {key: Curve(steps, value) for key, value in values.items()}
        return [claim.name for claim in diagnose(Trace(curves=curves)).claims]

    learns, same = np.linspace(0.3, 0.9, 100), np.full(100, 0.3)
    assert claimed(learns, 4.0) == ["staleness"]
    assert claimed(same, 1.0) == ["stale_weights"]


def test_broken_weights_are_told_from_another_prompt() -> None:
    found = diagnosis("engine_precision_studied")
    assert "template" not in [claim.name for claim in found.claims]
    assert "likely ones by 2.5 nats and unlikely ones by 2" in " ".join(found.claims[0].evidence)


def test_another_prompt_may_change_nearly_all_tokens() -> None:
    """Broken weights hesitate; a sampler that was asked something else does not."""
    claim = first("template_studied")
    assert "68% of the tokens differed" in " ".join(claim.evidence)
    steps, share = np.arange(40), {"0.5-1": 0.6, "0.1-0.5": 0.1, "0.01-0.1": 0.2}

    def claimed(between: float) -> list[str]:
        values = {"k1": 2.0, "k3": 2.0, "f2": 0.7}
        values |= {f"bucket/{bucket}/mean_abs": 2.0 for bucket in share}
        values |= {f"bucket/{bucket}/share": value for bucket, value in (share | {"0.1-0.5": between}).items()}
        curves = {f"mismatch/{key}": Curve(steps, np.full(40, value)) for key, value in values.items()}
        return [claim.name for claim in diagnose(Trace(curves=curves)).claims]

    assert claimed(0.1) == ["template"]
    assert claimed(0.2) == ["engine_precision"]


def test_a_sampler_that_is_sure_of_other_tokens_saw_another_prompt() -> None:
    """Where few tokens differ, it is not the size that tells, but which tokens do."""
    steps = np.arange(40)

    def claimed(likely: float, unlikely: float) -> list[str]:
        values = {
            "k1": 0.3,
            "k3": 0.3,
            "f2": 0.2,
            "bucket/0.5-1/mean_abs": likely,
            "bucket/0.01-0.1/mean_abs": unlikely,
        }
        curves = {f"mismatch/{key}": Curve(steps, np.full(40, value)) for key, value in values.items()}
        return [claim.name for claim in diagnose(Trace(curves=curves)).claims]

    assert claimed(0.5, 0.4) == ["template"]
    assert claimed(0.05, 0.4) == ["engine_precision"]


def test_what_is_missing_is_named() -> None:
    run = read_run(RUNS / "staleness.csv")
    rows = tuple(
        replace(row, values={key: value for key, value in row.values.items() if not key.startswith("mismatch/")})
        for row in run.metrics.rows
    )
    found = diagnosis_of(replace(run, metrics=replace(run.metrics, rows=rows)))
    assert found.state == "collapsed"
    assert "mismatch/k3" in found.unexamined["staleness"]
    assert "drift/moving/kl or train/kl" in found.unexamined["reference_drift"]
    assert all(claim.name != "staleness" for claim in found.claims)


def test_events_of_a_tracer_and_alarms_stand_in_the_timeline() -> None:
    happenings = [
        Happening("not_finite", 4, {"where": "forward", "names": ["layers.1.mlp"]}),
        Happening("alarm", 2, {"message": "step 2: warning"}),
    ]
    loss = Curve(np.arange(6), np.r_[np.zeros(4), np.nan, np.nan])
    found = diagnose(Trace(curves={"train/loss": loss}, happenings=happenings))
    assert "traced to the forward: layers.1.mlp" in found.claims[0].evidence
    assert [step for step, _ in found.timeline] == [2, 4, 4, 4]
    assert found.timeline[0][1] == "alarm: warning"


def known_keys() -> list[str]:
    source = "".join(path.read_text() for path in (RUNS.parents[2] / "rlstab/monitors/_causes").glob("*.py"))
    return sorted(
        {*re.findall(r'"([a-z_]+/[a-z_0-9@/]+)"', source), "rewards/a/mean", "rewards/b/mean", "eval/pass@16"}
    )


def strange(rng: np.random.Generator) -> Iterator[tuple[str, Curve]]:
    """Any signals, any number of values of any size, among them none that is finite."""
    longest = int(rng.choice([1, 2, 3, 5, 12, 40]))
    for key in known_keys():
        size = int(rng.integers(0, longest + 1))
        values = (
            rng.normal(size=size),
            np.zeros(size),
            np.full(size, np.nan),
            10.0 ** rng.integers(-300, 300, size=size),
            np.where(rng.random(size) < 0.3, np.inf, 1.0),
            np.full(size, -1e300),
        )[rng.integers(6)]
        if rng.random() < 0.6:
            steps = np.sort(rng.choice(2 * longest, size, replace=False)).astype(np.int64)
            yield key, Curve(steps, np.asarray(values, dtype=np.float64))


@pytest.mark.parametrize("seed", range(40))
def test_no_log_is_too_strange(seed: int) -> None:
    rng = np.random.default_rng(seed)
    recipes: list[dict[str, object]] = [
        {},
        {"trainer": {"max_grad_norm": "x", "learning_rate": None}, "objective": [1]},
    ]
    for recipe in recipes:
        found = diagnose(Trace(curves=dict(strange(rng)), config=recipe))
        assert found.state in ("healthy", "warning", "collapsed")
        assert (found.state == "healthy") == (not found.claims and not found.harm)


def test_the_guide_names_every_cause() -> None:
    guide = (RUNS.parents[2] / "docs/guide/my_run_collapsed.md").read_text()
    assert [entry.title for entry in explanations() if f"| {entry.title} |" not in guide] == []
