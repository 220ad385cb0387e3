"""What exact divergences cost: time and memory of streamed passes, beside the host's kernels and materialised logits.

    python benchmarks/exact_divergences.py [--json FILE] [--rounds N] [--shapes NxVxD ...]

Every pass starts from hidden states `[N, D]` and heads `[V, D]` of a policy and of a reference, and ends with gradients
in the policy's hidden states and head: log-probs and entropy alone, and with one or several exact divergences.

- `host`: TRL's fused log-prob pass, and where there is a divergence its chunked divergence pass besides (it has the two
  KLs and JSD, one per pass);
- `rlstab`: one call of `rlstab.losses.streamed_statistics`;
- `logits`: both models' logits in full, through `log_softmax` and autograd;
- `liger`: Liger's fused linear JSD (CUDA, where it is installed).

Times are in units of one N x V x D matmul, timed in the same round; a round times all passes in turn, each time in
another order. On a CPU with one thread the clock is the processor time of this process, so that other processes
hardly count; elsewhere it is the wall clock, on CUDA between synchronisations. Memory is what a pass needs at its peak
above the inputs: on CUDA of the allocator, on Linux of the process (freed memory being returned at once), from a
pass of its own. Before anything is timed, values and gradients of host and rlstab are compared.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.util
import json
import platform
import random
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl
from rich.console import Console
from rich.table import Table
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

import rlstab
from rlstab.batch import ExactDivergence
from rlstab.losses import (
    AlphaDivergence,
    ChiSquared,
    Divergence,
    ForwardKL,
    Head,
    Hellinger,
    JensenShannon,
    ReverseKL,
    streamed_statistics,
)

CPU_SHAPES = ["512x32768x512"]
CUDA_SHAPES = ["4096x32768x2048", "16384x151936x4096"]
VOCABULARY_CHUNK = 32768  # the host's own
HOSTS_BETA = {"forward_kl()": 0.0, "reverse_kl()": 1.0, "jensen_shannon()": 0.5}
FEW: list[Divergence] = [ReverseKL(), JensenShannon()]
MANY: list[Divergence] = [*FEW, ForwardKL(), Hellinger(), ChiSquared(), AlphaDivergence(alpha=0.2)]
LOGITS_UP_TO = 2**33  # bytes of one model's logits

Gradients = list[Tensor]
Work = Callable[[], Gradients]


@dataclass
class Inputs:
    """Two models' last hidden states and heads, and labels."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor

    @classmethod
    def of(cls, shape: str, device: torch.device) -> Inputs:
        """Logits of unit variance, and a reference near the policy."""
        tokens, vocabulary, width = map(int, shape.split("x"))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        hidden, noise = (torch.randn(tokens, width, device=device) for _ in range(2))
        weight, drift = (torch.randn(vocabulary, width, device=device) / width**0.5 for _ in range(2))
        return cls(
            hidden.to(dtype).requires_grad_(),
            weight.to(dtype).requires_grad_(),
            torch.randint(vocabulary, (tokens,), device=device),
            (hidden + noise / 10).to(dtype),
            (weight + drift / 10).to(dtype),
        )

    def gradients(self, values: Sequence[Tensor]) -> Gradients:
        """Of the sum of all values."""
        total = torch.stack([value.sum() for value in values]).sum()
        return list(torch.autograd.grad(total, [self.hidden, self.weight]))

    @property
    def size(self) -> tuple[int, int, int]:
        """N, V and D."""
        return len(self.hidden), *self.weight.shape


def streamed(inputs: Inputs, generators: Sequence[Divergence]) -> list[Tensor]:
    """Log-probs, entropy and divergences, by rlstab."""
    found = streamed_statistics(
        inputs.hidden,
        Head(weight=inputs.weight),
        inputs.labels,
        statistics=["logp", "entropy"],
        requirements=[ExactDivergence(generator, "reference") for generator in generators],
        references={"reference": (inputs.ref_hidden, Head(weight=inputs.ref_weight))},
    )
    order = ["logp", "entropy", *(ExactDivergence(generator, "reference").key for generator in generators)]
    return [found[name] for name in order]


def hosted(inputs: Inputs, generators: Sequence[Divergence]) -> list[Tensor]:
    """The same by the host: one pass for log-probs and entropy, and one for each divergence."""
    logp, entropy, *_ = ChunkedLogProbFunction.apply(
        inputs.hidden, inputs.weight, None, inputs.labels, 1.0, VOCABULARY_CHUNK, None, 1.0, ("entropy",)
    )
    divergences = [
        ChunkedDivergenceFunction.apply(
            inputs.hidden, inputs.weight, None, inputs.ref_hidden, inputs.ref_weight, None, HOSTS_BETA[generator.name]
        )[0]
        for generator in generators
    ]
    return [logp, entropy, *divergences]


