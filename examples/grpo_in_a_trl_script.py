"""A TRL script with a composed objective: swap the trainer, name the terms, keep the rest.

A tiny transformer is made and warmed up here, so the script needs no download and no GPU.

python examples/grpo_in_a_trl_script.py [steps]
"""

import sys
import tempfile

import torch

from rlstab.losses import ClippedSurrogate, ForwardKL, GroupNorm, Objective, TruncatedIS
from rlstab.recipes import TinyModel, WarmUp, warm_up
from rlstab.rollouts import TransformersEngine
from rlstab.tasks import SortDigits
from rlstab.trainers import GRPOConfig, StableGRPOTrainer


def main(steps: int = 20) -> None:
    """Train for a few steps and print how the reward and the objective moved."""
    torch.set_num_threads(1)  # a model this small is slower on two
    task = SortDigits(digits=6)
    model, tokenizer = TinyModel().load(task, seed=0)
    warm_up(model, tokenizer, task, WarmUp(steps=300 if steps >= 20 else 5))

    trainer = StableGRPOTrainer(
        model,
        reward_funcs=task.reward,
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            max_steps=steps,
            per_device_train_batch_size=64,
            steps_per_generation=2,
            max_completion_length=8,
            learning_rate=5e-4,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=1,
        ),
        train_dataset=task.prompts(512),
        processing_class=tokenizer,
        objective=Objective(
            policy=ClippedSurrogate(low=0.2, high=0.28, weights=[TruncatedIS(max=2.0)]).mean("token"),
            drift=0.05 * ForwardKL(reference="initial").mean("token"),
        ),
        advantage=GroupNorm(),
        engine=TransformersEngine,
    )
    trainer.train()

    rows = [row for row in trainer.state.log_history if "objective/loss" in row]
    rewards = [row["reward"] for row in rows if "reward" in row]
    print(f"reward {rewards[0]:.2f} -> {rewards[-1]:.2f}")
    for key in ("objective/policy/loss", "objective/drift/loss", "mismatch/k3", "policy/entropy"):
        print(f"{key:24s} {rows[0][key]:+.2e} -> {rows[-1][key]:+.2e}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
