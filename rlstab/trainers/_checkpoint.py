"""What the host's checkpoint lacks for an exact resume: the generation in use, counters, samplers and controllers."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from rlstab.errors import ConfigError, RecordError
from rlstab.trainers._host import RepeatSampler
from rlstab.trainers._under import under

__all__ = [
    "EpochStart",
    "TrainerState",
    "capture",
    "latest_checkpoint",
    "load_converted",
    "load_state",
    "restore",
    "save_state",
    "written_by",
]

logger = logging.getLogger("rlstab")

REFERENCES = "reference/"  # before the names of their weights
MOVED = "moved/"  # before what the next step compares the policy with
ROWS = "rows of"  # lengths of the tensors of a list, which is saved as one


@dataclass
class TrainerState:
    """Tensors by name and plain values, of one rank."""

    values: dict[str, Any]
    buffer: list[dict[str, Any]] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


def _paths(checkpoint: str | Path, rank: int) -> tuple[Path, Path]:
    base = Path(checkpoint) / f"rlstab_state_{rank}"
    return base.with_suffix(".safetensors"), base.with_suffix(".json")


def save_state(checkpoint: str | Path, rank: int, state: TrainerState) -> None:
    """Write the state of one rank, before the host writes its files, the last of which completes the checkpoint."""
    tensor_file, value_file = _paths(checkpoint, rank)
    value_file.parent.mkdir(parents=True, exist_ok=True)
    if rank == 0:  # an older checkpoint of this step is complete no longer
        (value_file.parent / TRAINER_STATE_NAME).unlink(missing_ok=True)
    tensors = dict(state.tensors)
    rest: list[dict[str, Any]] = []
    for i, batch in enumerate(state.buffer or []):
        lists = {k: v for k, v in batch.items() if isinstance(v, list) and v and isinstance(v[0], Tensor)}
        whole = batch | {k: torch.cat(v) for k, v in lists.items()}
        tensors |= {f"buffer/{i}/{k}": v for k, v in whole.items() if isinstance(v, Tensor)}
        rest.append({k: v for k, v in whole.items() if not isinstance(v, Tensor)})
        rest[i][ROWS] = {k: [len(row) for row in v] for k, v in lists.items()}
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, tensor_file)
    value_file.write_text(json.dumps({"values": state.values, "buffer": rest if state.buffer is not None else None}))


def written_by(checkpoint: str | Path) -> int | None:
    """How many processes wrote the checkpoint, or None where it holds no state of rlstab.

    Raises:
        RecordError: if the file cannot be read.
    """
    value_file = _paths(checkpoint, 0)[1]
    return int(_read_values(value_file)["values"]["ranks"]) if value_file.exists() else None


def load_state(checkpoint: str | Path, rank: int, device: torch.device) -> TrainerState:
    """The state of one rank.

    Raises:
        RecordError: if the files cannot be read.
    """
    tensor_file, value_file = _paths(checkpoint, rank)
    saved = _read_values(value_file)
    try:
        tensors = load_file(tensor_file)
    except (OSError, SafetensorError) as error:
        raise _unreadable(tensor_file, error) from error
    buffer: list[dict[str, Any]] | None = None
    if saved["buffer"] is not None:
        buffer = [dict(batch) for batch in saved["buffer"]]
        for name in [name for name in tensors if name.startswith("buffer/")]:
            _, i, key = name.split("/", 2)
            buffer[int(i)][key] = tensors.pop(name).to(device)
        for batch in buffer:
            batch |= {key: list(batch[key].split(rows)) for key, rows in batch.pop(ROWS, {}).items()}
    return TrainerState(values=saved["values"], buffer=buffer, tensors=tensors)


def load_converted(model: nn.Module, checkpoint: str) -> None:
    """Load what the host leaves out: weights that the files hold in another form than the model.

    Transformers saves the experts of a layer one by one and keeps them in memory as one tensor. The host loads by name,
    finds none of them, and would go on with the experts that the model was made with.
    """
    if not isinstance(model, PreTrainedModel):
        return
    saved = {key for file in Path(checkpoint).glob("model*.safetensors") for key in _names(file)}
    own = dict(model.named_parameters())
    if not saved or own.keys() <= saved:
        return
    loaded = dict(type(model).from_pretrained(checkpoint, dtype=model.dtype).named_parameters())
    with torch.no_grad():
        for name in own.keys() - saved:
            own[name].copy_(loaded[name])


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _read_values(file: Path) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error
    if not {"values", "buffer"} <= saved.keys():
        raise _unreadable(file, "it holds no trainer state")
    return saved


def _unreadable(file: Path, reason: object) -> RecordError:
    return RecordError(f"{file} cannot be read ({reason}): resume from an older checkpoint")


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint below `output_dir`, or None.

    A checkpoint that was being written when the process died lacks its last file, or has a part of it, and is passed
    over; so is one that the host wrote alone.

    >>> import tempfile
    >>> latest_checkpoint(tempfile.mkdtemp()) is None
    True
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    complete = [path for path in folders if _is_complete(path)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return _paths(checkpoint, 0)[1].exists()


def capture(trainer: Any) -> TrainerState:
    """The state of a trainer that the host's checkpoint leaves out."""
    tensors = {REFERENCES + key: value for key, value in trainer._references.state_dict(trainer.accelerator).items()}
    tensors |= {MOVED + key: value for key, value in trainer._drift.state_dict().items()}
    if trainer._sampler_start is not None:
        now = trainer._sampler.generator.get_state()
        tensors |= {"sampler/epoch_start": trainer._sampler_start, "sampler/now": now}
    values = {
        "ranks": trainer.accelerator.num_processes,
        "micro_step": trainer._step,
        "total_train_tokens": trainer._total_train_tokens,
        "objective": trainer.objective.state_dict(),
        "metrics": {key: list(numbers) for key, numbers in trainer._metrics["train"].items()},
        "recorder": trainer._recorder.state_dict(),
        "mismatch": trainer._mismatch.state_dict(),
        "skipped": sorted(trainer._skipped),
        "reset": trainer._reset.state_dict() if trainer._reset is not None else None,
        "schedule": _schedule(trainer),
    }
    return TrainerState(values=values, buffer=trainer._buffered_inputs, tensors=tensors)


