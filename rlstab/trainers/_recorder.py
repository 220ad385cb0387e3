"""Writes what each optimizer step measured: to the host's logs, to the run folder, and to whoever listens."""

from __future__ import annotations

import logging
import math
import operator
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from rlstab.record import RunFolder
from rlstab.schema import signal

__all__ = ["Recorder", "RowListener", "StepReader"]

logger = logging.getLogger("rlstab")

HOST_KEYS = {
    "reward": "train/reward",
    "reward_std": "train/reward_std",
    "frac_reward_zero_std": "train/frac_reward_zero_std",
    "resample/generations": "train/resample_generations",
    "resample/replaced": "train/resampled",
    "rollout/guided": "rollout/guided",
    "rollout/prefix_share": "rollout/prefix_share",
    "demonstrations/empty": "demonstrations/empty",
    "tools/call_frequency": "tools/call_frequency",
    "tools/failure_frequency": "tools/failure_frequency",
    "completions/mean_length": "completions/mean_length",
    "completions/clipped_ratio": "completions/clipped_ratio",
}
SAMPLES_PER_GENERATION = 4
JOINED: dict[str, Callable[[list[float]], float] | None] = {
    "mean": None,  # as the host does, without NaN
    "sum": sum,
    "max": max,
    "min": min,
    "last": operator.itemgetter(-1),
}


class StepReader:
    """A callback that needs every step's numbers as soon as the step ends, rather than when the host logs.

    Without one, and without a run folder, `StableGRPOTrainer` leaves them on the device until then.

    Example:
        >>> from transformers import TrainerCallback
        >>> class Follower(TrainerCallback, StepReader):
        ...     def on_step_end(self, args, state, control, **kwargs):
        ...         "The numbers of this step are known by now."
        >>> isinstance(Follower(), StepReader)
        True
    """


class RowListener(StepReader):
    """Something that is told every optimizer step's numbers as soon as they are known."""

    @abstractmethod
    def on_row(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of optimizer step `step`, by schema key."""


class Recorder(TrainerCallback):
    """Gathers one row of numbers per optimizer step and hands it on. Only the main process writes files."""

    def __init__(self, trainer: Any, run: RunFolder | None) -> None:
        self._trainer = trainer
        self._run = run if trainer.accelerator.is_main_process else None
        self._records = run is not None
        self._row: dict[str, float] = {}
        self._own: set[str] = set()
        self._rollouts: dict[str, float] = {}
        self._started = time.perf_counter()
        self._learning_rate: float | None = None
        self.grad_norm: float | Tensor | None = None

    def on_rollouts(self, inputs: list[dict[str, Any]], output: Mapping[str, Any]) -> None:
        """Keep the statistics of a new generation, and a few of its completions."""
        logged = self._trainer._metrics["train"]
        self._rollouts = {ours: logged[host][-1] for host, ours in HOST_KEYS.items() if logged.get(host)}
        self._rollouts |= {key: values[-1] for key, values in logged.items() if key.startswith("rewards/") and values}
        if self._run is None:
            return
        logs, start = self._trainer._logs, -len(inputs) * self._trainer.accelerator.num_processes
        prompts, completions = list(logs["prompt"])[start:], list(logs["completion"])[start:]
        advantages = list(logs["advantages"])[start:]
        rewards = {name: list(values)[start:] for name, values in logs["rewards"].items()}
        rows = [
            {
                "prompt": _written(prompts[i]),
                "completion": _written(completions[i]),
                "advantage": advantages[i],
                "rewards": {name: values[i] for name, values in rewards.items()},
            }
            for i in range(min(SAMPLES_PER_GENERATION, len(prompts)))
        ]
        self._run.append_rollouts(self._trainer.state.global_step + 1, rows)

    def on_advantages(self, advantages: Tensor, mask: Tensor) -> None:
        """Show the advantages of a generation, of tokens their mean, where the host shows its own."""
        if advantages.dim() == 2:
            advantages = (advantages * mask).sum(-1) / mask.sum(-1).clamp(min=1)
        logged = self._trainer._logs["advantages"]
        for _ in range(min(len(logged), advantages.numel())):
            logged.pop()
        logged.extend(advantages.tolist())

    @property
    def listened_to(self) -> bool:
        """Whether anyone takes the numbers of each step as soon as they are known."""
        return self._records or any(isinstance(c, StepReader) for c in self._trainer.callback_handler.callbacks)

    def close_steps(self, columns: Mapping[str, Mapping[int, float]]) -> None:
        """Take the measurements of finished steps, by key and step; before the optimizer moves, if anyone listens."""
        self._own |= columns.keys()
        not_finite: dict[int, dict[str, float]] = {}
        for key, of_steps in columns.items():
            self._trainer._metrics["train"][key].extend(of_steps.values())
            if key.endswith("/loss") and not all(map(math.isfinite, of_steps.values())):
                for step, value in of_steps.items():
                    if not math.isfinite(value):
                        not_finite.setdefault(step, {})[key] = value
        if self.listened_to:
            step = self._trainer.state.global_step + 1
            self._row = self._rollouts | {key: of_steps[step] for key, of_steps in columns.items() if step in of_steps}
        for step, values in sorted(not_finite.items()):
            self.event("non_finite", keys=sorted(values), values=[values[key] for key in sorted(values)])
            logger.warning("step %d: not finite: %s", step, ", ".join(sorted(values)))

    def reduce_window(self) -> None:
        """Join what the steps since the last log measured as the schema says: the host would average all of it."""
        logged = self._trainer._metrics["train"]
        for key in self._own & logged.keys():
            if len(logged[key]) > 1 and (join := JOINED[signal(key).reduction]) is not None:
                logged[key] = [join(logged[key])]

    def state_dict(self) -> dict[str, float]:
        """What later rows repeat until the next generation: its statistics."""
        return dict(self._rollouts)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint."""
        self._rollouts = dict(state)

    def event(self, kind: str, **fields: Any) -> None:
        """Write an event of the coming optimizer step."""
        if self._run is not None:
            self._run.append_event(kind, step=self._trainer.state.global_step + 1, **fields)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the run folder where a resumed run goes on."""
        if self._run is not None and state.global_step > 0:
            self._run.resume_at(state.global_step)
        self._started = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the learning rate of the update that was just made."""
        self._learning_rate = float(kwargs["lr_scheduler"].get_last_lr()[0])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the row of the step that just ended and hand it on."""
        now = time.perf_counter()
        row = {**self._row, "train/step_time": now - self._started}
        self._started = now
        if self._learning_rate is not None:
            row["train/learning_rate"] = self._learning_rate
        if self.grad_norm is not None and "train/grad_norm" not in row:  # a watch has brought it with the rest
            row["train/grad_norm"] = float(self.grad_norm)
        if self._run is not None:
            self._run.append_metrics(state.global_step, row)
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, RowListener):
                callback.on_row(state.global_step, row)
        self._row = {}


def _written(message: Any) -> Any:
    """A prompt or completion with its images, or whatever else has no text, named only."""
    if isinstance(message, Mapping):
        return {key: _written(value) for key, value in message.items()}
    if isinstance(message, list | tuple):
        return [_written(value) for value in message]
    return message if isinstance(message, str | int | float | None) else f"<{type(message).__name__}>"
