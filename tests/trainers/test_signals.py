"""What the trainer measures: against enumeration and sums by hand, and without a trace in the trajectory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import correlation, fmean
from typing import Any

import pytest
import torch
from equality import prompts
from small_runs import (
    TOKENIZER,
    Watched,
    assert_same_weights,
    lora,
    run_folder,
    texts,
    tiny_adapted,
    tiny_policy,
    trainer_of,
    weights,
)
from torch import Tensor
from transformers import TrainerCallback

from rlstab.batch import TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses import (
    KL,
    ClippedSurrogate,
    ConflictWeight,
    Controller,
    EntropyBonus,
    EntropyTarget,
    GroupNorm,
    JensenShannon,
    KLCov,
    Linear,
    Objective,
    ReverseKL,
    TopEntropy,
    TruncatedIS,
)
from rlstab.models import tiny_moe
from rlstab.record import RunFolder
from rlstab.schema import signal
from rlstab.trainers import RowListener, Signals

TWICE = {"gradient_accumulation_steps": 2, "num_iterations": 2}
EVERY_POSITION = Signals(drift_every=1, drift_positions=100_000)


def rows_of(folder: RunFolder) -> list[Mapping[str, float]]:
    """The values of each step."""
    return [row.values for row in folder.metrics().rows]


# ---------------------------------------------------------------------- drift


class BeforeEachUpdate(TrainerCallback):
    """Keeps the policy, and the micro-batches of the step, as they are before each update."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.policies: list[dict[str, Tensor]] = []
        self.batches: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.policies.append({k: v.clone() for k, v in self._trainer.model.state_dict().items()})
        first = (self._trainer._step - args.gradient_accumulation_steps) % args.steps_per_generation
        window = self._trainer._buffered_inputs[first : first + args.gradient_accumulation_steps]
        keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "rlstab_group")
        self.batches.append({key: torch.cat([batch[key] for batch in window]) for key in keys})