def _schedule(trainer: Any) -> dict[str, Any]:
    """What the rollouts in use were dealt out by, and what they carry."""
    args = trainer.args
    return {
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "steps_per_generation": args.steps_per_generation,
        "num_iterations": args.num_iterations,
        "num_generations": args.num_generations,
        "requirements of the objective": sorted(str(need) for need in trainer._needs),
    }


def restore(trainer: Any, checkpoint: str) -> None:
    """Put a trainer back to where `capture` found it; a checkpoint of the host alone gives a warning.

    Raises:
        ConfigError: if processes, schedule or what the objective reads are not those that wrote the checkpoint.
        RecordError: if its files cannot be read.
    """
    processes = written_by(checkpoint)
    if processes is None:
        logger.warning("%s holds no state of rlstab: the rollouts in use and the controllers start anew", checkpoint)
        return
    if processes != trainer.accelerator.num_processes:
        raise ConfigError(
            f"{checkpoint} was written by {processes} processes and is resumed by "
            f"{trainer.accelerator.num_processes}: the rollouts in use cannot be dealt out anew, resume with as many"
        )
    state = load_state(checkpoint, trainer.accelerator.process_index, trainer.accelerator.device)
    changed = {key: value for key, value in _schedule(trainer).items() if state.values["schedule"].get(key) != value}
    if changed:
        key, value = next(iter(changed.items()))
        raise ConfigError(
            f"{key}: {checkpoint} was written with {state.values['schedule'].get(key)!r}, this run has {value!r}: the "
            "rollouts in use do not fit; resume with the same, or start a new run from the checkpoint's model"
        )
    trainer._step = state.values["micro_step"]
    trainer._total_train_tokens = state.values["total_train_tokens"]
    trainer._buffered_inputs = state.buffer
    trainer.objective.load_state_dict(state.values["objective"])
    trainer._recorder.load_state_dict(state.values["recorder"])
    trainer._mismatch.load_state_dict(state.values["mismatch"])
    trainer._skipped = set(state.values["skipped"])
    if trainer._reset is not None and state.values["reset"] is not None:
        trainer._reset.load_state_dict(state.values["reset"])
    for key, numbers in state.values["metrics"].items():
        trainer._metrics["train"][key] = list(numbers)
    trainer._references.load_state_dict(under(REFERENCES, state.tensors), trainer.accelerator)
    trainer._drift.load_state_dict(under(MOVED, state.tensors))
    if "sampler/now" in state.tensors:
        epoch_ended = float(trainer.state.epoch).is_integer()
        trainer._sampler.generator.set_state(state.tensors["sampler/now" if epoch_ended else "sampler/epoch_start"])


class EpochStart(TrainerCallback):
    """Notes the state of the data sampler when an epoch starts: a resume within the epoch draws the same order."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The sampler draws the epoch's order after this call."""
        sampler = self._trainer._sampler
        if isinstance(sampler, RepeatSampler) and sampler.shuffle:
            self._trainer._sampler_start = sampler.generator.get_state()
