"""Repeated attempts inside the host's trainer: its tool calls reach the environment, and the reward sees them."""

import string
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset

from rlstab.models import tiny_causal_lm, tiny_tokenizer
from rlstab.tasks import SortDigits, TryAgain, UnaryFeedback, reward_functions
from rlstab.trainers import GRPOConfig, StableGRPOTrainer

TEMPLATE = (Path(trl.__file__).parent / "chat_templates/qwen3.jinja").read_text()
CALL = '<tool_call>\n{{"name": "submit", "arguments": {{"answer": "{}"}}}}\n</tool_call><|im_end|>'
SAID = [CALL.format("503"), CALL.format("035"), "Done.<|im_end|>"]


class Scripted(StableGRPOTrainer):
    """Samples the same conversation for every prompt."""

    turns = 0

    def _generate_single_turn(self, prompt_ids: Any, *others: Any, **more: Any) -> Any:
        said = self.processing_class(SAID[self.turns])["input_ids"] + [self.processing_class.eos_token_id]
        self.turns += 1
        return [list(said) for _ in prompt_ids], [[-1.0] * len(said) for _ in prompt_ids]


def test_attempts_are_tool_calls_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    task = SortDigits(digits=3)
    row = {"prompt": [{"role": "user", "content": "503="}], "answer": "035"}
    tokenizer = tiny_tokenizer("".join(dict.fromkeys(string.printable + TEMPLATE)), chat_template=TEMPLATE)
    args = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=1000,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = Scripted(
        tiny_causal_lm(tokenizer, hidden=16, layers=1, heads=2, max_positions=4096),
        reward_functions({"turns": UnaryFeedback()}, task),
        args,
        train_dataset=Dataset.from_list([row] * 2),
        processing_class=tokenizer,
        environment_factory=partial(TryAgain, task),
        signals=None,
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["tools/call_frequency"] == 2.0
    assert logged["rewards/turns/mean"] == 0.5  # wrong, then right
