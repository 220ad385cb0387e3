"""Processes that end with the one that drives them, in small: plain Python instead of vLLM."""

import runpy
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from background import family_of, gone, runs

FILE = str(Path(__file__).resolve().parents[2] / "rlstab/rollouts/_vllm_follow.py")
FOLLOWS = f"""
import os, runpy, time
runpy.run_path({FILE!r})["follow_leader"]()
assert "RLSTAB_LEADER" not in os.environ
print("follows", flush=True)
time.sleep(60)
"""
BETWEEN = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {FOLLOWS!r}])
"""
LEADS = f"""
import os, runpy, subprocess, sys
environment = os.environ | runpy.run_path({FILE!r})["leader_environment"]()
subprocess.run([sys.executable, "-c", {BETWEEN!r}], env=environment)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pidfd_open and /proc are Linux's")


def started(script: str, **environment: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() in ("follows\n", "")
    return process


def test_all_below_end_with_their_leader() -> None:
    leader = started(LEADS)
    family = family_of(leader.pid)
    assert len(family) == 3
    assert all(map(runs, family))
    leader.kill()
    assert gone(family)
    leader.wait()


def test_a_leader_that_is_dead_already_and_one_of_another_machine() -> None:
    here, _, own = runpy.run_path(FILE)["leader_environment"]()["RLSTAB_LEADER"].rpartition(" ")
    dead = next(number for number in range(2, 1 << 22) if not psutil.pid_exists(number))
    late = started(FOLLOWS, RLSTAB_LEADER=f"{here} {dead}")
    assert late.wait(30) == 1
    elsewhere = started(FOLLOWS, RLSTAB_LEADER=f"another {own}")
    assert runs(psutil.Process(elsewhere.pid))
    elsewhere.kill()
    elsewhere.wait()
