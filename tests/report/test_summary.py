"""The table before → after and the verdict say what the numbers say, and no more."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from rlstab.record import Run, RunFolder
from rlstab.report import SummaryRow, print_summary, summary
from rlstab.report._summary import amount, change
from rlstab.report._verdict import missing, verdict

WriteSeries = Callable[[RunFolder, dict[str, list[float]]], RunFolder]


def evaluated(folder: RunFolder, before: dict[str, float], after: dict[str, float]) -> dict[str, SummaryRow]:
    folder.append_event("evaluation", step=0, phase="before", values=before)
    folder.append_event("evaluation", step=9, phase="after", values=after)
    return {row.key: row for row in summary(folder)}


def test_rows_of_a_full_run(full_run: RunFolder) -> None:
    rows = summary(full_run)
    assert [row.key for row in rows] == ["eval/pass@1", "eval/pass@8", "eval/reward", "eval/kl", "eval/entropy"]
    assert {row.measured for row in rows} == {"held-out"}
    first = rows[0]
    assert (first.before, first.after) == (0.453, 0.927)
    assert first.change == pytest.approx(0.474)
    assert first.change_se == pytest.approx((0.021**2 + 0.012**2) ** 0.5)
    assert [row.judgement for row in rows] == ["better", "not clear", "better", "", ""]


def test_judgement_follows_direction_and_uncertainty(empty_run: RunFolder) -> None:
    before = {"eval/pass@1": 0.5, "eval/pass@1_se": 0.03, "eval/pass@8": 0.9, "eval/pass@16": 0.9, "eval/reward": 0.5}
    after = {
        "eval/pass@1": 0.58,
        "eval/pass@1_se": 0.03,
        "eval/pass@8": 0.8,
        "eval/pass@16": 0.9,
        "eval/reward": float("nan"),
    }
    rows = evaluated(empty_run, before, after)
    assert list(rows) == ["eval/pass@1", "eval/pass@8", "eval/pass@16", "eval/reward"]
    assert rows["eval/pass@1"].judgement == "not clear"
    assert rows["eval/pass@8"].judgement == "worse"
    assert rows["eval/pass@16"].judgement == "not clear"
    assert rows["eval/reward"].judgement == "not clear"


def test_less_is_better_where_the_schema_says_so() -> None:
    row = SummaryRow(key="mismatch/f2", name="F(2)", measured="training", before=0.1, after=0.01)
    assert row.judgement == "better"


def test_first_before_and_last_after_count(empty_run: RunFolder) -> None:
    empty_run.append_event("evaluation", step=0, phase="before", values={"eval/reward": 0.1})
    rows = evaluated(empty_run, {"eval/reward": 0.2}, {"eval/reward": 0.3})
    empty_run.append_event("evaluation", step=12, phase="after", values={"eval/reward": 0.4})
    assert rows["eval/reward"].before == 0.1
    assert summary(empty_run)[0].after == 0.4


def test_metrics_stand_in_where_there_are_no_evaluation_events(empty_run: RunFolder, run_of: WriteSeries) -> None:
    run_of(empty_run, {"eval/pass@1": [0.2, 0.3, 0.4], "train/reward": [0.1, 0.2, 0.3]})
    rows = {row.key: row for row in summary(empty_run)}
    assert (rows["eval/pass@1"].before, rows["eval/pass@1"].after) == (0.2, 0.4)
    assert (rows["train/reward"].before, rows["train/reward"].after) == (0.1, 0.3)
    assert rows["train/reward"].measured == "training"


def test_training_stands_in_with_means_over_a_tenth(empty_run: RunFolder, run_of: WriteSeries) -> None:
    rewards = [0.0, 0.2, *[0.5] * 16, 0.8, 1.0]
    run_of(empty_run, {"train/reward": rewards, "drift/initial/kl": [0.1, 0.4], "drift/initial/kl_se": [0.02, 0.03]})
    reward, drift = summary(empty_run)
    assert reward.before == pytest.approx(0.1)
    assert reward.after == pytest.approx(0.9)
    assert (drift.before, drift.after, drift.change_se) == (0.0, 0.4, 0.03)
    assert drift.judgement == ""


def test_drift_is_zero_before_training_even_if_not_written(empty_run: RunFolder) -> None:
    rows = evaluated(empty_run, {}, {"eval/kl": 0.2, "eval/kl_se": 0.01})
    assert (rows["eval/kl"].before, rows["eval/kl"].change_se) == (0.0, 0.01)


def test_numbers_as_text() -> None:
    assert amount(0.12345, None, "fraction") == "12.3 %"
    assert amount(0.12345, 0.004, "nats/token") == "0.123 ± 0.004"
    assert amount(float("nan"), None, "reward") == "nan"
    row = SummaryRow(key="eval/pass@1", name="pass@1", measured="held-out", before=0.5, after=0.25)
    assert change(row) == "-25.0 points"


def test_printed_table(full_run: RunFolder) -> None:
    out = io.StringIO()
    print_summary(full_run, Console(file=out, width=90))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "sort-digits: before → after" in lines
    assert "pass@1 45.3 ± 2.1 % 92.7 ± 1.2 % +47.4 ± 2.4 points" in lines
    assert "entropy, nats/token 0.571 ± 0.01 0.142 -0.429" in lines


def test_printing_an_empty_run_prints_nothing(empty_run: RunFolder) -> None:
    out = io.StringIO()
    print_summary(empty_run, Console(file=out))
    assert out.getvalue() == ""


def test_verdict_of_a_full_run(full_run: RunFolder) -> None:
    assert verdict(Run.of(full_run)) == [
        "pass@1 on held-out prompts rose from 45.3 % to 92.7 % (+47.4 ± 2.4 points, one standard error).",
        "The policy moved 0.31 ± 0.02 nats/token (KL) away from where it started.",
        "Trainer and sampler agreed: k3 was at most 1.8e-05 nats/token.",
        "Training finished after 100 steps, resumed once.",
    ]
    assert missing(Run.of(full_run)) == []


def test_verdict_does_not_claim_a_change_within_its_uncertainty(empty_run: RunFolder) -> None:
    evaluated(empty_run, {"eval/pass@1": 0.5, "eval/pass@1_se": 0.02}, {"eval/pass@1": 0.53, "eval/pass@1_se": 0.02})
    assert verdict(Run.of(empty_run))[0] == (
        "pass@1 on held-out prompts went from 50.0 % to 53.0 %: "
        "no change beyond two standard errors (+3.0 ± 2.8 points)."
    )


def test_verdict_names_a_loss(empty_run: RunFolder) -> None:
    evaluated(empty_run, {"eval/reward": 0.5}, {"eval/reward": 0.2})
    assert verdict(Run.of(empty_run))[0] == (
        "reward on held-out prompts fell from 0.5 to 0.2 (-0.3, no standard error was recorded)."
    )


@pytest.mark.parametrize(
    ("series", "sentence"),
    [
        ({"mismatch/k3": [1e-3] * 5}, "agreed: k3 was at most 0.001"),
        ({"mismatch/k3": [1e-3, 0.5, 0.5, 1e-3]}, "agreed: k3 was at most 0.5"),
        ({"mismatch/k3": [1e-3, 6e-3, 7e-3, 8e-3]}, "differed noticeably: k3 stayed above 0.005 for 3 or more steps"),
        ({"mismatch/k3": [0.1, 0.2, float("inf")]}, "far enough to destabilise training: k3 stayed above 0.02"),
        ({"mismatch/k3": [0.0] * 3, "mismatch/f2": [0.02] * 3}, "noticeably: F(2) stayed above 0.01"),
        ({"mismatch/k3": [0.0] * 3, "mismatch/ess_token": [0.2] * 3}, "effective sample size stayed below 0.3"),
        ({"mismatch/k3": [float("nan")] * 3, "mismatch/ess_token": [0.9] * 3}, "agreed"),
        ({"train/reward": [1.0]}, "not known: the sampler returned no log-probs"),
    ],
)
def test_agreement_of_trainer_and_sampler(
    empty_run: RunFolder, run_of: WriteSeries, series: dict[str, list[float]], sentence: str
) -> None:
    run_of(empty_run, series)
    assert sentence in verdict(Run.of(empty_run))[2]


def test_how_the_run_ended(empty_run: RunFolder) -> None:
    assert verdict(Run.of(empty_run))[3] == "No step of training was logged."
    empty_run.append_metrics(1, {"train/reward": 1.0})
    assert verdict(Run.of(empty_run))[3] == "The log ends after 1 step, without a note that training finished."
    empty_run.append_event("interrupted", step=1)
    assert verdict(Run.of(empty_run))[3] == "Training was interrupted after 1 step."
    empty_run.resume_at(1)
    empty_run.resume_at(1)
    empty_run.append_metrics(2, {})
    empty_run.append_event("finished", step=2)
    assert verdict(Run.of(empty_run))[3] == "Training finished after 2 steps, resumed 2 times."


def test_what_is_missing_and_why(empty_run: RunFolder) -> None:
    assert missing(Run.of(empty_run)) == [
        "Evaluation before training: none was recorded.",
        "Evaluation after training: training has not finished.",
        "Plots: no step of training was logged.",
        "Sample completions: the run recorded none.",
    ]
    empty_run.append_metrics(1, {"train/reward": 1.0})
    empty_run.append_event("signal_skipped", signal="drift/initial", reason="the start weights do not fit into memory")
    with (empty_run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "tra')
    found = missing(Run.of(empty_run))
    assert (
        "Plot of the KL of the policy to its references over the steps: the start weights do not fit into memory."
        in found
    )
    assert "metrics.jsonl: 1 line could not be read (torn by a kill or a full disk) and skipped." in found
    assert verdict(Run.of(empty_run))[1] == "Drift is not known: the start weights do not fit into memory."
