"""What an objective cannot honour is refused when the trainer is built: by name, with what to do instead."""

import dataclasses
import inspect
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from equality import config, digits_reward, prompts
from small_runs import TOKENIZER, lora, tiny_adapted, tiny_policy, trainer_of, weights
from trl import GRPOConfig, GRPOTrainer

from rlstab.batch import LogProbs
from rlstab.errors import ConfigError
from rlstab.losses import (
    KL,
    ClippedSurrogate,
    GroupNorm,
    KLCov,
    Objective,
    OffPolicySequenceMask,
    PolicyGradient,
    ReMax,
    ReverseKL,
    Term,
    TopEntropy,
    TruncatedIS,
    presets,
)
from rlstab.rollouts import TransformersEngine
from rlstab.trainers import StableGRPOTrainer

# Argument of the host -> a value other than its default, and what the message has to recommend.
OWNED: dict[str, tuple[Any, str]] = {
    "loss_type": ("grpo", "presets"),
    "beta": (0.04, "ReverseKL"),
    "use_bias_correction_kl": (False, "KL("),
    "epsilon": (0.1, "ClippedSurrogate(low="),
    "epsilon_high": (0.28, "ClippedSurrogate(high="),
    "delta": (4.0, "ClippedSurrogate(cap="),
    "importance_sampling_level": ("sequence", "GeometricRatio"),
    "off_policy_mask_threshold": (0.5, "OffPolicySequenceMask"),
    "top_entropy_quantile": (0.2, "TopEntropy"),
    "entropy_coef": (0.01, "EntropyBonus"),
    "use_adaptive_entropy": (True, "EntropyTarget"),
    "entropy_target": (0.4, "EntropyTarget"),
    "entropy_coef_delta": (0.1, "EntropyTarget"),
    "entropy_coef_min": (0.001, "EntropyTarget"),
    "entropy_coef_max": (0.5, "EntropyTarget"),
    "vllm_importance_sampling_correction": (False, "TruncatedIS"),
    "vllm_importance_sampling_mode": ("token_truncate", "TruncatedIS"),
    "vllm_importance_sampling_clip_max": (2.0, "TruncatedIS"),
    "vllm_importance_sampling_clip_min": (0.5, "MaskedIS"),
    "sapo_temperature_pos": (1.1, "SAPO"),
    "sapo_temperature_neg": (1.1, "SAPO"),
    "vespo_k_pos": (1.5, "VESPO"),
    "vespo_k_neg": (1.5, "VESPO"),
    "vespo_lambda_pos": (1.5, "VESPO"),
    "vespo_lambda_neg": (1.5, "VESPO"),
}
# Arguments that the host's loss reads and that keep their meaning beside an objective.
HONOURED = {"router_aux_loss_coef", "max_completion_length", "steps_per_generation", "use_vllm"}


def never_rewarded(**_: Any) -> list[float]:
    """A reward function that no refused trainer reaches."""
    raise AssertionError("a refused trainer has sampled")


def refusal(tmp_path: Path, objective: Objective | Term | None, **extra: Any) -> str:
    """The one-line message with which the trainer is refused, before it has changed a weight or drawn a sample."""
    policy = extra.pop("model", None) or tiny_policy()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        trainer_of(tmp_path, objective, model=policy, reward=never_rewarded, **extra)
    assert all((value == before[name]).all() for name, value in policy.state_dict().items())
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", OWNED)
def test_a_loss_argument_beside_an_objective_is_refused_with_its_part(name: str, tmp_path: Path) -> None:
    value, remedy = OWNED[name]
    message = refusal(tmp_path, presets.dapo(), settings={name: value})
    assert f"args.{name}={value!r}" in message
    assert remedy in message
    default = next(field.default for field in dataclasses.fields(GRPOConfig) if field.name == name)
    assert value != default
    assert repr(default) in message


def test_every_argument_that_the_hosts_loss_reads_is_owned_or_honoured() -> None:
    source = inspect.getsource(GRPOTrainer._compute_loss)
    fields = {field.name for field in dataclasses.fields(GRPOConfig)}
    read = fields & set(re.findall(r"self\.(?:args\.)?(\w+)", source))
    assert len(read) > 20
    assert read <= OWNED.keys() | HONOURED


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("scale_rewards", "batch", "BatchStd"),
        ("multi_objective_aggregation", "normalize_then_sum", "advantage of your"),
    ],
)
def test_a_reward_argument_beside_an_advantage_is_refused(name: str, value: str, remedy: str, tmp_path: Path) -> None:
    for objective, advantage in ((presets.dapo(), None), (None, GroupNorm())):
        message = refusal(tmp_path, objective, advantage=advantage, settings={name: value})
        assert f"args.{name}={value!r}" in message
        assert "advantage" in message
        assert remedy in message


def test_a_reward_argument_is_the_hosts_where_no_advantage_is_given(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, ClippedSurrogate(), settings={"scale_rewards": "none", "max_steps": 1})
    trainer.train()
    assert trainer.state.global_step == 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgainstTeacher(PolicyGradient):
    """A term of one's own that reads a source no trainer has."""

    @property
    def requires(self) -> Any:
        """The log-probs of a teacher."""
        return super().requires | {LogProbs("teacher")}


