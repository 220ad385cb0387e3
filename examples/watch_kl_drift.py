"""Watch how far a policy drifts from where it started, and how far the sampler lags behind the trainer.

The host's own loss is kept: only the trainer class changes. The completions are sampled by a copy of the policy in
bfloat16, so that trainer and sampler disagree as they do between a training framework and an inference engine.

python examples/watch_kl_drift.py [steps]
"""

import functools
import sys
import tempfile
from pathlib import Path

import torch

from rlstab.recipes import TinyModel, WarmUp, warm_up
from rlstab.record import RunFolder
from rlstab.report import write_plots
from rlstab.rollouts import TransformersEngine
from rlstab.tasks import SortDigits
from rlstab.trainers import GRPOConfig, Signals, StableGRPOTrainer


def main(steps: int = 30) -> None:
    """Train, print the drift as it was measured, and draw it."""
    torch.set_num_threads(1)  # a model this small is slower on two
    task = SortDigits(digits=6)
    model, tokenizer = TinyModel().load(task, seed=0)
    warm_up(model, tokenizer, task, WarmUp(steps=300 if steps >= 30 else 5))
    folder = Path(tempfile.mkdtemp()) / "run"
    run = RunFolder.create(folder, config_text="example: watch_kl_drift\n")

    trainer = StableGRPOTrainer(
        model,
        reward_funcs=task.reward,
        args=GRPOConfig(
            output_dir=str(run.checkpoints),
            max_steps=steps,
            per_device_train_batch_size=64,
            max_completion_length=8,
            learning_rate=5e-4,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
        ),
        train_dataset=task.prompts(512),
        processing_class=tokenizer,
        engine=functools.partial(TransformersEngine, share=False, dtype=torch.bfloat16),
        signals=Signals(drift_every=max(1, steps // 5)),
        run=run,
    )
    trainer.train()

    for row in run.metrics().rows:
        values = row.values
        if "drift/initial/kl" in values:
            print(
                f"step {row.step:3d}  reward {values['train/reward']:.2f}  "
                f"KL to the start {values['drift/initial/kl']:.4f} ± {values['drift/initial/kl_se']:.4f}  "
                f"trainer vs sampler k3 {values['mismatch/k3']:.1e}"
            )
    for plot in write_plots(run):
        print(plot)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