def kl_by_enumeration(
    policy: Any, reference: Any, inputs: Mapping[str, Tensor], temperature: float
) -> tuple[float, float]:
    """Mean over all completion tokens of the sum over the vocabulary, and its standard error by prompt."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    width = inputs["prompt_ids"].size(1)
    with torch.no_grad():
        p, q = (
            (model(ids, attention_mask=attention).logits[:, width - 1 : -1].double() / temperature).log_softmax(-1)
            for model in (policy, reference)
        )
    by_prompt: dict[int, list[float]] = {}
    for row, group in enumerate(inputs["rlstab_group"].tolist()):
        for t in range(inputs["completion_ids"].size(1)):
            if inputs["completion_mask"][row, t]:
                summands = (p[row, t].exp() * (p[row, t] - q[row, t])).tolist()
                by_prompt.setdefault(group, []).append(math.fsum(summands))
    values = [value for group in by_prompt.values() for value in group]
    mean = math.fsum(values) / len(values)
    clusters = [math.fsum(value - mean for value in group) for group in by_prompt.values()]
    few = len(clusters) / (len(clusters) - 1)
    return mean, math.sqrt(few * math.fsum(c * c for c in clusters)) / len(values)


def run_with(model: Any, state: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """The model's output with these weights, which stay; a copy of a patched model would run the original's."""
    model.load_state_dict(state)
    return model(*args, **kwargs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("policy", ["dense", "new adapter", "own adapter"])
def test_drift_is_the_exact_kl_to_the_policy_as_passed(policy: str, temperature: float, tmp_path: Path) -> None:
    def start() -> Any:
        return tiny_adapted() if policy == "own adapter" else tiny_policy()

    folder = run_folder(tmp_path / "folder")
    settings = {"max_steps": 3, "temperature": temperature, **TWICE}
    extra: dict[str, Any] = {"peft_config": lora()} if policy == "new adapter" else {}
    trainer = trainer_of(tmp_path, model=start(), signals=EVERY_POSITION, run=folder, settings=settings, **extra)
    before = BeforeEachUpdate(trainer)
    trainer.add_callback(before)
    trainer.train()
    initial, now = start().eval(), trainer.model.eval()
    for row, weights_then, inputs in zip(rows_of(folder), before.policies, before.batches, strict=True):
        now.load_state_dict(weights_then)
        mean, error = kl_by_enumeration(now, initial, inputs, temperature)
        assert row["drift/initial/kl"] == pytest.approx(mean, rel=1e-4, abs=1e-9)
        assert row["drift/initial/kl_se"] == pytest.approx(error, rel=1e-3, abs=1e-9)
    for i, row in enumerate(rows_of(folder)[1:], 1):  # what the update before has moved, where it was computed
        then, earlier = (partial(run_with, now, before.policies[at]) for at in (i, i - 1))
        mean, error = kl_by_enumeration(then, earlier, before.batches[i - 1], temperature)
        assert row["drift/previous/kl"] == pytest.approx(mean, rel=1e-3, abs=1e-8)
        assert row["drift/previous/kl_se"] == pytest.approx(error, rel=1e-3, abs=1e-8)
        assert mean > 1e-6
    values = [row["drift/initial/kl"] for row in rows_of(folder)]
    assert (values[0] == 0.0) == (policy != "new adapter")  # a new adapter does not start at zero here
    assert values[2] > 1e-5


def test_drift_from_a_moving_reference(tmp_path: Path) -> None:
    """It follows by half at steps 2 and 4: the drift from it is 0 while the drift from the start is not."""
    objective = Objective(policy=ClippedSurrogate(), pull=0.1 * ReverseKL(reference="moving"))
    folder = run_folder(tmp_path / "folder")
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
    settings = {"max_steps": 5, **TWICE, **moving}
    trainer_of(tmp_path, objective, signals=EVERY_POSITION, run=folder, settings=settings).train()
    initial = [row["drift/initial/kl"] for row in rows_of(folder)]
    following = [row["drift/moving/kl"] for row in rows_of(folder)]
    assert [value == 0.0 for value in following] == [True, False, True, False, True]
    assert following[1] == initial[1]
    assert min(initial[2:]) > 1e-5


def test_drift_is_measured_every_so_many_steps_at_so_many_positions(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "folder")
    settings = {"max_steps": 7, "per_device_train_batch_size": 32}
    trainer = trainer_of(tmp_path, signals=Signals(drift_every=3, drift_positions=64), run=folder, settings=settings)
    trainer.train()
    assert [row.step for row in folder.metrics().rows if "drift/initial/kl" in row.values] == [1, 4, 7]
    assert [row.step for row in folder.metrics().rows if "drift/previous/kl" in row.values] == [2, 5]
    rows, columns = trainer._drift._positions(trainer._buffered_inputs[0])
    assert 32 <= len(rows) * len(columns) <= 64
    assert len(rows.unique()) == len(rows)
    assert len(columns.unique()) == len(columns)
    groups = trainer._buffered_inputs[0]["rlstab_group"]
    assert len(groups[rows[:8]].unique()) == len(groups.unique()) == 8


def every_part(**changes: Any) -> Objective:
    """Parts of all phases, and a controller."""
    return Objective(
        policy=ClippedSurrogate(low=0.01, high=0.02, weights=(ConflictWeight(), TruncatedIS(max=1.2))),
        drift=JensenShannon(coef=Linear(start=0.2, end=0.0, steps=8)),
        exact=0.1 * ReverseKL(form="exact"),
        entropy=EntropyBonus(coef=0.01, weights=(TopEntropy(fraction=0.5),)),
        covariance=0.5 * KLCov(fraction=0.1),
        advantage=GroupNorm(),
        **changes,
    )


@pytest.mark.parametrize("extra", [{}, {"peft_config": lora()}, {"model": tiny_adapted}])
def test_measuring_changes_no_trajectory(extra: dict[str, Any], tmp_path: Path) -> None:
    ends = []
    for signals in (None, Signals(drift_every=1)):
        made = {key: value() if callable(value) else value for key, value in extra.items()}
        trainer = trainer_of(
            tmp_path, every_part(), sampler=True, signals=signals, settings={"max_steps": 4, **TWICE}, **made
        )
        trainer.train()
        ends.append(weights(trainer))
    assert_same_weights(*ends)


@pytest.mark.parametrize("name", ["drift_every", "drift_positions"])
def test_signals_are_measured_at_least_once(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"signals\.{name}: expected at least 1, got 0"):
        Signals(**dict[str, Any]({name: 0}))


# ---------------------------------------------------------------------- trainer against sampler


def mismatch_by_hand(batches: list[TokenBatch]) -> dict[str, float]:
    """The signals of one step, from the log-probs of all its micro-batches."""
    tokens: list[tuple[int, int, float]] = []  # prompt, completion, delta
    chances: list[tuple[float, float]] = []
    unscored = row = 0
    for batch in batches:
        for i in range(batch.shape[0]):
            row += 1
            for t in range(batch.shape[1]):
                delta = float(batch.logp("policy")[i, t].detach()) - float(batch.logp("sampler")[i, t])
                if batch.loss_mask[i, t] and math.isnan(delta):
                    unscored += 1
                elif batch.loss_mask[i, t]:
                    tokens.append((int(batch.column("group")[i]), row, delta))
                    chances.append(
                        (float(batch.logp("policy")[i, t].detach().exp()), float(batch.logp("sampler")[i, t].exp()))
                    )
    deltas = [delta for _, _, delta in tokens]
    rho = [math.exp(delta) for delta in deltas]
    sums: dict[int, float] = {}
    for _, completion, delta in tokens:
        sums[completion] = sums.get(completion, 0.0) + delta
    w = [math.exp(s) for s in sums.values()]
    values = {
        "max_abs": max(map(abs, deltas)),
        "ess_token": sum(rho) ** 2 / (len(rho) * sum(r * r for r in rho)),
        "ess_sequence": sum(w) ** 2 / (len(w) * sum(x * x for x in w)),
        "unscored": float(unscored),
        "chi2_token": fmean(r * r for r in rho) - 1,
        "chi2_sequence": fmean(x * x for x in w) - 1,
        "pearson": correlation(*zip(*chances, strict=True)),
    }
    per_token = {
        "k1": [-delta for delta in deltas],
        "k3": [r - 1 - delta for r, delta in zip(rho, deltas, strict=True)],
        "f2": [float(max(r, 1 / r) > 2) for r in rho],
    }
    for key, numbers in per_token.items():
        mean = sum(numbers) / len(numbers)
        by_prompt: dict[int, float] = {}
        for (prompt, _, _), number in zip(tokens, numbers, strict=True):
            by_prompt[prompt] = by_prompt.get(prompt, 0.0) + number - mean
        values[key] = mean
        prompts = len(by_prompt)
        spread = sum(x * x for x in by_prompt.values())
        values[f"{key}_se"] = math.sqrt(spread * prompts / (prompts - 1)) / len(numbers) if prompts > 1 else math.nan
    return {f"mismatch/{key}": value for key, value in values.items()}


@pytest.mark.parametrize(
    "schedule", [TWICE, {"gradient_accumulation_steps": 4, "steps_per_generation": 2}, {"steps_per_generation": 2}]
)
def test_mismatch_is_what_sums_by_hand_say(schedule: dict[str, int], tmp_path: Path) -> None:
    policy = Watched().mean("token", over="micro_batch")
    folder = run_folder(tmp_path / "folder")
    settings = {"max_steps": 2, "learning_rate": 0.05, **schedule}
    trainer_of(tmp_path, Objective(policy=policy), sampler=True, run=folder, settings=settings).train()
    accumulation = schedule.get("gradient_accumulation_steps", 1)
    for i, row in enumerate(rows_of(folder)):
        expected = mismatch_by_hand(policy.seen[i * accumulation : (i + 1) * accumulation])
        measured = {key: value for key, value in row.items() if key.startswith("mismatch/")}
        buckets = {key: measured.pop(key) for key in list(measured) if key.startswith("mismatch/bucket/")}
        shares = {key.removesuffix("/share"): share for key, share in buckets.items() if key.endswith("/share")}
        assert sum(shares.values()) == pytest.approx(1.0)
        assert 0.0 in shares.values()
        assert {key.rpartition("/")[0] for key in buckets if key.endswith("/k3")} == {k for k, v in shares.items() if v}
        measured = {key: value for key, value in measured.items() if key in expected}
        assert measured == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)
        assert measured["mismatch/unscored"] > 0
        assert measured["mismatch/k3"] > 0
        assert measured["mismatch/ess_sequence"] < measured["mismatch/ess_token"] < 1


def test_without_sampler_scores_nothing_is_measured_and_it_is_said(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "folder")
    trainer_of(tmp_path, run=folder, settings={"max_steps": 2, **TWICE}).train()
    assert not [key for row in rows_of(folder) for key in row if key.startswith("mismatch/")]
    (event,) = folder.events().of("signal_skipped")
    assert event.fields["signal"] == "mismatch/k3"
    assert "log-probs" in str(event.fields["reason"])


def test_signals_can_be_off(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "folder")
    trainer_of(tmp_path, sampler=True, signals=None, run=folder, settings={"max_steps": 2}).train()
    assert len(rows_of(folder)) == 2
    assert not [key for row in rows_of(folder) for key in row if key.startswith(("mismatch/", "drift/"))]
    assert not folder.events().rows


# ---------------------------------------------------------------------- rows


class Rows(TrainerCallback, RowListener):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def on_row(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))


def test_there_is_one_complete_row_for_each_step(tmp_path: Path) -> None:
    folder, listener = run_folder(tmp_path / "folder"), Rows()
    settings = {"max_steps": 5, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    trainer = trainer_of(tmp_path, run=folder, settings=settings, signals=Signals(drift_every=2), callbacks=[listener])
    trainer.train()
    metrics = folder.metrics().rows
    assert [row.step for row in metrics] == [1, 2, 3, 4, 5]
    assert [row.time for row in metrics] == sorted(row.time for row in metrics)
    assert listener.rows == [(row.step, dict(row.values)) for row in metrics]
    every_step = {key for key in metrics[0].values if not key.startswith("drift/")}
    assert {
        "train/reward",
        "train/reward_std",
        "train/grad_norm",
        "train/learning_rate",
        "train/step_time",
    } <= every_step
    assert {"policy/entropy", "policy/ratio_max", "objective/policy/loss", "objective/policy/weight"} <= every_step
    assert {"completions/mean_length", "rewards/digits_reward/mean"} <= every_step
    assert all({key for key in row.values if not key.startswith("drift/")} == every_step for row in metrics)
    rewards = [row.values["train/reward"] for row in metrics]
    assert rewards[0] == rewards[1] != rewards[2] == rewards[3] != rewards[4]
    for row, log in zip(metrics, trainer.state.log_history, strict=False):
        assert row.values["train/grad_norm"] == pytest.approx(log["grad_norm"])
        assert row.values["train/learning_rate"] == pytest.approx(log["learning_rate"])
        assert row.values["objective/loss"] == pytest.approx(log["loss"], rel=1e-4, abs=1e-6)
        assert row.values["policy/entropy"] == pytest.approx(log["policy/entropy"])


@pytest.mark.parametrize(
    ("objective", "extra"),
    [
        (every_part(), {"sampler": True}),
        (None, {"settings": {"loss_type": "vespo", "beta": 0.1, "entropy_coef": 0.01}}),
        (None, {"settings": {"loss_type": "cispo"}, "model": tiny_moe}),
        (Objective(policy=ClippedSurrogate(), pull=KL(reference="moving")), {"settings": {"sync_ref_model": True}}),
    ],
)
def test_every_key_is_in_the_schema(objective: Objective | None, extra: dict[str, Any], tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "folder")
    settings = {"max_steps": 2, **TWICE, **extra.get("settings", {})}
    model = {"model": tiny_moe(TOKENIZER, seed=1)} if "model" in extra else {}
    trainer_of(tmp_path, objective, run=folder, settings=settings, sampler=extra.get("sampler", False), **model).train()
    keys = folder.metrics().keys()
    assert len(keys) > 15
    assert all(signal(key).meaning for key in keys)


def test_clip_fractions_are_counted_off_policy(tmp_path: Path) -> None:
    policy = Watched(low=0.01, high=0.02)
    folder = run_folder(tmp_path / "folder")
    trainer_of(tmp_path, Objective(policy=policy), run=folder, settings={"max_steps": 2, **TWICE}).train()
    low = high = tokens = 0
    largest = 0.0
    for batch in policy.seen[2:]:
        ratio = (batch.logp("policy").detach() - batch.logp("old")).exp()
        advantages = batch.token_advantages().expand_as(ratio)
        low += int(((advantages < 0) & (ratio < 0.99) & batch.loss_mask).sum())
        high += int(((advantages > 0) & (ratio > 1.02) & batch.loss_mask).sum())
        tokens += int(batch.loss_mask.sum())
        largest = max(largest, float(ratio[batch.loss_mask].max()))
    first, second = rows_of(folder)
    assert (first["policy/clip_fraction_low"], first["policy/clip_fraction_high"]) == (0.0, 0.0)
    assert second["policy/clip_fraction_low"] == pytest.approx(low / tokens)
    assert second["policy/clip_fraction_high"] == pytest.approx(high / tokens)
    assert second["policy/ratio_max"] == pytest.approx(largest)
    assert low > 0
    assert high > 0


def test_sampled_completions_are_recorded(tmp_path: Path) -> None:
    policy = Watched()
    folder = run_folder(tmp_path / "folder")
    settings = {"max_steps": 4, **TWICE}
    trainer_of(tmp_path, Objective(policy=policy, advantage=GroupNorm()), run=folder, settings=settings).train()
    recorded = folder.rollouts().rows
    assert [row.step for row in recorded] == [1] * 4 + [3] * 4
    for step in (1, 3):
        batches = policy.seen[2 * step - 2 : 2 * step]
        sampled = {
            (text, round(float(reward), 4)): float(advantage)
            for batch in batches
            for text, reward, advantage in zip(
                texts(batch), batch.column("rewards"), batch.column("advantages"), strict=True
            )
        }
        for row in (row.fields for row in recorded if row.step == step):
            rewards: Any = row["rewards"]
            key = (str(row["completion"]), round(rewards["digits_reward"], 4))
            assert row["advantage"] == pytest.approx(sampled[key])
            assert row["prompt"] in prompts()["prompt"]


# ---------------------------------------------------------------------- controllers


@dataclass(kw_only=True, eq=False)
class Listening(Controller):
    """A coefficient that stays and remembers what it was told."""

    told: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._set(0.5)

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Remember."""
        self.told.append((step, dict(metrics)))