CORRECTED = Objective(policy=ClippedSurrogate(weights=(TruncatedIS(max=2.0),)))
MOVING = Objective(policy=ClippedSurrogate(), drift=0.1 * ReverseKL(reference="moving"))
SYNCED = {"sync_ref_model": True}


@pytest.mark.parametrize(
    ("objective", "extra", "words"),
    [
        (AgainstTeacher(), {}, ["'teacher'", "'initial'", "'sampler'"]),
        (0.1 * KL(reference="teacher") + ClippedSurrogate(), {}, ["'teacher'", "'initial'"]),
        (0.1 * ReverseKL(reference="old", form="exact") + ClippedSurrogate(), {}, ["'old'", "'initial'"]),
        (MOVING, {}, ["sync_ref_model=False", "'moving'", "'initial'"]),
        (MOVING, {"settings": SYNCED, "peft_config": lora()}, ["'moving'", "PEFT", "'initial'"]),
        (ClippedSurrogate(), {"settings": SYNCED}, ["sync_ref_model=True", "'moving'"]),
        (CORRECTED, {}, ["sampler", "use_vllm=True", "rollout_func", "engine="]),
        (
            Objective(policy=ClippedSurrogate(weights=(OffPolicySequenceMask(delta=0.1, behaviour="sampler"),))),
            {},
            ["sampler", "use_vllm=True"],
        ),
        (ClippedSurrogate(), {"advantage": ReMax()}, ["baseline", "ReMax", "LeaveOneOut()"]),
    ],
)
def test_what_nobody_supplies_is_refused(objective: Any, extra: Any, words: list[str], tmp_path: Path) -> None:
    message = refusal(tmp_path, objective, **extra)
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ({"rollout_func": lambda prompts, trainer: {}}, "rollout_func"),
        ({"settings": {"repetition_penalty": 1.1}}, "args.repetition_penalty=1.1"),
        ({"settings": {"generation_kwargs": {"num_beams": 2}}}, "args.generation_kwargs={'num_beams': 2}"),
    ],
)
def test_a_generation_beside_that_of_an_engine_is_refused(extra: Any, word: str, tmp_path: Path) -> None:
    assert word in refusal(tmp_path, None, engine=TransformersEngine, **extra)


def test_a_moving_reference_of_an_adapted_policy_is_refused(tmp_path: Path) -> None:
    assert "'moving'" in refusal(tmp_path, MOVING, model=tiny_adapted(), settings=SYNCED)


def test_the_hosts_synchronisation_is_refused_where_the_host_refuses_it(tmp_path: Path) -> None:
    assert "sync_ref_model=True" in refusal(tmp_path, None, settings=SYNCED)
    with pytest.raises(ValueError, match="sync_ref_model=True"):
        GRPOTrainer(tiny_policy(), digits_reward, config(tmp_path, **SYNCED), prompts(), processing_class=TOKENIZER)


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        (Objective(policy=ClippedSurrogate().mean("sequence")), "policy"),
        (Objective(policy=ClippedSurrogate().mean("token", over="micro_batch"), spread=0.1 * KLCov()), "spread"),
        (
            Objective(policy=ClippedSurrogate(weights=(TopEntropy(fraction=0.5),)).mean("token", over="generation")),
            "EntropyThreshold",
        ),
    ],
)
def test_a_step_that_is_not_known_when_it_starts_is_refused(objective: Objective, name: str, tmp_path: Path) -> None:
    schedule = {"gradient_accumulation_steps": 4, "steps_per_generation": 2}
    message = refusal(tmp_path, objective, settings=schedule)
    for word in (name, "steps_per_generation=2", "gradient_accumulation_steps=4", "over='generation'", "'micro_batch'"):
        assert word in message


@pytest.mark.parametrize("over", ["generation", "micro_batch"])
def test_the_remedy_for_such_a_schedule_trains(over: Any, tmp_path: Path) -> None:
    schedule = {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "max_steps": 1}
    trainer = trainer_of(tmp_path, ClippedSurrogate().mean("token", over=over), settings=schedule)
    before = weights(trainer)
    trainer.train()
    assert any((before[name] != value).any() for name, value in weights(trainer).items())


def test_a_part_that_cannot_act_says_so_and_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    objective = Objective(policy=ClippedSurrogate(), spread=0.1 * KLCov())
    with caplog.at_level(logging.WARNING, logger="rlstab"):
        trainer_of(tmp_path, objective)
    notices = [record.getMessage() for record in caplog.records if "inert" in record.getMessage()]
    assert [text.split(":")[0] for text in notices] == ["policy", "spread"]
    assert all("num_iterations > 1" in text for text in notices)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="rlstab"):
        trainer_of(tmp_path, objective, settings={"num_iterations": 2})
    assert not [record for record in caplog.records if "inert" in record.getMessage()]


def test_the_hosts_own_loss_says_nothing_about_inert_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rlstab"):
        trainer_of(tmp_path)
    assert not caplog.records


def test_no_argument_can_be_misspelt(tmp_path: Path) -> None:
    data = Dataset.from_dict({"prompt": ["1="]})
    with pytest.raises(TypeError, match="objectives"):
        StableGRPOTrainer(tiny_policy(), digits_reward, config(tmp_path), train_dataset=data, objectives=None)
