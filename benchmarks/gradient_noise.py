"""What exact divergences buy: the gradient noise of sampled and of exact values, and the updates that this costs.

    python benchmarks/gradient_noise.py [--json FILE] [--plot FILE] [--batches N] [--seeds N]

A tiny model learns to sort digits from demonstrations with errors (the reference), and then goes on with ever better
ones (policies at growing distances). At each distance, completions are drawn from the policy, and the gradient of a
divergence from the reference is taken from the same completions twice: from the sampled tokens alone
(`form="sampled"`, for the reverse KL the same as a bias-corrected k3 and as k2), and summed over the vocabulary
(`form="exact"`, streamed). Both have the same expectation. The noise of a batch is

    E |g - mean|² / |mean|²    with the mean of the exact gradient over all batches,

and what is left of it in the exact form is that of the prefixes. Then the divergence alone is minimised from the
farthest policy, each step on fresh completions, with the same optimizer: how many updates until the policy is near.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import rlstab
from rlstab.batch import ExactDivergence, TokenBatch
from rlstab.losses import Divergence, ForwardKL, JensenShannon, Objective, ReverseKL, streamed_statistics
from rlstab.models import language_head, tiny_causal_lm, tiny_tokenizer
from rlstab.recipes import WarmUp, warm_up
from rlstab.tasks import SortDigits

TASK = SortDigits(digits=6)
TOKENIZER = tiny_tokenizer(TASK.alphabet)
LENGTH = 7  # six digits and the end
ROWS = 32
SHARES = [0.1, 0.25, 0.5, 0.75, 1.0]  # of the way to a model of better demonstrations
DIVERGENCES: dict[str, type[Divergence]] = {"reverse KL": ReverseKL, "JSD": JensenShannon, "forward KL": ForwardKL}
FORMS = ("sampled", "exact")
DESCENDED = ("reverse KL", "forward KL")
NEAR = 0.25  # share of the divergence at the start that counts as near
BLUE, ORANGE, GREEN, TEXT, MUTED, GRID = "#0069a8", "#c44e00", "#00795a", "#1b1f24", "#5c6570", "#e4e7eb"
COLOURS = {"sampled": ORANGE, "exact": BLUE}
RATE = 5e-4
WATCHED, EVERY = 256, 5  # completions that tell how far the policy is, and how often


def reference_and_policies(steps: int) -> tuple[PreTrainedModel, list[PreTrainedModel]]:
    """A model of noisy demonstrations, and models on the way from there to one of better demonstrations."""
    reference = tiny_causal_lm(TOKENIZER, seed=0)
    warm_up(reference, TOKENIZER, TASK, WarmUp(steps=steps), seed=0)
    better = copy.deepcopy(reference)
    warm_up(better, TOKENIZER, TASK, WarmUp(steps=60, noise=0.2, learning_rate=1e-3), seed=1)
    return reference, [between(reference, better, share) for share in SHARES]


@torch.no_grad()
def between(start: PreTrainedModel, end: PreTrainedModel, share: float) -> PreTrainedModel:
    """A model with this share of the way behind it."""
    model = copy.deepcopy(start)
    for here, there in zip(model.parameters(), end.parameters(), strict=True):
        here.lerp_(there, share)
    return model


class Prompts:
    """Batches of prompts without end."""

    def __init__(self, seed: int) -> None:
        self._encoded = torch.tensor(TOKENIZER(list(TASK.prompts(4096, seed=seed)["prompt"]))["input_ids"])
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows: int) -> Tensor:
        """`[rows, P]`, all of one length."""
        return self._encoded[torch.randint(len(self._encoded), (rows,), generator=self._generator)]


def sample(policy: PreTrainedModel, prompts: Tensor) -> Tensor:
    """Prompts with completions drawn from the policy itself, the end repeated."""
    ids = policy.generate(  # type: ignore[operator]
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, max_new_tokens=LENGTH, top_k=0
    )
    return torch.nn.functional.pad(ids, (0, prompts.size(1) + LENGTH - ids.size(1)), value=TOKENIZER.pad_token_id)


def scored(policy: PreTrainedModel, reference: PreTrainedModel, ids: Tensor, generator: Divergence) -> TokenBatch:
    """The completions with log-probs of both and the exact divergence, from one streamed pass of each."""
    completion = ids[:, -LENGTH:]
    before = (completion == TOKENIZER.eos_token_id).cumsum(-1) - (completion == TOKENIZER.eos_token_id).long()
    mask = before == 0
    labels = completion.masked_fill(~mask, -100).flatten()
    need = ExactDivergence(generator, "initial")

    def states(model: Any) -> Tensor:
        hidden: Tensor = model.base_model(ids).last_hidden_state[:, -LENGTH - 1 : -1]
        return hidden.flatten(0, 1)

    with torch.no_grad():
        initial = states(reference), language_head(reference)
        ref_logp = streamed_statistics(*initial, labels)["logp"]
    found = streamed_statistics(
        states(policy), language_head(policy), labels, requirements=[need], references={"initial": initial}
    )
    logps = {"policy": found["logp"].view(mask.shape), "initial": ref_logp.view(mask.shape)}
    return TokenBatch(mask=mask, logps=logps, vocab={need.key: found[need.key].view(mask.shape)})


def gradient(policy: PreTrainedModel, loss: Tensor) -> Tensor:
    """Of all parameters, in one row."""
    parts = torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def noise(
    policy: PreTrainedModel, reference: PreTrainedModel, kind: type[Divergence], batches: int
) -> dict[str, float]:
    """The noise of both forms on the same batches, and how far the policy is."""
    prompts = Prompts(seed=2)
    torch.manual_seed(3)
    objectives = {form: Objective(term=kind(form=form)) for form in FORMS}  # type: ignore[arg-type]
    gradients: dict[str, list[Tensor]] = {form: [] for form in FORMS}
    values = []
    for _ in range(batches):
        batch = scored(policy, reference, sample(policy, prompts(ROWS)), kind().generator)
        losses = {form: objective(batch).loss for form, objective in objectives.items()}
        values.append(losses["exact"].item())
        for form, loss in losses.items():
            gradients[form].append(gradient(policy, loss))
    stacked = {form: torch.stack(found).double() for form, found in gradients.items()}
    mean = stacked["exact"].mean(0)
    spread = {form: float((g - mean).square().sum(-1).mean() / mean.square().sum()) for form, g in stacked.items()}
    bias = float((stacked["sampled"].mean(0) - mean).norm() / mean.norm())
    expected = (spread["sampled"] / batches) ** 0.5
    return {
        "divergence": statistics.mean(values),
        **spread,
        "ratio": spread["sampled"] / spread["exact"],
        "bias in standard errors": bias / expected,
    }


def descent(
    start: PreTrainedModel, reference: PreTrainedModel, kind: type[Divergence], form: str, *, seed: int, updates: int
) -> Iterator[float]:
    """The exact divergence on fresh completions, every few updates of a run that minimises nothing else."""
    policy = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=0.0)
    objective = Objective(term=kind(form=form))  # type: ignore[arg-type]
    prompts, watched = Prompts(seed=10 + seed), Prompts(seed=5)
    torch.manual_seed(20 + seed)
    for step in range(updates + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                seen = scored(policy, reference, sample(policy, watched(WATCHED)), kind().generator)
            (divergence,) = seen.vocab.values()
            yield float(divergence.sum() / seen.tokens)
        loss = objective(scored(policy, reference, sample(policy, prompts(ROWS)), kind().generator)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()


def descents(
    start: PreTrainedModel, reference: PreTrainedModel, *, seeds: int, updates: int
) -> dict[str, dict[str, Any]]:
    """The curves of all seeds, and the median number of updates until the policy is near; null where one never is."""
    found: dict[str, dict[str, Any]] = {}
    for name in DESCENDED:
        for form in FORMS:
            begun = time.process_time()
            kind = DIVERGENCES[name]
            curves = [list(descent(start, reference, kind, form, seed=seed, updates=updates)) for seed in range(seeds)]
            seconds = (time.process_time() - begun) / (seeds * updates)
            needed = [_first_below(curve, NEAR * curve[0]) for curve in curves]
            near = None if None in needed else statistics.median(filter(None, needed))
            found[f"{name}, {form}"] = {"curves": curves, "updates": near, "seconds per update": seconds}
    return found


def _first_below(curve: Sequence[float], level: float) -> int | None:
    return next((EVERY * place for place, value in enumerate(curve) if value <= level), None)


# --- showing -----------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Where and with what the figures were made."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, transformers, rlstab)},
    }


def show(figures: dict[str, Any], console: Console) -> None:
    table = Table("divergence", title=f"gradient noise of {ROWS} completions")
    for column in ("nats/token", "sampled", "exact", "ratio"):
        table.add_column(column, justify="right")
    for name, rows in figures["noise"].items():
        for row in rows:
            numbers = [f"{row[key]:.3g}" for key in ("divergence", "sampled", "exact", "ratio")]
            table.add_row(name, *numbers)
    console.print(table)
    for name, found in figures["descent"].items():
        console.print(f"{name}: {found['updates']} updates to {NEAR:.0%} of the start", highlight=False)


def plot(figures: dict[str, Any], file: Path) -> None:
    """Noise on the left, what it costs in updates on the right."""
    figure = Figure(figsize=(10.2, 3.5), dpi=160, layout="constrained", facecolor="white")
    axes = figure.subplots(1, 1 + len(DESCENDED), gridspec_kw={"wspace": 0.12})
    _plot_ratios(axes[0], figures["noise"])
    for panel, name in zip(axes[1:], DESCENDED, strict=True):
        _plot_descent(panel, name, figures["descent"])
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _panel(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=TEXT, pad=10)
    axes.set_xlabel(x, fontsize=9.5, color=MUTED)
    axes.set_ylabel(y, fontsize=9.5, color=MUTED)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9, length=0, which="both")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _plot_ratios(axes: Axes, noises: dict[str, list[dict[str, float]]]) -> None:
    _panel(axes, "Variance, sampled / exact", "share of the way from the reference", "ratio")
    for (name, rows), colour in zip(noises.items(), (BLUE, GREEN, ORANGE), strict=True):
        axes.plot(SHARES, [row["ratio"] for row in rows], color=colour, marker="o", markersize=4, label=name)
    axes.axhline(1.0, color=MUTED, linewidth=1, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, labelcolor=TEXT)


def _plot_descent(axes: Axes, name: str, found: dict[str, dict[str, Any]]) -> None:
    _panel(axes, f"Minimising the {name}", "update", "nats per token, exact")
    for form in FORMS:
        curves = torch.tensor(found[f"{name}, {form}"]["curves"])
        steps = range(0, EVERY * curves.size(1), EVERY)
        axes.fill_between(
            steps, curves.amin(0).tolist(), curves.amax(0).tolist(), color=COLOURS[form], alpha=0.15, linewidth=0
        )
        axes.plot(steps, curves.mean(0).tolist(), color=COLOURS[form], label=f"{form} gradient")
    axes.axhline(NEAR * float(curves[:, 0].mean()), color=MUTED, linewidth=1, linestyle=":")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=9, labelcolor=TEXT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=48, help="of completions, for each noise")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each descent")
    parser.add_argument("--updates", type=int, default=150, help="of each descent")
    parser.add_argument("--warm-up", type=int, default=200, help="steps that make the reference")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--plot", type=Path, help="file for the plot, PNG")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    reference, policies = reference_and_policies(arguments.warm_up)
    figures: dict[str, Any] = {
        "machine": machine(),
        "noise": {
            name: [noise(policy, reference, kind, arguments.batches) for policy in policies]
            for name, kind in DIVERGENCES.items()
        },
        "descent": descents(policies[-1], reference, seeds=arguments.seeds, updates=arguments.updates),
    }
    show(figures, Console())
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if arguments.plot:
        plot(figures, arguments.plot)


if __name__ == "__main__":
    main()
