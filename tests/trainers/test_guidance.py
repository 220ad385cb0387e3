"""Rollouts that begin with an expert's tokens, and demonstrations beside the rollouts, in steps of the trainer."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from loss_vectors import vectors
from small_runs import TOKENIZER, assert_same_weights, tiny_adapted, trainer_of, weights

from rlstab.batch import TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses import (
    EXPERT_PREFIX,
    PSFT,
    SFT,
    ClippedSurrogate,
    ForwardKL,
    GradientSwitch,
    GroupNorm,
    ImportanceSFT,
    Loss,
    Objective,
    PolicyGradient,
    Term,
    TrSFT,
    ZLoss,
    expert_prefix,
    presets,
)
from rlstab.rollouts import TransformersEngine
from rlstab.trainers import (
    Branching,
    Demonstrations,
    Guidance,
    Hints,
    MicroGroups,
    PrefixSampling,
    Progress,
    WholeDemonstrations,
)

EXPERT, OTHER = "31415926", "27182818"
GROUP = 4
PROMPTS = [f"{i}+{i}=" for i in range(6)]
SETTINGS: dict[str, Any] = {"max_completion_length": 9, "max_steps": 2, "per_device_train_batch_size": 8}


def data(expert: str | None = EXPERT) -> Dataset:
    others = [OTHER if place else None for place in range(len(PROMPTS))]
    return Dataset.from_dict({"prompt": PROMPTS, "demonstration": [expert] * len(PROMPTS), "other": others})


def progress(passed: list[bool | None], **more: Any) -> Progress:
    return Progress(step=0, draw=random.Random(0), passed=passed, **more)


# ---------------------------------------------------------------------- schedules


def test_prefixes_are_sampled_as_in_the_vector() -> None:
    (vector,) = vectors("prefix_rft_schedule")
    guidance = PrefixSampling(steps=vector["inputs"]["total"])
    assert [guidance.low(step) for step in vector["inputs"]["step"]] == pytest.approx(vector["expected"]["low"])
    drawn = [guidance.plan(0, Progress(step=250, draw=random.Random(i), passed=[None] * 3)) for i in range(50)]
    assert all(plan[0] == plan[1] == 0.0 and 0.5 <= plan[2] <= 0.95 for plan in drawn)


def test_hints_are_drawn_as_in_the_vector() -> None:
    (vector,) = vectors("uft_hint_prob")
    hints = Hints(steps=vector["hyper"]["T_hint"])
    assert [hints.probability(step) for step in vector["inputs"]["step"]] == pytest.approx(vector["expected"]["prob"])
    plans = [hints.plan(0, Progress(step=150, draw=random.Random(i), passed=[None] * 2)) for i in range(400)]
    assert all(plan[0] == plan[1] and plan[0] * 5 == int(plan[0] * 5) for plan in plans)
    assert sum(plan[0] for plan in plans) / 400 == pytest.approx(0.5, abs=0.05)
    assert hints.plan(0, Progress(step=301, draw=random.Random(0), passed=[None])) == {0: 0.0}


def test_micro_groups_are_guided_as_in_the_vector() -> None:
    (vector,) = vectors("trapo_hint_levels")
    hyper = vector["hyper"]
    guidance = MicroGroups(sizes=hyper["sizes"], shares=hyper["ratios"], thresholds=(-1.0, 2 / 4, 4 / 6, 7 / 7))
    levels = []
    for correct in vector["inputs"]["cases"]:
        passed: list[bool | None] = [None] * 8
        first, found = 0, []
        for turn, size in enumerate(hyper["sizes"]):
            plan = guidance.plan(turn, progress(passed))
            assert set(plan) == set(range(first, first + size))
            found.append(hyper["ratios"].index(plan[first]))
            if turn < len(correct):
                passed[first : first + size] = [place < correct[turn] for place in range(size)]
            first += size
        assert found[0] == 0
        levels.append(found[1:])
    assert levels == vector["expected"]["hint_level_of_group_2_3_4"]


def test_a_prefix_may_go_on_to_the_end_of_its_paragraph() -> None:
    pieces = ["So", ",", "\n\n", "then", " it", ".\n", "\n", "is", " so", "."]
    guidance = MicroGroups(paragraphs=True)
    shares = [0.0, 0.1, 0.3, 0.31, 0.5, 0.7, 0.8]
    assert [guidance.cut(share, pieces) for share in shares] == [0, 3, 3, 3, 7, 7, 8]
    assert [MicroGroups(paragraphs=True, reach=0.1).cut(share, pieces) for share in shares] == [0, 1, 3, 3, 5, 7, 8]
    assert [MicroGroups().cut(share, pieces) for share in shares] == [0, 1, 3, 3, 5, 7, 8]
    with pytest.raises(ConfigError, match=r"MicroGroups\.reach: expected a share from 0 to 1, got 2"):
        MicroGroups(reach=2)


@pytest.mark.parametrize("needed", [0.1, 0.3, 0.5, 0.9, 2.0])
def test_branches_begin_at_the_shortest_prefix_that_helps(needed: float) -> None:
    guidance = Branching(anchors=8)
    state, best = progress([False, False], tried=[{0: 0.0, 1: 0.0}], succeeded=[False]), None
    for turn in range(1, guidance.turns):
        share = guidance.plan(turn, state)[0]
        state.tried.append({0: share, 1: share})
        state.succeeded.append(share >= needed)
        best = share if share >= needed else best
    within = [anchor / 8 for anchor in range(1, 8) if anchor / 8 >= needed]
    assert best == (within[0] if within else None)
    assert guidance.plan(1, progress([True, False], tried=[{}], succeeded=[True])) == {}


# ---------------------------------------------------------------------- in the trainer


@dataclass(frozen=True, kw_only=True)
class Seen(SFT):
    """SFT that keeps the batches of prefixes it is shown."""

    seen: list[TokenBatch] = field(default_factory=list, repr=False, compare=False)

    def loss(self, batch: TokenBatch) -> Loss:
        """The loss, unchanged."""
        self.seen.append(batch)
        return super().loss(batch)


@dataclass(frozen=True, kw_only=True)
class SeenPolicy(PolicyGradient):
    """A policy gradient that keeps the batches it is shown."""

    seen: list[TokenBatch] = field(default_factory=list, repr=False, compare=False)

    def loss(self, batch: TokenBatch) -> Loss:
        """The loss, unchanged."""
        self.seen.append(batch)
        return super().loss(batch)


def guided(
    output: Path, objective: Objective | Term, guidance: Guidance | None, *, expert: str | None = EXPERT, **more: Any
) -> Any:
    settings = {**SETTINGS, "num_generations": GROUP, **more.pop("settings", {})}
    return trainer_of(output, objective, data=data(expert), settings=settings, guidance=guidance, **more)


def begins_as_the_expert(text: str) -> int:
    return next((size for size in range(len(EXPERT), 0, -1) if text.startswith(EXPERT[:size])), 0)


@pytest.mark.parametrize("engine", [None, TransformersEngine])
def test_prefixes_are_told_from_what_the_policy_wrote(engine: Any, tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Half(Guidance):
        def plan(self, turn: int, progress: Progress) -> Mapping[int, float]:
            return {0: 0.0, 1: 0.5, 2: 0.5, 3: 1.0}

    policy, imitation = SeenPolicy(), Seen()
    trainer = guided(
        tmp_path, Objective(policy=policy, imitation=imitation, advantage=GroupNorm()), Half(), engine=engine
    )
    trainer.train()
    for rollouts, prefixes in zip(policy.seen, imitation.seen, strict=True):
        marked = rollouts.part(EXPERT_PREFIX).bool()
        lengths = marked.sum(-1)
        assert sorted(lengths.tolist()) == [0, 0, 4, 4, 4, 4, 9, 9]
        ids = rollouts.column("token_ids")
        expert = torch.tensor([*TOKENIZER(EXPERT)["input_ids"], TOKENIZER.eos_token_id])
        for row, size in enumerate(lengths.tolist()):
            assert torch.equal(ids[row, :size], expert[:size])
        assert not (rollouts.loss_mask & marked).any()
        assert torch.equal(rollouts.loss_mask, rollouts.mask & ~marked)
        # Of two rollouts with the same prefix one is imitated; whole demonstrations too.
        imitated = prefixes.loss_mask.sum(-1)
        assert sorted(imitated.tolist()) == [0, 0, 0, 0, 4, 4, 9, 9]
        assert (prefixes.logp("policy")[prefixes.loss_mask] < 0).all()
        counts = prefixes.counts["step"]
        assert (float(counts.tokens), float(counts.sequences)) == (26.0, 8.0)
        torch.testing.assert_close(prefixes.column("rewards"), rollouts.column("rewards"))
        torch.testing.assert_close(prefixes.column("advantages"), rollouts.column("advantages"))
    logged = trainer.state.log_history[0]
    assert logged["rollout/guided"] == pytest.approx(0.75)
    assert logged["demonstrations/empty"] == 0.0


def test_the_gradient_of_prefixes_is_that_of_a_pass_of_their_own(tmp_path: Path) -> None:
    trainer = guided(tmp_path, presets.trapo(length=10, entropy=0.0), WholeDemonstrations(), settings={"max_steps": 1})
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    only = Objective(imitation=trainer.objective.terms["imitation"])
    trainer.objective = only
    loss = trainer.compute_loss(trainer.model, inputs)
    ids = torch.tensor([*TOKENIZER(EXPERT)["input_ids"], TOKENIZER.eos_token_id])
    rows = inputs["rlstab_imitated"].any(-1).nonzero().flatten()
    assert len(rows) == 2
    expected = torch.zeros(())
    for row in rows:
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
        sequence = torch.cat([prompt, ids]).unsqueeze(0)
        logp = trainer.model(sequence).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(-1, ids.unsqueeze(-1))
        expected = expected - ((logp.exp().detach() / 0.1).clamp(max=1) * logp).sum()
    expected = expected / (8 * 10)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(value, trainer.model.lm_head.weight)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_later_rollouts_are_guided_where_earlier_ones_fail(tmp_path: Path) -> None:
    """Prompts with an even first digit are solved by anything, the others only by what the expert begins with.

    The last rollout of a prompt is guided by another expert, if there is one.
    """

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [
            float(int(prompt[0]) % 2 == 0 or begins_as_the_expert(text) >= 4)
            for prompt, text in zip(prompts, completions, strict=True)
        ]

    policy, imitation = SeenPolicy(), Seen()
    guidance = MicroGroups(sizes=(2, 1, 1), shares=(0.0, 0.25, 0.5), thresholds=(-1.0, 0.5, 0.5), second="other")
    objective = Objective(policy=policy, imitation=imitation, advantage=GroupNorm())
    guided(tmp_path, objective, guidance, reward=reward).train()
    seen = {0: set[int](), 1: set[int]()}
    begun: list[str] = []
    for rollouts in policy.seen:
        groups = rollouts.column("group")
        lengths = rollouts.part(EXPERT_PREFIX).sum(-1)
        for group in groups.unique():
            of_group = sorted(lengths[groups == group].tolist())
            solved = bool(rollouts.column("rewards")[groups == group].min() == 1)
            assert of_group == ([0, 0, 0, 0] if solved else [0, 0, 2, 4])
            seen[int(solved)].add(int(group))
        for row in (lengths == 4).nonzero().flatten():
            begun.append(str(TOKENIZER.decode(rollouts.column("token_ids")[row, :4])))
    assert set(begun) <= {EXPERT[:4], OTHER[:4]}
    assert OTHER[:4] in begun
    assert seen[0]
    assert seen[1]


def test_branches_replace_rollouts_that_all_fail(tmp_path: Path) -> None:
    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(begins_as_the_expert(text) >= 4) for text in completions]

    policy = SeenPolicy()
    trainer = guided(tmp_path, Objective(policy=policy, advantage=GroupNorm()), Branching(anchors=4), reward=reward)
    trainer.train()
    for rollouts in policy.seen:
        assert rollouts.part(EXPERT_PREFIX).sum(-1).tolist() == [4] * 8  # of 9 tokens: a half, a quarter is too short
        assert rollouts.column("rewards").eq(1).all()


def test_prefixes_may_carry_the_advantage_of_their_rollout(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class SeenClipped(ClippedSurrogate):
        seen: list[TokenBatch] = field(default_factory=list, repr=False, compare=False)

        def loss(self, batch: TokenBatch) -> Loss:
            self.seen.append(batch)
            return super().loss(batch)

    made = presets.prefix_rft(fraction=0.5)
    weights_of = made.terms["policy"].weights  # type: ignore[attr-defined]
    policy = SeenClipped(weights=weights_of)
    objective = Objective(policy=policy, advantage=GroupNorm())
    trainer = guided(tmp_path, objective, PrefixSampling(start=0.6, end=0.5, high=0.6), engine=TransformersEngine)
    trainer.train()
    for batch in policy.seen:
        prefix = expert_prefix(batch)
        assert sorted(prefix.sum(-1).tolist()) == [0] * 6 + [5, 5]
        assert torch.equal(batch.loss_mask, batch.mask)
        assert 0 < float((weights_of[0].factor(batch).values * prefix).sum()) < 10
    assert "objective/policy/prefix_entropy/kept" in trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("objective", "guidance"),
    [
        (presets.luffy(length=9), WholeDemonstrations()),
        (presets.srft(), WholeDemonstrations()),
        (presets.uft(kl=0.0), Hints()),
        (presets.trapo(length=9), MicroGroups(sizes=(1, 1, 1, 1))),
        (presets.bread(), Branching()),
        (presets.prefix_rft(), PrefixSampling()),
    ],
)
def test_prompts_without_a_demonstration_are_left_to_the_policy(
    objective: Objective, guidance: Guidance, tmp_path: Path
) -> None:
    trainer = guided(tmp_path, objective, guidance, expert=None, settings={"max_steps": 1})
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rollout/guided"] == 0.0
    assert logged["demonstrations/empty"] == 2.0
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_resumed_run_goes_on_with_the_same_prefixes(tmp_path: Path) -> None:
    settings = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 3, "save_steps": 1}

    def trainer(name: str, **more: Any) -> Any:
        chosen = {**settings, **more, "per_device_train_batch_size": 8}
        return guided(tmp_path / name, presets.trapo(length=9), Hints(steps=4), settings=chosen)

    whole = trainer("a", save_strategy="steps")
    whole.train()
    resumed = trainer("b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert_same_weights(weights(resumed), weights(whole))


def test_an_evaluation_is_not_guided(tmp_path: Path) -> None:
    trainer = guided(tmp_path, presets.luffy(length=9), WholeDemonstrations(), eval_dataset=data())
    found = trainer.evaluate()
    assert found["eval_objective/demonstrations/loss"] == 0.0
    assert "eval_rollout/guided" not in found


# ---------------------------------------------------------------------- rows beside the rollouts


@pytest.mark.parametrize("adapter", [False, True])
def test_demonstrations_beside_the_rollouts(adapter: bool, tmp_path: Path) -> None:
    rows = Demonstrations(Dataset.from_dict({"prompt": PROMPTS, "demonstration": [EXPERT, ""] * 3}), per_step=4)
    imitation = Seen()
    objective = Objective(
        policy=0.9 * ClippedSurrogate(),
        imitation=imitation,
        importance=ImportanceSFT(coef=0.1).mean("sequence"),
        anchor=ForwardKL(form="exact", rows="demonstration", coef=0.1),
        z=ZLoss(rows="demonstration", coef=1e-3),
        advantage=GroupNorm(),
    )
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    trainer = guided(
        tmp_path,
        objective,
        None,
        extra_rows=[rows],
        settings=settings,
        model=tiny_adapted() if adapter else None,
    )
    trainer.train()
    assert len(imitation.seen) == 4
    for batch in imitation.seen:
        assert batch.shape == (2, 9)
        assert batch.loss_mask.all()
        assert float(batch.counts["step"].tokens) == 4 * 9
    assert TOKENIZER.decode(imitation.seen[0].column("token_ids")[0], skip_special_tokens=True) == EXPERT
    assert {"objective/anchor/loss", "objective/z/loss"} <= trainer.state.log_history[0].keys()


def test_a_step_imitates_or_reinforces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    observe = GradientSwitch.observe_gradient

    def noting(self: GradientSwitch, norm: float) -> None:
        if self.of == "imitation":
            told.append(norm)
        observe(self, norm)

    monkeypatch.setattr(GradientSwitch, "observe_gradient", noting)
    objective = presets.sasr(warmup=2, kl=0.0, seed=1, gamma=2.0)
    rows = Demonstrations(data(), per_step=2)
    settings = {"max_steps": 8, "max_grad_norm": 0.05}
    trainer = guided(tmp_path, objective, None, extra_rows=[rows], settings=settings)
    trainer.train()
    assert len(told) == 8
    steps = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert told == pytest.approx([row["grad_norm"] for row in steps], rel=1e-6)  # as it was before clipping
    assert told[0] > 0.05
    switch = trainer.objective.terms["imitation"].coef
    imitated = next(n for n in reversed(told) if n == switch._latest)
    assert switch._first == told[1]
    assert switch.probability == pytest.approx(imitated / (imitated + 2.0 * told[1]), rel=1e-6)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("objective", "changes", "words"),
    [
        (presets.dapo(), {"guidance": WholeDemonstrations()}, ["no term", "'demonstration'"]),
        (presets.trapo(), {"guidance": None}, ["'imitation': 'demonstration'", "extra_rows"]),
        (presets.trapo(), {"guidance": MicroGroups()}, ["MicroGroups.sizes", "num_generations=4"]),
        (presets.luffy(), {"guidance": WholeDemonstrations(count=4)}, ["WholeDemonstrations.count", "1 to 3"]),
        (
            presets.luffy() + PSFT(),
            {"guidance": WholeDemonstrations()},
            ["'old'", "prefixes", "extra_rows=[Demonstrations(...)]"],
        ),
        (
            presets.luffy() + 0.1 * ForwardKL(form="exact"),
            {"guidance": WholeDemonstrations()},
            ["exact divergences", "sampled forms"],
        ),
        (
            presets.trapo(),
            {"guidance": WholeDemonstrations(), "extra_rows": [Demonstrations(data(), per_step=4)]},
            ["one source for each role"],
        ),
        (
            Objective(policy=ClippedSurrogate(), i=TrSFT(), advantage=GroupNorm()),
            {"guidance": None, "extra_rows": [Demonstrations(data(""), per_step=4)]},
            ["no row of the data", "'demonstration'"],
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    objective: Objective, changes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        guided(tmp_path, objective, **changes)
    message = str(refused.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


def test_data_without_demonstrations_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no column 'expert', expected it among \['prompt', 'demonstration', 'ot"):
        Demonstrations(data(), column="expert")
    with pytest.raises(ConfigError, match=r"Branching\.anchors: expected a power of 2"):
        Branching(anchors=6)
    with pytest.raises(ConfigError, match="as many sizes as shares"):
        MicroGroups(sizes=(1, 2))
