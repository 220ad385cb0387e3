"""What a recipe holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlstab.errors import RecipeError
from rlstab.losses import Advantage, Objective
from rlstab.optim import GradientStabiliser
from rlstab.recipes._buffer import BufferSource
from rlstab.recipes._engines import EngineSource
from rlstab.recipes._environments import EnvironmentSource
from rlstab.recipes._expert import ExpertRows
from rlstab.recipes._gradients import OptimizerSource
from rlstab.recipes._models import LoRA, ModelSource
from rlstab.recipes._supervised import Supervised, refuse_rollouts
from rlstab.recipes._warmup import WarmUp
from rlstab.recipes._watching import Watching
from rlstab.tasks import Correct, EmbeddedTask, Reward, Task, reward_functions
from rlstab.trainers import Guidance, Replay, Resample, Reset, Signals, TeacherServer

__all__ = ["HeldOut", "Recipe"]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """How the policy is evaluated on held-out prompts, before and after training.

    Args:
        prompts: number of held-out prompts.
        samples: completions per prompt.
        ks: the k of each pass@k, at most `samples`.
        temperature: sampling temperature.
        every: also evaluate after every so many optimizer steps; None does not.
        batch_size: most completions sampled at once.
        max_new_tokens: longest completion, in tokens; None for the trainer's `max_completion_length`, and where nothing
            is sampled in training for that of an embedded task's solutions.

    Example:
        >>> HeldOut(prompts=50, samples=4, ks=(1, 4)).ks
        (1, 4)
    """

    prompts: int = 200
    samples: int = 8
    ks: tuple[int, ...] = (1, 8)
    temperature: float = 1.0
    every: int | None = None
    batch_size: int = 512
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "prompts": (self.prompts, self.prompts >= 1, "at least 1"),
            "samples": (self.samples, self.samples >= 1, "at least 1"),
            "ks": (self.ks, all(1 <= k <= self.samples for k in self.ks), f"each from 1 to samples ({self.samples})"),
            "temperature": (self.temperature, self.temperature > 0, "a positive number"),
            "every": (self.every, self.every is None or self.every >= 1, "at least 1, or null"),
            "batch_size": (self.batch_size, self.batch_size >= 1, "at least 1"),
            "max_new_tokens": (
                self.max_new_tokens,
                self.max_new_tokens is None or self.max_new_tokens >= 1,
                "at least 1, or null",
            ),
        }
        for key, (value, holds, wanted) in checks.items():
            if not holds:
                raise RecipeError(f"HeldOut.{key}: expected {wanted}, got {value}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run: what is trained, on what, with which objective.

    Args:
        model: where the model comes from.
        task: prompts, and the reward that says whether a completion is right.
        rewards: what training rewards, by name, each part logged on its own; None for the task's reward alone.
            Evaluation always asks the task.
        environment: what answers the policy in the turns of a conversation; None for one turn.
        objective: what is minimised; None leaves the loss to the trainer's own arguments (`loss_type`, `beta`, ...).
        advantage: how rewards become advantages; None leaves it to the trainer's own arguments.
        engine: what samples the completions, with the log-prob of every token; None leaves it to the host (`use_vllm`).
        replay: for a mixture of experts, whose expert choices every pass of the policy takes: `R3` those of an engine
            that returns routes, `R2` those of the policy at the start of the batch; None leaves it its own.
        gradients: what every gradient passes before the update, in turn, such as `[SkipSpikes, ZClip]`. They have to
            see it unclipped, so `trainer.max_grad_norm` is 0 beside them.
        optimizer: an optimizer that holds out spikes; None leaves it to the trainer's arguments (`optim`).
        supervised: train on demonstrations alone instead of rollouts, without the keys that act on these; None for RL.
        buffer: completions of the policy before training, for terms with `rows: buffer`; None samples none.
        demonstrations: completions of an expert as rows of their own, for terms with `rows: demonstration`; None: none.
        guidance: how much of an expert's demonstration rollouts begin with, such as `MicroGroups`; None for nothing.
        teachers: models or servers that answer for sources of these names, as in `reference: teacher`.
        reset: when the source `anchor` becomes the policy as it is, and whether the optimizer forgets; None never.
        resample: sample other prompts in place of groups without a signal; None trains on all.
        adapter: train low-rank updates instead of the weights.
        warmup: supervised warm-up on the task's demonstrations; None starts from the model as it is.
        evaluation: evaluation on held-out prompts.
        signals: what the trainer measures beside the loss; None for nothing.
        watch: which rules raise alarms, and whether they act, by a guard that goes back where a collapse begins; None
            for no alarms.
        trainer: arguments of the host's `GRPOConfig` (`SFTConfig` where supervised) by name;
            output folder and seed are the recipe's own.
        prompts: number of training prompts, drawn once; training goes through them again and again.
        output: run folder; None stands for a new one below `runs/` when a recipe file is read.
        seed: seed of weights, prompts, warm-up, training and evaluation.
        threads: CPU threads of torch; None leaves torch's choice. Very small models are fastest with one.

    Example:
        >>> from rlstab.losses import presets
        >>> from rlstab.recipes import TinyModel
        >>> from rlstab.tasks import SortDigits
        >>> recipe = Recipe(model=TinyModel(), task=SortDigits(digits=4), objective=presets.dapo(), seed=1)
        >>> recipe.model.load(recipe.task, seed=recipe.seed).model.num_parameters()
        83520
    """

    model: ModelSource
    task: Task
    rewards: Mapping[str, Reward] | None = None
    environment: EnvironmentSource | None = None
    objective: Objective | None = None
    advantage: Advantage | None = None
    engine: EngineSource | None = None
    replay: Replay | None = None
    gradients: Sequence[GradientStabiliser] = ()
    optimizer: OptimizerSource | None = None
    supervised: Supervised | None = None
    buffer: BufferSource | None = None
    demonstrations: ExpertRows | None = None
    guidance: Guidance | None = None
    teachers: Mapping[str, ModelSource | TeacherServer] = field(default_factory=dict)
    reset: Reset | None = None
    resample: Resample | None = None
    adapter: LoRA | None = None
    warmup: WarmUp | None = None
    evaluation: HeldOut = HeldOut()
    signals: Signals | None = field(default_factory=Signals)
    watch: Watching | None = field(default_factory=Watching)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    prompts: int = 4096
    output: Path | None = None
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.warmup is not None and not isinstance(self.task, EmbeddedTask):
            raise RecipeError(
                f"warmup: {type(self.task).__name__} has no demonstrations to warm up on, embedded tasks do; "
                "set warmup: null"
            )
        refuse_rollouts(self)
        if self.rewards is not None and self.trainer.get("reward_weights") is not None:
            raise RecipeError("trainer.reward_weights: not beside rewards; set the `weight` of each part instead")
        reward_functions(self.named_rewards, self.task)
        if self.prompts < 1:
            raise RecipeError(f"prompts: expected at least 1, got {self.prompts}")
        if self.threads is not None and self.threads < 1:
            raise RecipeError(f"threads: expected at least 1, or null, got {self.threads}")

    @property
    def named_rewards(self) -> Mapping[str, Reward]:
        """The parts of the reward by the names under which they are logged."""
        return {"reward": Correct()} if self.rewards is None else self.rewards
