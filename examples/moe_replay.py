"""Replay the engine's expert choices in the trainer, so that both run the same sub-network of a mixture of experts.

The completions are sampled by a copy of the policy in bfloat16. Rounding makes it choose other experts for some tokens;
without replay the trainer scores these tokens with experts that never saw them.

python examples/moe_replay.py [steps]
"""

import copy
import functools
import sys
import tempfile
from pathlib import Path

import torch

from rlstab.losses import presets
from rlstab.recipes import TinyModel, WarmUp, warm_up
from rlstab.record import RunFolder
from rlstab.rollouts import TransformersEngine
from rlstab.tasks import SortDigits
from rlstab.trainers import GRPOConfig, StableGRPOTrainer

SHOWN = {
    "mismatch/k3": "trainer vs sampler, k3",
    "routes/flip_share": "pairs (token, layer) that ran other experts than in the engine",
    "routes/own_flip_share": "pairs at which the trainer would choose otherwise",
}


def main(steps: int = 30) -> None:
    """Train the same policy twice, and print how far trainer and engine were apart."""
    torch.set_num_threads(1)  # a model this small is slower on two
    task = SortDigits(digits=6)
    start, tokenizer = TinyModel(experts=8).load(task, seed=0)
    warm_up(start, tokenizer, task, WarmUp(steps=300 if steps >= 30 else 5))

    for replay in (None, "R3"):
        run = RunFolder.create(Path(tempfile.mkdtemp()) / "run", config_text="example: moe_replay\n")
        trainer = StableGRPOTrainer(
            copy.deepcopy(start),
            reward_funcs=task.reward,
            args=GRPOConfig(
                output_dir=str(run.checkpoints),
                max_steps=steps,
                per_device_train_batch_size=64,
                steps_per_generation=2,
                max_completion_length=8,
                learning_rate=5e-4,
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
            ),
            objective=presets.dapo(),
            train_dataset=task.prompts(512),
            processing_class=tokenizer,
            engine=functools.partial(TransformersEngine, share=False, dtype=torch.bfloat16, routes=True),
            replay=replay,
            run=run,
        )
        trainer.train()
        # The first update of each batch: the second adds what the update has moved.
        fresh = [row.values for row in run.metrics().rows if row.step % 2 == 1]
        print(f"replay={replay}")
        for key, meaning in SHOWN.items():
            print(f"  {key:22} {sum(row[key] for row in fresh) / len(fresh):.1e}  {meaning}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
