"""What the objective reads and the trainer has to supply: which references, and what is refused for want of it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from torch import nn

from rlstab.batch import Column, ExactDivergence, LogProbs, Requirement, VocabStat
from rlstab.errors import ConfigError
from rlstab.losses import EntropyBonus, Objective, Surrogate, TopEntropy
from rlstab.record import RunFolder
from rlstab.rollouts import Engine
from rlstab.trainers._host import GRPOConfig
from rlstab.trainers._signals import Signals

__all__ = ["check_sampler", "check_supply", "check_terms", "check_types", "reference_sources"]

REFERENCES = {"initial", "moving"}
SUPPLIED_SOURCES = {"policy", "old", "sampler"} | REFERENCES


def reference_sources(needs: frozenset[Requirement], args: GRPOConfig, *, peft: bool) -> set[str]:
    """The references that terms and parts need, or a refusal of sources that the trainer cannot supply."""
    exact = {need.source for need in needs if isinstance(need, ExactDivergence)}
    sources = {need.source for need in needs if isinstance(need, LogProbs)}
    without_logits = sorted(exact - REFERENCES)
    if without_logits:
        raise ConfigError(
            f"an exact divergence from {without_logits} needs a model to run: expected a reference among "
            f"{sorted(REFERENCES)}"
        )
    sources |= exact
    unknown = sorted(sources - SUPPLIED_SOURCES)
    if unknown:
        raise ConfigError(
            f"the objective reads log-probs of {unknown}, which this trainer does not supply: expected among "
            f"{sorted(SUPPLIED_SOURCES)}{_did_you_mean(unknown[0], SUPPLIED_SOURCES)}"
        )
    if "moving" in sources and not args.sync_ref_model:
        raise ConfigError(
            "a term compares with the reference 'moving', but args.sync_ref_model=False leaves it where it starts: "
            "set sync_ref_model=True (with ref_model_sync_steps and ref_model_mixup_alpha), or use 'initial'"
        )
    if "moving" in sources and peft:
        raise ConfigError(
            "the reference 'moving' needs a copy of the whole policy, which a PEFT run does not keep: use "
            "'initial' (the adapter switched off), or train all weights"
        )
    if "moving" not in sources and args.sync_ref_model:
        raise ConfigError(
            "args.sync_ref_model=True moves the reference 'moving', but nothing compares with it: leave it at "
            "False, or add a term such as 0.05 * ReverseKL(reference='moving') (without an objective: set beta)"
        )
    return sources & REFERENCES


def check_terms(objective: Objective, needs: frozenset[Requirement]) -> None:
    """Refuse what this trainer never has, however it is set up."""
    elsewhere = {name: term.rows for name, term in objective.terms.items() if term.rows != "rollout"}
    if elsewhere:
        raise ConfigError(
            f"terms act on rows that this trainer does not have: {elsewhere}; expected rows='rollout' (other rows "
            "need a training loop of your own, which passes a TokenBatch for each)"
        )
    if Column("baseline") in needs:
        raise ConfigError(
            "the objective reads a baseline per completion (for ReMax, the reward of a greedy one), which this trainer "
            "does not produce: use GroupCenter() or LeaveOneOut(), or fill the column in your own trainer"
        )
    if VocabStat("log_z") in needs:
        raise ConfigError(
            "the objective reads log Z of every position (ZLoss), which this trainer does not measure: drop the term, "
            "or pass vocab={'log_z': ...} in your own trainer"
        )


def check_sampler(needs: frozenset[Requirement], returns_log_probs: bool) -> None:
    """Refuse parts that read the sampler's log-probs where generation has none."""
    if LogProbs("sampler") in needs and not returns_log_probs:
        raise ConfigError(
            "the objective reads the sampler's log-probs, but generation with transformers returns none: pass "
            "engine=TransformersEngine, set use_vllm=True, pass a rollout_func that returns 'logprobs', or drop "
            "the part that needs them"
        )


def check_supply(trainer: Any) -> None:
    """Refuse what the objective reads and the trainer, as it is set up, cannot give it."""
    objective, needs = trainer.objective, trainer._needs
    check_sampler(needs, trainer.returns_log_probs)
    if trainer.accelerator.num_processes > 1 and _ranks_tokens_locally(objective):
        raise ConfigError(
            "TopEntropy(over='micro_batch') would rank the tokens of each process by themselves "
            f"({trainer.accelerator.num_processes} processes): use over='step', which ranks those of the whole step"
        )


def _ranks_tokens_locally(objective: Objective) -> bool:
    weights = [
        w for term in objective.terms.values() if isinstance(term, Surrogate | EntropyBonus) for w in term.weights
    ]
    return any(isinstance(weight, TopEntropy) and weight.over == "micro_batch" for weight in weights)


def check_types(model: Any, signals: Any, run: Any, engine: Any) -> None:
    """Refuse arguments of rlstab's own that are of another kind than they should be, before anything is built."""
    checks = {
        "model": (model, isinstance(model, str | nn.Module), "a model or its path"),
        "signals": (signals, signals is None or isinstance(signals, Signals), "Signals(...), or None for no signals"),
        "run": (run, run is None or isinstance(run, RunFolder), "a RunFolder, as from RunFolder.create(path, ...)"),
        "engine": (
            engine,
            engine is None or isinstance(engine, Engine) or callable(engine),
            "an Engine, or a class or function that makes one, such as TransformersEngine",
        ),
    }
    for key, (value, holds, expected) in checks.items():
        if not holds:
            raise ConfigError(f"{key}: expected {expected}, got {value!r}")


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
