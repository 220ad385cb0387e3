"""What the objective reads and the trainer has to supply: which references, and what is refused for want of it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from rlstab.batch import Column, ExactDivergence, LogProbs, Requirement
from rlstab.errors import ConfigError
from rlstab.losses import EntropyBonus, Objective, Surrogate, TopEntropy
from rlstab.record import RunFolder
from rlstab.rollouts import Engine
from rlstab.trainers._extra_rows import ExtraRows
from rlstab.trainers._guidance import Guidance, rows_of
from rlstab.trainers._host import GRPOConfig
from rlstab.trainers._policy_pass import streams
from rlstab.trainers._references import OWN, Teacher
from rlstab.trainers._reset import Reset
from rlstab.trainers._signals import Signals
from rlstab.trainers._snapshots import ANCHOR, lag_of
from rlstab.trainers._teacher import TeacherServer

__all__ = [
    "Supply",
    "check_sampler",
    "check_supply",
    "check_terms",
    "check_types",
    "fit_to_shards",
    "reference_sources",
]

PASSES = {"policy", "old", "sampler"}


@dataclass(frozen=True, kw_only=True)
class Supply:
    """What a trainer is given beside the host's arguments, from which terms may read.

    Args:
        rows: what rows beside the rollouts bring along, by their role.
        teachers: who answers for sources of the user's own.
        reset: when the source `anchor` is moved.

    Raises:
        ConfigError: if a teacher has the name of another source.

    >>> Supply(teachers={"old": "gpt2"})
    Traceback (most recent call last):
    ...
    rlstab.errors.ConfigError: teachers: 'old' is a source of the trainer's own; expected another name
    """

    rows: Mapping[str, frozenset[Requirement]] = field(default_factory=dict)
    teachers: Mapping[str, Teacher] = field(default_factory=dict)
    reset: Reset | None = None

    def __post_init__(self) -> None:
        taken = sorted(name for name in self.teachers if name in {*PASSES, *OWN, ANCHOR} or lag_of(name))
        if taken:
            raise ConfigError(f"teachers: {taken[0]!r} is a source of the trainer's own; expected another name")

    @classmethod
    def of(
        cls,
        extra_rows: Sequence[ExtraRows],
        teachers: Mapping[str, Teacher] | None,
        reset: Reset | None,
        guidance: Guidance | None = None,
    ) -> Supply:
        """That of a trainer's arguments; two sources of rows with one role are refused."""
        prefixes = rows_of(guidance)
        roles = [*(source.role for source in extra_rows), *prefixes]
        if len(set(roles)) < len(roles):
            raise ConfigError(f"extra_rows: expected one source for each role, got {roles}")
        rows = prefixes | {source.role: source.carries for source in extra_rows}
        return cls(rows=rows, teachers=teachers or {}, reset=reset)

    @property
    def sources(self) -> set[str]:
        """The references that there can be, but those of the past."""
        return {*OWN, ANCHOR, *self.teachers}

    def supplies(self, source: str) -> bool:
        """Whether there is such a reference."""
        return source in self.sources or lag_of(source) is not None


def reference_sources(
    needs: frozenset[Requirement], args: GRPOConfig, *, peft: bool, supply: Supply | None = None
) -> set[str]:
    """The references that terms and parts need, or a refusal of sources that the trainer cannot supply."""
    supply = supply or Supply()
    exact = {need.source for need in needs if isinstance(need, ExactDivergence)}
    sources = exact | {need.source for need in needs if isinstance(need, LogProbs)}
    _check_known(sources - PASSES | exact, supply)
    served = sorted(name for name in exact if isinstance(supply.teachers.get(name), TeacherServer))
    if served:
        raise ConfigError(
            f"an exact divergence from {served[0]!r} needs a model to run, and a server returns log-probs of the "
            "sampled tokens only: use a sampled form such as KL(estimator='k2', weight='detached'), or pass a model"
        )
    _check_moving(sources, args, peft=peft)
    _check_used(sources, supply)
    return {source for source in sources if supply.supplies(source)}


def _check_known(sources: set[str], supply: Supply) -> None:
    unknown = sorted(source for source in sources if not supply.supplies(source))
    if not unknown:
        return
    if unknown[0] in PASSES:
        raise ConfigError(
            f"an exact divergence from {unknown} needs a model to run: expected a reference among "
            f"{sorted(supply.sources)}, or 'previous(k)'"
        )
    known = supply.sources | PASSES
    raise ConfigError(
        f"the objective reads log-probs of {unknown}, which this trainer does not supply: expected among "
        f"{sorted(known)}, 'previous(k)', or a name in teachers={{{unknown[0]!r}: model or TeacherServer}}"
        f"{_did_you_mean(unknown[0], known)}"
    )


def _check_used(sources: set[str], supply: Supply) -> None:
    """Refuse what is given and read by nothing, and the other way round."""
    idle = sorted(set(supply.teachers) - sources)
    if idle:
        raise ConfigError(
            f"teachers: nothing compares with {idle[0]!r}: drop it, or add a term with reference={idle[0]!r}"
        )
    if ANCHOR in sources and supply.reset is None:
        raise ConfigError(
            "a term compares with the reference 'anchor', but nothing ever moves it: pass reset=Reset(every=...), or "
            "use 'initial'"
        )
    if supply.reset is not None and ANCHOR not in sources:
        raise ConfigError(
            "reset moves the reference 'anchor', but nothing compares with it: drop it, or add a term such as "
            "1e-3 * ReverseKL(reference='anchor')"
        )


def _check_moving(sources: set[str], args: GRPOConfig, *, peft: bool) -> None:
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


def check_terms(needs: frozenset[Requirement]) -> None:
    """Refuse what this trainer never has, however it is set up."""
    if Column("baseline") in needs:
        raise ConfigError(
            "the objective reads a baseline per completion (for ReMax, the reward of a greedy one), which this trainer "
            "does not produce: use GroupCenter() or LeaveOneOut(), or fill the column in your own trainer"
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


def fit_to_shards(trainer: Any) -> None:
    """Leave out, and say so, what cannot be measured of a policy that is spread over ranks.

    Raises:
        ConfigError: a term reads it.
    """
    for source in sorted(trainer._references.give_up_parked()):
        trainer.report_skipped(
            f"drift/{source}/kl", "the policy is spread over ranks: use a term that compares with this reference"
        )
    if trainer.is_deepspeed_enabled or trainer.accelerator.is_fsdp2:
        return
    flat = "FSDP1 keeps weights flat, which only a forward can read: use FSDP2 (fsdp_config with version 2)"
    if streams(trainer.objective.requires):
        raise ConfigError(f"objective: a term reads whole distributions, for which it needs the head, and {flat}")
    if trainer.signals.drift:
        trainer.signals = replace(trainer.signals, drift=False)
        trainer.report_skipped("drift/initial/kl", flat)


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
