"""What a trainer is given by mistake is refused at once, in one line that says what was expected."""

from pathlib import Path
from typing import Any

import pytest
from equality import ALPHABET, config, digits_reward, prompts

from rlstab.errors import ConfigError, HostError
from rlstab.losses import ClippedSurrogate, GroupCenter, ReverseKL, TopEntropy, TruncatedIS, presets
from rlstab.models import tiny_causal_lm, tiny_tokenizer
from rlstab.trainers import StableGRPOTrainer
from rlstab.trainers._host import check_seams, check_version

TOKENIZER = tiny_tokenizer(ALPHABET)


def trainer_of(tmp_path: Path, **changes: Any) -> StableGRPOTrainer:
    given: dict[str, Any] = {
        "model": tiny_causal_lm(TOKENIZER, hidden=32, layers=1, heads=2),
        "reward_funcs": digits_reward,
        "args": config(tmp_path),
        "train_dataset": prompts(8),
        "processing_class": TOKENIZER,
    }
    return StableGRPOTrainer(**{**given, **changes})


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("objective", presets.dapo, "objective: expected an Objective, a term or None"),
        ("objective", "dapo", r"a preset is called: presets.dapo\(\)"),
        ("advantage", GroupCenter, r"advantage: expected a rollout part such as GroupNorm\(\)"),
        ("advantage", "GroupNorm", "advantage: expected a rollout part"),
        ("signals", True, r"signals: expected Signals\(...\), or None for no signals, got True"),
        ("run", "runs/a", "run: expected a RunFolder"),
        ("engine", "vllm", "engine: expected an Engine"),
        ("model", None, "model: expected a model or its path, got None"),
        ("objective", ReverseKL(reference="inital"), "did you mean 'initial'"),
        ("objective", ReverseKL(rows="buffer"), "rows that this trainer does not have"),
    ],
)
def test_an_argument_of_another_kind(argument: str, value: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        trainer_of(tmp_path, **{argument: value})


def test_an_argument_given_twice(tmp_path: Path) -> None:
    model = tiny_causal_lm(TOKENIZER, hidden=32, layers=1, heads=2)
    with pytest.raises(TypeError, match=r"\['train_dataset'\] by position and by keyword"):
        StableGRPOTrainer(model, digits_reward, config(tmp_path), prompts(8), train_dataset=prompts(8))


def test_positional_arguments_reach_the_host(tmp_path: Path) -> None:
    model = tiny_causal_lm(TOKENIZER, hidden=32, layers=1, heads=2)
    data = prompts(8)
    trainer = StableGRPOTrainer(model, digits_reward, config(tmp_path), data, None, TOKENIZER)
    assert trainer.train_dataset is data
    assert trainer.processing_class is TOKENIZER


def test_a_rollout_function_without_log_probs(tmp_path: Path) -> None:
    def rollout(texts: list[str], trainer: Any) -> dict[str, Any]:
        ids = TOKENIZER(texts)["input_ids"]
        return {"prompt_ids": ids, "completion_ids": [[5, 6, 7]] * len(ids), "logprobs": None}

    surrogate = ClippedSurrogate(weights=[TruncatedIS(max=2.0)])
    trainer = trainer_of(tmp_path, objective=surrogate, rollout_func=rollout)
    with pytest.raises(ConfigError, match="the generation returned None for them"):
        trainer.train()


@pytest.mark.parametrize("version", ["1.15.0", "1.14.2", "1.17.0", "2.0.0"])
def test_another_host_version(version: str) -> None:
    with pytest.raises(HostError, match=rf"trl {version} is installed, rlstab needs trl >= 1.16, < 1.17"):
        check_version(version)


def test_a_host_without_a_seam() -> None:
    class Other:
        def _compute_loss(self, model: Any) -> None: ...

    with pytest.raises(HostError, match=r"Other._compute_loss lacks the parameters \['inputs'\]"):
        check_seams(Other)


def test_metrics_are_joined_as_the_schema_says(tmp_path: Path) -> None:
    """Logged every third step: the largest ratio of three steps, their weights' last, not the mean."""
    args = config(tmp_path, max_steps=3, num_iterations=3, logging_steps=3)
    each = trainer_of(tmp_path, args=config(tmp_path, max_steps=3, num_iterations=3), objective=ClippedSurrogate())
    each.train()
    joined = trainer_of(tmp_path, args=args, objective=ClippedSurrogate())  # seeds anew
    joined.train()
    ratios = [row["policy/ratio_max"] for row in each.state.log_history[:-1]]
    assert joined.state.log_history[0]["policy/ratio_max"] == pytest.approx(max(ratios))
    assert max(ratios) > sum(ratios) / 3 + 1e-3


def test_top_entropy_is_exact_over_the_step(tmp_path: Path) -> None:
    args = config(tmp_path, gradient_accumulation_steps=2, num_iterations=2)
    trainer = trainer_of(tmp_path, args=args, objective=ClippedSurrogate(weights=[TopEntropy(fraction=0.4)]))
    trainer.train()
    assert trainer.state.global_step == 4
