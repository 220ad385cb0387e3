"""Writes the small stores beside this file with the packages that own the formats: a log of TRL, as each keeps it.

    python tests/record/foreign/make.py trainer_state.json

Needs wandb, trackio and tensorboardX; the tests that read the stores need none of them.
"""

import json
import os
import shutil
import sqlite3
import sys
import tempfile
from contextlib import closing
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent
KEPT = ("reward", "loss", "grad_norm", "entropy", "learning_rate", "rewards/reward/mean", "mismatch/k3")
STEPS = 12


def entries(state: Path) -> list[dict[str, float]]:
    """The first steps of a real log, and at the last of them a number that is none."""
    log = [entry for entry in json.loads(state.read_text())["log_history"] if "reward" in entry][:STEPS]
    short = [{"step": entry["step"], **{key: entry[key] for key in KEPT}} for entry in log]
    short[-1]["loss"] = float("nan")
    return short


def main(state: Path) -> None:
    trackio, wandb, tensorboardx = map(import_module, ("trackio", "wandb", "tensorboardX"))
    log = entries(state)
    (HERE / "trainer_state.json").write_text(json.dumps({"global_step": STEPS, "log_history": log}, indent=1))
    (HERE / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    lines = [",".join(str(entry[key]) for key in ("step", *KEPT)) for entry in log]
    (HERE / "log.csv").write_text("\n".join([",".join(("it", *KEPT)), *lines, ""]))

    work = Path(tempfile.mkdtemp())
    writer = tensorboardx.SummaryWriter(str(work / "tb"))
    for entry in log:
        for key in KEPT:
            writer.add_scalar(f"train/{key}", entry[key], entry["step"])
    writer.close()
    shutil.copy(next((work / "tb").glob("*tfevents*")), HERE / "events.out.tfevents.1")

    quiet = wandb.Settings(x_disable_meta=True, x_disable_stats=True, console="off", program="train.py")
    settings = {"learning_rate": 0.0005, "model": {"layers": 2}}
    run = wandb.init(project="p", dir=work, mode="offline", config=settings, settings=quiet)
    for entry in log:
        run.log({**{f"train/{key}": entry[key] for key in KEPT}, "train/global_step": entry["step"]})
    run.finish()
    shutil.copy(next(work.glob("wandb/*run-*/run-*.wandb")), HERE / "run-1.wandb")

    for name in ("one", "two"):
        trackio.init(project="p", name=name, config={"learning_rate": 0.0005})
        for entry in log[: None if name == "one" else 3]:
            trackio.log({f"train/{key}": entry[key] for key in KEPT}, step=entry["step"])
        trackio.finish()
    store = next(Path(os.environ["TRACKIO_DIR"]).glob("*.db"))
    with closing(sqlite3.connect(store)) as database:
        database.executescript("PRAGMA journal_mode=DELETE; PRAGMA page_size=512; VACUUM;")
    shutil.copy(store, HERE / "trackio.db")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
