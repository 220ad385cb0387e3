"""Traps of the host that a trainer on top of it can fall into without a sound: one test for each."""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from equality import OursWithOtherSampler, config, digits_reward, prompts
from small_runs import (
    TOKENIZER,
    Watched,
    WatchedAdvantage,
    assert_same_weights,
    joined,
    lora,
    run_folder,
    texts,
    tiny_adapted,
    tiny_policy,
    trainer_of,
    weights,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2ForCausalLM
from trl import GRPOTrainer

from rlstab.batch import TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses import (
    KL,
    BatchStd,
    ClippedSurrogate,
    GroupCenter,
    GroupNorm,
    JensenShannon,
    KLCov,
    Loss,
    Objective,
    ReverseKL,
    RolloutPart,
    TopEntropy,
    TruncatedIS,
    presets,
)
from rlstab.models import tiny_moe
from rlstab.trainers import Signals

TWICE = {"gradient_accumulation_steps": 2, "num_iterations": 2}
IDS = torch.tensor([[4, 9, 5, 7], [6, 3, 8, 10]])


def host_of(output: Path, model: PreTrainedModel, **settings: Any) -> Any:
    """The host, for comparison."""
    return GRPOTrainer(
        model, digits_reward, config(output, **settings), train_dataset=prompts(), processing_class=TOKENIZER
    )


# ---------------------------------------------------------------------- references


def zero(model: Any) -> None:
    """Overwrite all weights in place."""
    for parameter in model.parameters():
        parameter.data.zero_()


def used_before(output: Path) -> PreTrainedModel:
    """A policy that another trainer was given, which patched it."""
    policy = tiny_policy()
    trainer_of(output / "before", model=policy)
    return policy


def spread(output: Path) -> PreTrainedModel:
    """A policy that accelerate moves inputs for."""
    policy = tiny_policy()
    add_hook_to_module(policy, AlignDevicesHook(io_same_device=True))
    return policy


def test_a_copy_of_the_trainers_model_runs_the_original(tmp_path: Path) -> None:
    """The trap: what the next test would see if references were copied from the trainer's model."""
    trainer = trainer_of(tmp_path, signals=None)
    copied = copy.deepcopy(trainer.model)
    zero(copied)
    torch.testing.assert_close(copied(IDS).logits, trainer.model(IDS).logits)
    assert float(trainer.model(IDS).logits.detach().abs().max()) > 0


@pytest.mark.parametrize("policy", [lambda output: tiny_policy(), used_before, spread])
@pytest.mark.parametrize("source", ["initial", "moving"])
def test_a_reference_runs_its_own_weights(source: str, policy: Callable[[Path], Any], tmp_path: Path) -> None:
    objective = Objective(policy=ClippedSurrogate(), drift=KL(reference=source))
    settings = {"sync_ref_model": source == "moving"}
    trainer = trainer_of(tmp_path, objective, model=policy(tmp_path), settings=settings)
    zero(trainer.model)
    with trainer._references.use(source, trainer.model, trainer.accelerator) as reference, torch.no_grad():
        plain = reference(IDS).logits
        fused = reference(input_ids=IDS, labels=IDS, fused_lm_head=True).log_probs
        generated = reference.generate(IDS, do_sample=False, max_new_tokens=3)
    expected: Any = tiny_policy()
    logits = expected(IDS).logits.detach()
    torch.testing.assert_close(plain, logits)
    logps = logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(fused, logps, rtol=0, atol=1e-5)
    assert generated.tolist() == expected.generate(IDS, do_sample=False, max_new_tokens=3).tolist()


def test_the_reference_is_the_policy_as_passed_and_not_the_path_it_came_from(tmp_path: Path) -> None:
    """The host reloads the path: its KL is not 0 at the first step of a policy that was changed after loading."""
    tiny_policy().save_pretrained(tmp_path / "start")

    def changed() -> Any:
        policy = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.5)
        return policy

    settings = {"beta": 0.1, "max_steps": 1}
    ours = trainer_of(tmp_path / "ours", model=changed(), settings=settings)
    ours.train()
    host = host_of(tmp_path / "host", changed(), **settings)
    host.train()
    assert ours.state.log_history[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert host.state.log_history[0]["kl"] > 1e-3


def test_a_policy_without_a_path_has_a_reference(tmp_path: Path) -> None:
    settings = {"beta": 0.1, "max_steps": 2, **TWICE}
    with pytest.raises(OSError, match="Repo id"):
        host_of(tmp_path, tiny_policy(), **settings)
    trainer = trainer_of(tmp_path, settings=settings)
    trainer.train()
    assert trainer.state.log_history[1]["kl"] > 0


class Counted(Qwen2ForCausalLM):
    """A policy that counts its copies."""

    copies: ClassVar[int] = 0

    def __deepcopy__(self, memo: Any) -> PreTrainedModel:
        Counted.copies += 1
        return tiny_policy()


OFF = None
PULL = {"sync_ref_model": True}


@pytest.mark.parametrize(
    ("objective", "extra", "copies"),
    [
        (None, {"signals": OFF}, 0),
        (presets.dapo(), {"signals": Signals(drift=False)}, 0),
        (presets.dapo(), {"signals": OFF, "settings": {"gradient_accumulation_steps": 2, "num_iterations": 2}}, 0),
        (None, {"signals": OFF, "settings": {"beta": 0.1}}, 1),
        (presets.dapo(), {"signals": Signals()}, 1),
        (presets.grpo(beta=0.1) + JensenShannon(reference="initial"), {"signals": Signals()}, 1),
        (presets.dapo() + JensenShannon(form="exact"), {"signals": OFF}, 1),
        (presets.dapo(), {"signals": OFF, "advantage": presets.reinforce_pp().advantage}, 1),
        (presets.dapo() + ReverseKL(reference="moving"), {"signals": OFF, "settings": PULL}, 1),
        (presets.grpo(beta=0.1) + ReverseKL(reference="moving"), {"signals": OFF, "settings": PULL}, 2),
        (presets.grpo(beta=0.1), {"signals": Signals(), "peft_config": lora()}, 0),
    ],
)
def test_a_reference_is_held_only_if_something_reads_it(
    objective: Objective | None, extra: dict[str, Any], copies: int, tmp_path: Path
) -> None:
    start = tiny_policy()
    policy_class: Any = Counted
    policy = policy_class(start.config)
    policy.load_state_dict(start.state_dict())
    policy.generation_config = start.generation_config
    Counted.copies = 0
    trainer = trainer_of(tmp_path, objective, model=policy, **extra)
    assert Counted.copies == copies
    assert trainer.ref_model is None


@pytest.mark.parametrize(
    ("objective", "extra"),
    [
        (None, {"settings": {"beta": 0.1, "sync_ref_model": True}}),
        (presets.grpo(beta=0.1), {}),
        (presets.grpo(beta=0.1), {"peft_config": lora()}),
        (presets.grpo(beta=0.1), {"model": tiny_adapted()}),
    ],
)
def test_the_callers_arguments_stay_as_they_were(objective: Any, extra: dict[str, Any], tmp_path: Path) -> None:
    """While the host is built it sees others: its own references and corrections would be loaded and applied twice."""
    settings = {**extra.pop("settings", {}), "max_steps": 1}
    args = config(tmp_path, **settings)
    before = {name: copy.deepcopy(value) for name, value in vars(args).items()}
    model, train_dataset = extra.pop("model", None) or tiny_policy(), prompts()
    trainer = OursWithOtherSampler(
        model,
        digits_reward,
        args,
        objective=objective,
        train_dataset=train_dataset,
        processing_class=TOKENIZER,
        **extra,
    )
    assert trainer.args is args
    trainer.train()
    owned = {field.name for field in dataclasses.fields(args)} - {"distributed_state", "deepspeed_plugin"}
    assert {name for name in owned if vars(args)[name] != before[name]} <= {"max_steps", "num_train_epochs"}
    assert trainer.beta == 0.0


def test_arguments_are_given_back_when_the_host_refuses(tmp_path: Path) -> None:
    args = config(tmp_path, beta=0.1, reward_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="reward weights"):
        OursWithOtherSampler(tiny_policy(), digits_reward, args, train_dataset=prompts(), processing_class=TOKENIZER)
    assert (args.beta, args.vllm_importance_sampling_correction) == (0.1, True)


@pytest.mark.parametrize(
    ("name", "value"), [("loss_type", "nonsense"), ("importance_sampling_level", "x"), ("top_entropy_quantile", -7.0)]
)
def test_an_argument_that_the_host_does_not_check_is_refused_at_once(name: str, value: Any, tmp_path: Path) -> None:
    host_of(tmp_path, tiny_policy(), **{name: value})
    with pytest.raises(ConfigError, match=str(value)):
        trainer_of(tmp_path, settings={name: value})


# ---------------------------------------------------------------------- rows on their way to the loss


def rises(completions: list[str], **_: Any) -> list[float]:
    """Whole numbers, of which means and differences are exact."""
    return [float(round(score)) for score in digits_reward(completions)]


def sometimes_unscored(completions: list[str], **_: Any) -> list[float | None]:
    """No reward for every fifth completion, nor for any of the second prompt."""
    scores = rises(completions)
    return [None if i % 5 == 0 or 4 <= i < 8 else score for i, score in enumerate(scores)]


def test_groups_and_rewards_stay_with_their_rows(tmp_path: Path) -> None:
    policy = Watched()
    settings = {"gradient_accumulation_steps": 4, "max_steps": 2}
    trainer_of(tmp_path, Objective(policy=policy), settings=settings).train()
    assert len(policy.seen) == 8
    split_groups = 0
    for generation in (policy.seen[:4], policy.seen[4:]):
        rewards, group = joined(generation, "rewards"), joined(generation, "group")
        expected = digits_reward([text for batch in generation for text in texts(batch)])
        torch.testing.assert_close(rewards, torch.tensor(expected))
        assert group.unique(return_counts=True)[1].tolist() == [4] * 8
        whole = TokenBatch(mask=torch.ones(32, 1), rewards=rewards, group=group)
        torch.testing.assert_close(GroupNorm().compute(whole), joined(generation, "advantages"))
        split_groups += sum(len(batch.column("group").unique()) > 2 for batch in generation)
    assert split_groups > 0


def test_groups_of_two_generations_in_one_step_are_told_apart(tmp_path: Path) -> None:
    policy = Watched().mean("token", over="micro_batch")
    settings = {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "max_steps": 1}
    trainer_of(tmp_path, Objective(policy=policy), settings=settings).train()
    assert joined(policy.seen, "group").unique(return_counts=True)[1].tolist() == [4] * 8


def test_rollout_parts_see_the_whole_generation_in_its_order(tmp_path: Path) -> None:
    policy, advantage = Watched(), WatchedAdvantage()
    settings = {"gradient_accumulation_steps": 2, "max_steps": 2}
    trainer_of(tmp_path, Objective(policy=policy), advantage=advantage, settings=settings).train()
    assert len(advantage.seen) == 2
    for i, whole in enumerate(advantage.seen):
        assert (whole.column("group") - whole.column("group").min()).tolist() == [row // 4 for row in range(16)]
        assert sorted(texts(whole)) == sorted(t for batch in policy.seen[2 * i : 2 * i + 2] for t in texts(batch))
        assert texts(whole) != [text for batch in policy.seen[2 * i : 2 * i + 2] for text in texts(batch)]


# Differences are exact for whole numbers; a division by the standard deviation rounds once in another place.
@pytest.mark.parametrize(
    ("advantage", "scale", "reward", "difference"),
    [
        (GroupCenter(), "none", rises, 0.0),
        (GroupNorm(), "group", rises, 3e-7),
        (GroupNorm(), "group", sometimes_unscored, 3e-7),
        (BatchStd(), "batch", digits_reward, 3e-7),
    ],
)
def test_an_explicit_advantage_is_the_hosts(
    advantage: RolloutPart, scale: str, reward: Callable[..., Any], difference: float, tmp_path: Path
) -> None:
    seen: list[Tensor] = []
    for part, scale_rewards in ((None, scale), (advantage, "group")):
        policy = Watched()
        settings = {"max_steps": 1, "gradient_accumulation_steps": 4, "scale_rewards": scale_rewards}
        trainer = trainer_of(tmp_path, Objective(policy=policy), advantage=part, reward=reward, settings=settings)
        trainer.train()
        seen.append(joined(policy.seen, "advantages"))
        assert sorted(trainer._logs["advantages"]) == sorted(seen[-1].tolist())
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=difference)
    assert not seen[0].isnan().any()
    assert int((seen[0] == 0).sum()) >= (10 if reward is sometimes_unscored else 0)
    assert seen[0].count_nonzero() > 10


def test_truncated_rows_are_marked(tmp_path: Path) -> None:
    policy = Watched()
    settings = {"gradient_accumulation_steps": 2, "max_steps": 2, "max_completion_length": 5}
    trainer_of(tmp_path, Objective(policy=policy), settings=settings).train()
    truncated = joined(policy.seen, "truncated").tolist()
    last = [int(row[kept][-1]) for b in policy.seen for row, kept in zip(b.column("token_ids"), b.mask, strict=True)]
    assert truncated == [token not in (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) for token in last]
    assert 0 < sum(truncated) < len(truncated)


def test_raw_importance_ratios_reach_the_loss(tmp_path: Path) -> None:
    """The host hands on ratios that are clipped already; a part has to see what the engine really did."""
    clip = 1.05
    policy = Watched(weights=(TruncatedIS(max=clip, unscored="keep"),))
    folder = run_folder(tmp_path / "folder")
    trainer = trainer_of(
        tmp_path, Objective(policy=policy), sampler=True, run=folder, settings={"max_steps": 1, **TWICE}
    )
    trainer.train()
    ratios = [(b.logp("old") - b.logp("sampler"))[b.loss_mask].exp() for b in policy.seen]
    largest = float(torch.cat(ratios).nan_to_num(0.0).max())
    assert largest > 1.2
    row = folder.metrics().rows[0].values
    assert row["objective/policy/truncated_is/raw_max"] == pytest.approx(largest)
    assert row["objective/policy/truncated_is/max"] == pytest.approx(clip)
    assert row["objective/policy/unscored"] == sum(int(r.isnan().sum()) for r in ratios) > 8


# ---------------------------------------------------------------------- evaluation


EVERY_PHASE = Objective(
    policy=ClippedSurrogate(weights=(TopEntropy(fraction=0.5),)), spread=KLCov(fraction=0.1), advantage=GroupNorm()
)


def test_evaluation_has_groups_of_its_own_size(tmp_path: Path) -> None:
    policy, advantage = Watched(), WatchedAdvantage()
    trainer = trainer_of(
        tmp_path,
        Objective(policy=policy),
        advantage=advantage,
        eval_dataset=prompts(8),
        settings={"num_generations_eval": 2, "max_steps": 1},
    )
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    assert [batch.column("group").unique(return_counts=True)[1].tolist() for batch in advantage.seen] == [[2] * 4] * 2
    trained = len(policy.seen)
    trainer.train()
    assert policy.seen[trained].column("group").unique(return_counts=True)[1].tolist() == [4] * 2


@pytest.mark.parametrize("objective", [None, EVERY_PHASE])
def test_evaluation_before_and_after_training_changes_nothing(objective: Objective | None, tmp_path: Path) -> None:
    """Parts of all phases run in an evaluation too, where no step is open and nothing has been accumulated."""
    ends = []
    for evaluate in (False, True):
        settings = {"max_steps": 3, **TWICE, "seed": 3}
        trainer = trainer_of(tmp_path, objective, eval_dataset=prompts(8), settings=settings)
        if evaluate:
            state = torch.get_rng_state()
            assert math.isfinite(trainer.evaluate()["eval_loss"])
            torch.set_rng_state(state)
        trainer.train()
        ends.append(weights(trainer))
    assert_same_weights(*ends)


def test_a_first_evaluation_equals_the_hosts(tmp_path: Path) -> None:
    host = GRPOTrainer(
        tiny_policy(),
        digits_reward,
        config(tmp_path),
        train_dataset=prompts(),
        eval_dataset=prompts(8),
        processing_class=TOKENIZER,
    )
    found = [host.evaluate(), trainer_of(tmp_path, eval_dataset=prompts(8)).evaluate()]
    times = [key for key in found[0] if key.endswith(("time", "runtime", "per_second"))]
    theirs, ours = ({k: v for k, v in metrics.items() if k not in times} for metrics in found)
    assert {key: ours[key] for key in theirs} == pytest.approx(theirs)
    assert all(key.startswith("eval_objective/") for key in ours.keys() - theirs.keys())


# ---------------------------------------------------------------------- what the host would hide or lose


@dataclass(frozen=True, kw_only=True)
class NotANumberOnce(ClippedSurrogate):
    """A surrogate whose value, but not its gradient, is NaN at the second batch."""

    calls: list[int] = field(default_factory=list, repr=False, compare=False)

    def loss(self, batch: TokenBatch) -> Loss:
        """The loss plus a constant."""
        self.calls.append(len(self.calls))
        values, metrics = super().loss(batch)
        return Loss(values + (math.nan if len(self.calls) == 2 else 0.0), metrics)


def test_a_loss_that_is_not_a_number_is_seen(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "folder")
    trainer = trainer_of(tmp_path, Objective(policy=NotANumberOnce()), run=folder, settings={"max_steps": 3})
    trainer.train()
    assert [math.isnan(row.values["objective/loss"]) for row in folder.metrics().rows] == [False, True, False]
    assert [math.isnan(row.values["objective/policy/loss"]) for row in folder.metrics().rows] == [False, True, False]
    (event,) = folder.events().of("non_finite")
    assert event.step == 2
    assert event.fields["keys"] == ["objective/loss", "objective/policy/loss"]
    # The host replaces a loss by the mean of what came before, and leaves NaN out of every metric.
    logs = trainer.state.log_history[:3]
    assert all(math.isfinite(row["loss"]) for row in logs)
    assert [row["objective/loss"] is None for row in logs] == [False, True, False]


@pytest.mark.parametrize("objective", [None, presets.dapo(), presets.grpo(beta=0.0)])
def test_a_batch_of_truncated_completions_teaches_nothing(objective: Objective | None, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "folder")
    endless = {"suppress_tokens": [TOKENIZER.eos_token_id, TOKENIZER.pad_token_id]}
    settings = {"mask_truncated_completions": True, "generation_kwargs": endless, "max_steps": 2}
    trainer = trainer_of(tmp_path, objective, run=folder, settings=settings)
    before = weights(trainer)
    trainer.train()
    assert [row.values["objective/loss"] for row in folder.metrics().rows] == [0.0, 0.0]
    assert_same_weights(weights(trainer), before)


def no_difference(completions: list[str], **_: Any) -> list[float]:
    """Rewards that teach nothing."""
    return [1.0] * len(completions)


@pytest.mark.parametrize("objective", [presets.dapo(), presets.dapo() + 0.0 * JensenShannon(form="exact")])
@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_the_auxiliary_loss_of_experts_is_kept(objective: Objective, coefficient: float, tmp_path: Path) -> None:
    settings = {"router_aux_loss_coef": coefficient, "max_steps": 1, "gradient_accumulation_steps": 2}
    policy = tiny_moe(TOKENIZER, seed=1)
    trainer = trainer_of(tmp_path, objective, model=policy, reward=no_difference, signals=None, settings=settings)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert bool(moved) == (coefficient > 0)
    if coefficient:
        assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(expected_aux_loss(trainer), rel=1e-5)


def expected_aux_loss(trainer: Any) -> float:
    """The auxiliary loss of the starting weights on the two micro-batches that were trained on."""
    start = tiny_moe(TOKENIZER, seed=1)
    losses = []
    for inputs in trainer._buffered_inputs:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with torch.no_grad():
            losses.append(float(start(ids, attention_mask=mask, output_router_logits=True).aux_loss))
    return sum(losses) / len(losses)
