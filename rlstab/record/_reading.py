"""One door to runs of any origin."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rlstab.errors import RecordError
from rlstab.record._folder import RunFolder
from rlstab.record._lines import explain
from rlstab.record._run import Run
from rlstab.record._stores import read_tensorboard, read_trackio, read_wandb
from rlstab.record._tables import read_csv, read_json_lines, read_trainer_state

LARGEST = 2**30
KNOWN = (
    "a run folder of rlstab, trainer_state.json (or a folder that holds one), .csv, .jsonl, TensorBoard events "
    "(events.out.tfevents.*), run-*.wandb, a .db of trackio"
)


def read_run(path: str | os.PathLike[str], *, columns: Mapping[str, str] | None = None, name: str | None = None) -> Run:
    r"""Read a run, whoever wrote it.

    Read are run folders of rlstab, the `trainer_state.json` of transformers and TRL, CSV, JSON lines, event files of
    TensorBoard, and the local stores of wandb (`run-*.wandb`) and trackio (`PROJECT.db`); none of these needs the
    package that wrote it. Metrics get the keys of `rlstab.schema` where one is known for their name (`reward` is
    `train/reward`, verl's `actor/entropy` is `policy/entropy`); others keep their name. What is torn is left out and
    counted.

    Args:
        path: A file, or a folder that holds one.
        columns: Key of the schema → name of the column, for tables whose names are not known; `step` is the column of
            steps. Without one, rows are counted.
        name: Which run, where a store holds several.

    Returns:
        The run.

    Raises:
        RecordError: There is nothing to read, or it cannot be read: the message names the file, and what was expected.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     file = Path(place) / "log.csv"
        ...     _ = file.write_text("it,score\n1,0.5\n2,0.75\n")
        ...     run = read_run(file, columns={"step": "it", "train/reward": "score"})
        >>> run.metrics.series("train/reward").values.tolist()
        [0.5, 0.75]
    """
    chosen = Path(path)
    try:
        return _read(chosen, columns or {}, name)
    except RecordError:
        raise
    except OSError as error:
        raise RecordError(explain(error, f"cannot read {chosen}")) from error


def _read(path: Path, columns: Mapping[str, str], name: str | None) -> Run:
    if path.is_dir() and (path / "config.yaml").is_file() and not _is_wandb(path):
        return Run.of(RunFolder.open(path))
    files = _files(path)
    for file in files:
        _check_size(file)
    if columns and files[0].suffix.lower() not in (".csv", ".tsv", ".jsonl"):
        raise RecordError(f"{files[0]}: columns are for .csv and .jsonl, whose names nobody knows; leave them out here")
    return _checked(_read_files(files, columns, name), files[0])


def _read_files(files: list[Path], columns: Mapping[str, str], name: str | None) -> Run:
    first = files[0]
    title = first.parent.name if first.name == "trainer_state.json" or _is_events(first) else first.stem
    if first.suffix == ".json":
        return Run(name=title, source="trainer_state.json", metrics=read_trainer_state(first))
    if first.suffix.lower() == ".csv":
        return Run(name=title, source="CSV", metrics=read_csv(first, columns))
    if first.suffix == ".jsonl":
        return Run(name=title, source="JSON lines", metrics=read_json_lines(first, columns))
    if first.suffix == ".wandb":
        metrics, config = read_wandb(first)
        return Run(name=title, source="wandb", config=config, metrics=metrics)
    if first.suffix == ".db":
        metrics, names, config = read_trackio(first, name)
        if len(names) != 1:
            held = ", ".join(names[:12]) or "none"
            raise RecordError(
                f"{first} holds {len(names)} runs ({held}): name one" + (f", not {name!r}" if name else "")
            )
        return Run(name=names[0], source="trackio", config=config, metrics=metrics)
    return Run(name=title, source="TensorBoard", metrics=read_tensorboard(files))


def _files(path: Path) -> list[Path]:
    """Return the file that a path means, or the event files of one TensorBoard run."""
    if path.is_file():
        if path.suffix.lower() in (".json", ".csv", ".jsonl", ".wandb", ".db") or _is_events(path):
            return [path]
        raise RecordError(f"{path}: what this is cannot be told from its name; expected {KNOWN}")
    if not path.is_dir():
        raise RecordError(f"there is no {path}; expected {KNOWN}")
    events = sorted(entry for entry in path.iterdir() if _is_events(entry))
    states = sorted(path.glob("checkpoint-*/trainer_state.json"), key=lambda file: file.stat().st_mtime)
    own = path / "trainer_state.json"
    others = [*sorted(path.glob("run-*.wandb")), *sorted(path.glob("*.db"))]
    found = [own] if own.is_file() else states[-1:] or events or others[:1]
    if not found:
        raise RecordError(f"{path} holds no run; expected {KNOWN}")
    return found


def _is_events(path: Path) -> bool:
    return "tfevents" in path.name and path.is_file()


def _is_wandb(path: Path) -> bool:
    return any(path.glob("run-*.wandb"))


def _check_size(file: Path) -> None:
    size = file.stat().st_size
    if size == 0:
        raise RecordError(f"{file} is empty")
    if size > LARGEST:
        raise RecordError(f"{file} has {size / 1e9:.1f} GB, expected at most {LARGEST / 1e9:.1f}: cut it down first")


def _checked(run: Run, file: Path) -> Run:
    if not run.metrics.rows:
        raise RecordError(f"{file} ({run.source}) holds no numbers by step")
    return run
