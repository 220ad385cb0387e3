"""The run folder: what one run leaves behind, written so that a kill at any byte costs at most the last line."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple, final

from rlstab.errors import ConfigError, RecordError
from rlstab.record._lines import Json, append_line, encode_mapping, explain, read_lines
from rlstab.record._redact import redact, redact_yaml
from rlstab.record._rows import Event, Events, Metrics, MetricsRow, Rollout, Rollouts

_ROWS_PER_STEP = 64
_CHARACTERS = 20_000
_STEPS = 512
_HEAD = frozenset({"kind", "step", "time", "attempt"})
_UNFINISHED = ".config.yaml.new"
_RESUME = "resume"


@final
class RunFolder:
    """A run folder, to append to and to read from.

    ```
    config.yaml      the resolved configuration
    metrics.jsonl    one line a step: {"step", "time", "attempt", metric keys...}
    events.jsonl     one line an event: {"kind", "step", "time", "attempt", fields...}
    rollouts/        sampled completions, one file of lines a step
    checkpoints/     the trainer's
    plots/           the report's, as is report.html
    ```
    Every line is standard JSON; a non-finite float stands as `{"$float": "nan"}` and is read back as it was. A line is
    one write in append mode: a killed process leaves at most one torn line, readers skip torn lines and count them,
    and the next line starts afresh. Nothing is flushed to the disk: what survives is a kill, not a power cut.

    Values under keys that name secrets (passwords, access tokens, API keys), credentials in URLs and tokens of known
    form are replaced by `<redacted>` in the configuration and in events; metrics are numbers, and completions are
    recorded as they are.

    In a distributed run only one process (rank 0) may write; the caller sees to that. Any process may read at any time.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = RunFolder.create(f"{place}/run", config_text="seed: 0")
        ...     folder.append_metrics(1, {"train/reward": 0.5, "train/grad_norm": float("inf")})
        ...     folder.metrics().rows[0].values
        {'train/reward': 0.5, 'train/grad_norm': inf}
    """

    def __init__(self, path: Path, attempt: int) -> None:
        self._path = path
        self._attempt = attempt

    @classmethod
    def create(cls, path: str | os.PathLike[str], *, config_text: str, exist_ok: bool = False) -> RunFolder:
        """Make a new run folder.

        Args:
            path: Where; must not exist or be empty, unless `exist_ok`.
            config_text: The resolved configuration, one YAML document; secrets are replaced before it is written.
            exist_ok: Take an existing run folder as it is, to go on in it. A configuration that differs replaces the
                old one, which stays in an event of kind `config_replaced`.

        Raises:
            ConfigError: `config_text` is not YAML.
            RecordError: The folder is not empty, or cannot be written.
        """
        root = Path(path)
        config = redact_yaml(config_text)
        if exist_ok and (root / "config.yaml").is_file():
            folder = cls.open(root)
            folder._replace_config(config)
            return folder
        try:
            root.mkdir(parents=True, exist_ok=True)
            held = sorted(entry.name for entry in root.iterdir() if entry.name != _UNFINISHED)
        except FileExistsError as error:
            raise RecordError(f"{root} is a file, expected a folder or a free path: choose another path") from error
        except OSError as error:
            raise RecordError(explain(error, f"cannot create the run folder {root}")) from error
        if held:
            names = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
            raise RecordError(f"{root} is not empty (holds {names}): choose another folder, or resume the run in it")
        _write_whole(root / "config.yaml", config)
        return cls(root, attempt=0)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Open an existing run folder, to read it or to go on in it; opening changes nothing.

        Raises:
            RecordError: There is no run folder at `path`.
        """
        root = Path(path)
        if not root.is_dir():
            raise RecordError(f"no run folder at {root}: there is no such folder")
        if not (root / "config.yaml").is_file():
            raise RecordError(f"{root} is not a run folder: it holds no config.yaml")
        return cls(root, attempt=max((attempt for attempt, _ in _resumes(root)), default=0))

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self._path

    @property
    def attempt(self) -> int:
        """How often the run has been resumed: 0 before the first time. Every row carries the attempt that wrote it."""
        return self._attempt

    @property
    def config_path(self) -> Path:
        """The file of the resolved configuration."""
        return self._path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """The folder for the trainer's checkpoints; made when it is first asked for."""
        return _made(self._path / "checkpoints")

    @property
    def plots(self) -> Path:
        """The folder for the report's plots; made when it is first asked for."""
        return _made(self._path / "plots")

    @property
    def report(self) -> Path:
        """Where the report's page goes."""
        return self._path / "report.html"

    def config_text(self) -> str:
        """Return the configuration as it was written, secrets replaced.

        Raises:
            RecordError: The file cannot be read.
        """
        try:
            return self.config_path.read_text("utf-8")
        except OSError as error:
            raise RecordError(explain(error, f"cannot read {self.config_path}")) from error
        except UnicodeDecodeError as error:
            raise RecordError(f"cannot read {self.config_path}: not UTF-8 at byte {error.start}") from error

    def append_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append the metrics of one step as one line.

        Args:
            step: Optimizer step, ≥ 0. Several lines of one step are read as one row, in which the later value of a key
                counts.
            values: Number of each metric key; not finite is allowed.

        Raises:
            ConfigError: A value is no number, or a key is reserved.
            RecordError: The line could not be written.
        """
        numbers = {key: _number(key, value) for key, value in values.items()}
        self._append("metrics.jsonl", {"step": _checked(step)}, encode_mapping(numbers, "metrics"))

    def append_event(self, kind: str, /, *, step: int | None = None, **fields: object) -> None:
        """Append one event as one line.

        Args:
            kind: What happened. Readers know `resume` (written by `resume_at`), `evaluation` (fields `phase`, "before"
                or "after", and `values`, numbers by metric key), `interrupted` and `finished` (how the run ended) and
                `signal_skipped` (fields `signal` and `reason`); any other kind is shown as it is.
            step: Step to which the event belongs, if any.
            **fields: Anything made of numbers, strings, bools, None, lists and mappings; secrets are replaced.

        Raises:
            ConfigError: A field has no JSON form, or a reserved name.
            RecordError: The line could not be written.
        """
        head: dict[str, Json] = {"kind": kind, "step": None if step is None else _checked(step)}
        encoded = encode_mapping(fields, f"event {kind}")
        self._append("events.jsonl", head, {key: redact(value, key) for key, value in encoded.items()})

    def append_rollouts(self, step: int, rows: Sequence[Mapping[str, object]]) -> int:
        """Append sampled completions of one step, within bounds.

        At most 64 rows a call are kept, and 20 000 characters a text. When more than 512 steps are recorded, every
        second one in between is removed, so that what is kept always covers the whole run.

        Args:
            step: Step at which the completions were sampled.
            rows: One mapping per completion; reports show `prompt`, `completion`, `reward` and `phase`.

        Returns:
            Number of rows written.

        Raises:
            ConfigError: A field has no JSON form, or a reserved name.
            RecordError: The lines could not be written.
        """
        file = f"rollouts/step_{_checked(step):09d}.jsonl"
        _made(self._path / "rollouts")
        kept = rows[:_ROWS_PER_STEP]
        for row in kept:
            short = {key: _shortened(value) for key, value in row.items()}
            self._append(file, {"step": step}, encode_mapping(short, "rollout"))
        files = self._rollout_files()
        if len(files) > _STEPS:
            for surplus in files[1:-1:2]:
                surplus.unlink(missing_ok=True)
        return len(kept)

    def resume_at(self, step: int) -> None:
        """Note that the run goes on from the state after `step`.

        From then on readers leave out what earlier attempts wrote about later steps, so that a killed and resumed run
        reads as one trajectory. The files keep every line.

        Args:
            step: Last step that counts; that of the checkpoint.

        Raises:
            RecordError: The event could not be written.
        """
        reached = max((row.step for row in self.metrics().rows), default=step)
        RunFolder(self._path, self._attempt + 1)._append(
            "events.jsonl", {"kind": _RESUME, "step": _checked(step)}, {"reached": reached}
        )
        self._attempt += 1

    def metrics(self) -> Metrics:
        """Return the metrics of the run as one trajectory.

        Raises:
            RecordError: A file exists and cannot be read.
        """
        lines, torn = self._read([self._path / "metrics.jsonl"])
        moments: dict[int, float] = {}
        values: dict[int, dict[str, float]] = {}
        for line in lines:
            if line.step is not None:
                moments[line.step] = line.time
                numbers = {key: value for key, value in line.fields.items() if isinstance(value, int | float)}
                values.setdefault(line.step, {}).update(numbers)
        return Metrics(tuple(MetricsRow(step, moments[step], values[step]) for step in sorted(values)), torn)

    def events(self) -> Events:
        """Return the events of the run in the order in which they happened; every resume is among them.

        Raises:
            RecordError: The file exists and cannot be read.
        """
        lines, torn = self._read([self._path / "events.jsonl"])
        return Events(tuple(Event(line.kind, line.step, line.time, line.fields) for line in lines), torn)

    def rollouts(self) -> Rollouts:
        """Return the recorded completions of the run as one trajectory.

        Raises:
            RecordError: A file cannot be read.
        """
        lines, torn = self._read(self._rollout_files())
        return Rollouts(tuple(Rollout(line.step, line.fields) for line in lines if line.step is not None), torn)

    def _rollout_files(self) -> list[Path]:
        return sorted((self._path / "rollouts").glob("step_*.jsonl"))

    def _read(self, files: Iterable[Path]) -> tuple[list[_Line], int]:
        """Return the lines of the files that belong to the trajectory, and the number of torn ones."""
        resumes = _resumes(self._path)
        rows = [row and _line(row) for file in files for row in read_lines(file)]
        lines = [line for line in rows if line]
        return [line for line in lines if line.counts(resumes)], len(rows) - len(lines)

    def _append(self, file: str, head: Mapping[str, Json], fields: Mapping[str, Json]) -> None:
        if clash := _HEAD & fields.keys():
            raise ConfigError(
                f"{file}: the name {min(clash)!r} is reserved, choose another (reserved: {sorted(_HEAD)})"
            )
        row = {**head, "time": round(time.time(), 3), "attempt": self._attempt, **fields}
        append_line(self._path / file, row)

    def _replace_config(self, config: str) -> None:
        previous = self.config_text()
        if config != previous:
            self.append_event("config_replaced", previous=previous)
            _write_whole(self.config_path, config)


class _Line(NamedTuple):
    """One line of any file of the folder: the head that all share, and the rest."""

    kind: str
    step: int | None
    time: float
    attempt: int
    fields: Mapping[str, object]

    def counts(self, resumes: Sequence[tuple[int, int]]) -> bool:
        """Return whether the line belongs to the trajectory: no later attempt started from an earlier step."""
        step = self.step
        if step is None or self.kind == _RESUME:
            return True
        return all(self.attempt >= attempt or step <= start for attempt, start in resumes)


def _line(row: dict[str, object]) -> _Line | None:
    match row:
        case {"step": int() | None as step, "time": int() | float() as moment, "attempt": int(attempt)}:
            fields = {key: value for key, value in row.items() if key not in _HEAD}
            return _Line(str(row.get("kind", "")), step, moment, attempt, fields)
    return None


def _resumes(root: Path) -> list[tuple[int, int]]:
    """Return attempt and first step of every resume of the run."""
    lines = (row and _line(row) for row in read_lines(root / "events.jsonl"))
    return [(line.attempt, line.step) for line in lines if line and line.kind == _RESUME and line.step is not None]


def _number(key: str, value: object) -> float:
    if isinstance(value, int | float):
        return value
    if isinstance(value, Real):
        return float(value)
    raise ConfigError(f"metric {key}={value!r} is a {type(value).__name__}, expected a number (try .item())")


def _checked(step: object) -> int:
    if isinstance(step, Integral) and int(step) >= 0:
        return int(step)
    raise ConfigError(f"step={step!r}, expected an integer ≥ 0")


def _shortened(value: object) -> object:
    if isinstance(value, str) and len(value) > _CHARACTERS:
        return f"{value[:_CHARACTERS]}… [{len(value) - _CHARACTERS} more characters]"
    return value


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise RecordError(explain(error, f"cannot create {folder}")) from error
    return folder


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    unfinished = path.with_name(_UNFINISHED)
    try:
        unfinished.write_text(text, "utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise RecordError(explain(error, f"cannot write {path}")) from error
