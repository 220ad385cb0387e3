"""Watch a trainer that knows nothing of rlstab, see an alarm, and go back before a fault.

TRL's own SFTTrainer fine-tunes a tiny model. In the middle of the run its weights are spoiled, as a bad node or a spike
would spoil them. The watch sees the loss, goes back to the last healthy snapshot, and the run ends as if nothing had
been.

python examples/watch_any_trainer.py [steps]
"""

import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

import rlstab
from rlstab.models import tiny_causal_lm, tiny_tokenizer
from rlstab.monitors import Level, RollBack, Rule, default_rules
from rlstab.probes import Activations, Attention
from rlstab.record import RunFolder


class Fault(TrainerCallback):
    """Spoils the weights once."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            for parameter in kwargs["model"].parameters():
                parameter.data += torch.randn_like(parameter)


def main(steps: int = 40) -> None:
    """Train, and print what the watch wrote into the run folder."""
    torch.set_num_threads(1)  # a model this small is slower on two
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    tokenizer = tiny_tokenizer("0123456789=")
    folder = Path(tempfile.mkdtemp())
    trainer = SFTTrainer(
        tiny_causal_lm(tokenizer, seed=1, hidden=32, layers=2, heads=2),
        SFTConfig(
            output_dir=str(folder / "checkpoints"),
            max_steps=steps,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            per_device_train_batch_size=8,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": [f"{i % 10}={i % 10}" for i in range(256)]}),
        processing_class=tokenizer,
    )
    trainer.add_callback(Fault(step=max(steps // 2, 1)))

    run = RunFolder.create(folder / "run", config_text="example: watch_any_trainer\n")
    loss = Rule(
        signal="step/loss",
        detector=Level(above=3.5, steps=1),
        severity="critical",
        action=RollBack(),
        cause="optimisation",
    )
    rlstab.watch(
        trainer,
        rules=[loss, *default_rules(act=True)],
        guard=rlstab.Guard(every=5),
        probes=[Activations(), Attention()],
        run=run,
    )
    trainer.train()

    for event in run.events().rows:
        print(f"step {event.step}: {event.kind}")
    rows = run.metrics().rows
    print(f"loss {rows[0].values['step/loss']:.2f} at the start, {rows[-1].values['step/loss']:.2f} at the end")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