def materialised(inputs: Inputs, generators: Sequence[Divergence]) -> list[Tensor]:
    """The same from the logits, by autograd; reverse KL only."""
    logp = (inputs.hidden @ inputs.weight.T).float().log_softmax(-1)
    p = logp.exp()
    values = [logp.gather(-1, inputs.labels.unsqueeze(-1)).squeeze(-1), -(p * logp).sum(-1)]
    if generators:
        ref_logp = (inputs.ref_hidden @ inputs.ref_weight.T).float().log_softmax(-1)
        values.append((p * (logp - ref_logp)).sum(-1))
    return values


def ligers(inputs: Inputs) -> list[Tensor]:
    """Liger's JSD alone, of which only the mean exists."""
    from liger_kernel.transformers.functional import liger_fused_linear_jsd  # type: ignore[import-not-found]

    return [liger_fused_linear_jsd(inputs.hidden, inputs.weight, inputs.ref_hidden, inputs.ref_weight)]


def passes(inputs: Inputs) -> dict[str, tuple[Callable[..., list[Tensor]], list[Divergence]]]:
    """Everything that is measured, by name."""
    tokens, vocabulary, _ = inputs.size
    cases: dict[str, tuple[Callable[..., list[Tensor]], list[Divergence]]] = {
        "host: log-prob, entropy": (hosted, []),
        "rlstab: log-prob, entropy": (streamed, []),
        "host: + reverse KL": (hosted, FEW[:1]),
        "rlstab: + reverse KL": (streamed, FEW[:1]),
        "host: + JSD": (hosted, FEW[1:]),
        "rlstab: + JSD": (streamed, FEW[1:]),
        "host: + reverse KL, JSD": (hosted, FEW),
        "rlstab: + reverse KL, JSD": (streamed, FEW),
        f"rlstab: + {len(MANY)} divergences": (streamed, MANY),
    }
    if 4 * tokens * vocabulary <= LOGITS_UP_TO:
        cases["logits: + reverse KL"] = (materialised, FEW[:1])
    if not skipped(inputs.hidden.device):
        cases["liger: JSD alone"] = (lambda given, _: ligers(given), FEW[1:])
    return cases


def skipped(device: torch.device) -> dict[str, str]:
    """What cannot be measured here, and why."""
    if device.type != "cuda":
        reason = f"needs CUDA, the device is {device.type}"
        return {"liger: JSD alone": reason, "CUDA": "no CUDA device" if not torch.cuda.is_available() else "not chosen"}
    if importlib.util.find_spec("liger_kernel") is None:
        return {"liger: JSD alone": "liger-kernel is not installed"}
    return {}


# --- measuring ---------------------------------------------------------------------------