def test_controllers_are_told_what_the_rows_say(tmp_path: Path) -> None:
    controller = Listening()
    folder = run_folder(tmp_path / "folder")
    objective = Objective(policy=ClippedSurrogate(), entropy=EntropyBonus(coef=controller))
    trainer_of(tmp_path, objective, run=folder, settings={"max_steps": 3, **TWICE}).train()
    assert [step for step, _ in controller.told] == [1, 2, 3]
    for (_, told), row in zip(controller.told, rows_of(folder), strict=True):
        assert told == {key: row[f"objective/entropy/{key}"] for key in ("loss", "entropy")}
        assert row["objective/entropy/weight"] == 0.5
        assert told["entropy"] == pytest.approx(row["policy/entropy"], rel=1e-5)


def test_an_entropy_target_acts_on_the_entropy_of_the_step_before(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "folder")
    coefficient = EntropyTarget(target=2.81, start=0.01, delta=0.002)
    objective = Objective(policy=ClippedSurrogate(), entropy=EntropyBonus(coef=coefficient))
    trainer_of(tmp_path, objective, run=folder, settings={"max_steps": 6, "learning_rate": 0.02, **TWICE}).train()
    rows = rows_of(folder)
    level, applied = 0.01, [0.0]
    for row in rows:
        low = row["objective/entropy/entropy"] <= 2.81
        level += 0.002 if low else -0.002
        applied.append(level if low else 0.0)
    assert [row["objective/entropy/weight"] for row in rows] == pytest.approx(applied[:-1])
    assert len({value > 0 for value in applied[1:]}) == 2


def test_a_schedule_counts_optimizer_steps(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "folder")
    objective = Objective(policy=ClippedSurrogate(coef=Linear(start=1.0, end=0.0, steps=4)))
    settings = {"max_steps": 6, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    trainer_of(tmp_path, objective, run=folder, settings=settings).train()
    assert [row["objective/policy/weight"] for row in rows_of(folder)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