class Meter:
    """Seconds and bytes of a piece of work on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._clock = time.process_time if self.clock == "processor time" else time.perf_counter

    @property
    def clock(self) -> str:
        """What is measured."""
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        return "processor time" if alone else "wall clock"

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one call."""
        self._wait()
        start = self._clock()
        work()
        self._wait()
        return self._clock() - start

    def peak(self, work: Callable[[], object]) -> int | None:
        """Bytes above what was held before; None where it cannot be seen."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            return torch.cuda.max_memory_allocated() - before
        if platform.system() != "Linux":
            return None
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        before = _resident("VmRSS")
        work()
        return _resident("VmHWM") - before

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def return_freed_memory() -> None:
    """Have the C library map every larger tensor on its own, so that the process shrinks when it is freed."""
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, map_threshold = ctypes.CDLL("libc.so.6"), -1, -3
        libc.mallopt(map_threshold, 2**16)
        libc.mallopt(trim_threshold, 0)


def compare(inputs: Inputs) -> dict[str, float]:
    """Largest relative difference of values and of gradients between host and rlstab."""
    results = []
    for work in (streamed, hosted):
        values = work(inputs, FEW)
        results.append((values, inputs.gradients(values)))
    (ours, our_gradients), (theirs, their_gradients) = results

    def difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
        return max(
            float((x - y).detach().float().norm() / y.detach().float().norm()) for x, y in zip(left, right, strict=True)
        )

    return {"values": difference(ours, theirs), "gradients": difference(our_gradients, their_gradients)}


class Bench:
    """All passes over the inputs of one shape."""

    def __init__(self, shape: str, device: torch.device) -> None:
        self.shape = shape
        self._meter = Meter(device)
        self._inputs = Inputs.of(shape, device)
        self._cases = passes(self._inputs)

    def _work(self, name: str) -> Work:
        run, generators = self._cases[name]
        return lambda: self._inputs.gradients(run(self._inputs, generators))

    def _matmul(self) -> Tensor:
        with torch.no_grad():
            return self._inputs.hidden @ self._inputs.weight.T

    def times(self, rounds: int) -> dict[str, Any]:
        """After a comparison of what is computed."""
        agreement = compare(self._inputs)
        self._meter.seconds(self._matmul)
        order = random.Random(0)
        units: list[float] = []
        seconds: dict[str, list[float]] = {name: [] for name in self._cases}
        for _ in range(rounds):
            units.append(min(self._meter.seconds(self._matmul) for _ in range(3)))
            for name in order.sample(sorted(self._cases), len(self._cases)):
                seconds[name].append(self._meter.seconds(self._work(name)))
        tokens, vocabulary, width = self._inputs.size
        return {
            "shape": self.shape,
            "dtype": str(self._inputs.hidden.dtype).removeprefix("torch."),
            "clock": self._meter.clock,
            "matmul seconds": statistics.median(units),
            "matmul TFLOP/s": 2e-12 * tokens * vocabulary * width / statistics.median(units),
            "difference": agreement,
            "passes": {name: row(times, units) for name, times in seconds.items()},
        }

    def peaks(self) -> dict[str, int | None]:
        """Bytes, by pass."""
        return {name: self._meter.peak(self._work(name)) for name in self._cases}


def measure(shapes: Sequence[str], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Times of all, and then memory: what makes it visible on a CPU slows allocations down."""
    results = [Bench(shape, device).times(rounds) for shape in shapes]
    return_freed_memory()
    for result in results:
        for name, peak in Bench(result["shape"], device).peaks().items():
            result["passes"][name]["peak MiB"] = None if peak is None else peak / 2**20
        result["goals"] = goals(result["passes"])
    return results


def row(times: Sequence[float], units: Sequence[float]) -> dict[str, float | None]:
    """In matmuls of the same round."""
    ratios = [time / unit for time, unit in zip(times, units, strict=True)]
    return {"matmuls": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def goals(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The figures that the passes are held to."""
    one = rows["rlstab: + reverse KL"]["matmuls"]
    many = rows[f"rlstab: + {len(MANY)} divergences"]["matmuls"]
    found = {
        "matmuls with one divergence": one,
        "share of the host's time": one / rows["host: + reverse KL"]["matmuls"],
        "share of the host's time, JSD": rows["rlstab: + JSD"]["matmuls"] / rows["host: + JSD"]["matmuls"],
        "each further divergence": (many / one - 1) / (len(MANY) - 1),
        "share of the matmul rate": 6 / one,
    }
    peaks = [rows[name]["peak MiB"] for name in ("rlstab: + reverse KL", "host: log-prob, entropy")]
    if all(peaks):
        found["peak over that of the host's log-prob"] = peaks[0] / peaks[1]
    return found


# --- showing -----------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what the figures were made."""
    info = Path("/proc/cpuinfo")
    cpu = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": len(cpu),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, trl, rlstab)},
    }


def show(result: dict[str, Any], console: Console) -> None:
    title = f"{result['shape']}, {result['dtype']}: {result['matmul TFLOP/s']:.2g} TFLOP/s in a matmul"
    table = Table("pass", title=title)
    for column in ("matmuls", "min", "max", "peak MiB"):
        table.add_column(column, justify="right")
    for name, found in result["passes"].items():
        peak = found["peak MiB"]
        numbers = [f"{found[column]:.2f}" for column in ("matmuls", "min", "max")]
        table.add_row(name, *numbers, "" if peak is None else f"{peak:.0f}")
    console.print(table)
    for name, value in result["goals"].items():
        console.print(f"{name}: {value:.3f}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", metavar="NxVxD", help="tokens, vocabulary and width")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    device, console = torch.device(arguments.device), Console()
    torch.set_num_threads(arguments.threads)
    shapes = arguments.shapes or (CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES)
    figures: dict[str, Any] = {
        "machine": machine(device),
        "skipped": skipped(device),
        "results": measure(shapes, device, arguments.rounds),
    }
    for result in figures["results"]:
        show(result, console)
    for name, reason in figures["skipped"].items():
        console.print(f"not measured: {name} ({reason})", highlight=False)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
