"""What `TrustRegionSFTTrainer` can honour, and what it refuses before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model

from rlstab.batch import Column, ExactDivergence, LogProbs, Requirement, VocabStat
from rlstab.errors import ConfigError
from rlstab.losses import Objective, Statistic, Term, presets, term_name
from rlstab.trainers._host import SFTConfig

if TYPE_CHECKING:
    from rlstab.trainers._sft import TrustRegionSFTTrainer

__all__ = ["check_host", "check_supervised", "checked_period", "notice_inert_parts", "resolve", "streamed"]

logger = logging.getLogger("rlstab")

SNAPSHOTS = ("initial", "old")


def resolve(objective: Objective | Term | None, args: SFTConfig | None, given: Mapping[str, Any]) -> Objective:
    """The objective to train with, and a refusal of host arguments that would contradict it.

    Args:
        objective: as given to the trainer.
        args: the host's arguments.
        given: all arguments of the host's constructor, by name.
    """
    loss_type = "nll" if args is None else args.loss_type
    if given.get("compute_loss_func") is not None:
        raise ConfigError("compute_loss_func: the loss is the objective's; write a term of your own instead")
    if args is not None and args.label_smoothing_factor:
        raise ConfigError(
            f"args.label_smoothing_factor={args.label_smoothing_factor} needs the host's own loss, from whole logits: "
            "leave it at 0, or use trl.SFTTrainer"
        )
    if objective is None:
        return presets.dft() if loss_type == "dft" else presets.sft()
    if loss_type != "nll":
        raise ConfigError(
            f"args.loss_type={loss_type!r} has no effect beside objective=...: leave it at 'nll' and use DFT()"
        )
    if isinstance(objective, Term):
        objective = Objective({term_name(objective): objective})
    if not isinstance(objective, Objective):
        raise ConfigError(
            f"objective: expected an Objective, a term or None, got {objective!r} (a preset is called: presets.trsft())"
        )
    _check_terms(objective)
    return objective


def check_supervised(objective: Objective | Term | None, args: SFTConfig) -> set[str]:
    """Refuse, before a model is loaded, an objective that `TrustRegionSFTTrainer` would refuse with these arguments.

    Args:
        objective: the loss; None stands for that of `args`.
        args: the host's arguments.

    Returns:
        The earlier policies that the trainer will keep, by the names of their sources.

    Raises:
        ConfigError: for what cannot be honoured, with the reason and the remedy.

    Example:
        >>> check_supervised(presets.psft(), SFTConfig("runs/a", bf16=False))
        {'old'}
    """
    needs = resolve(objective, args, {}).requires
    return {need.source for need in needs if isinstance(need, LogProbs | ExactDivergence)} - {"policy"}


def _check_terms(objective: Objective) -> None:
    elsewhere = {name: term.rows for name, term in objective.terms.items() if term.rows != "demonstration"}
    if elsewhere:
        raise ConfigError(
            f"terms act on rows that supervised training does not have: {elsewhere}; expected rows='demonstration'"
        )
    foreign = sorted(str(need) for need in objective.requires if not _is_supplied(need))
    if foreign:
        raise ConfigError(
            f"the objective reads {foreign[0]}, which supervised training does not supply: expected log-probs of the "
            "policy, 'old' or 'initial', and the policy's own distribution"
        )


def _is_supplied(need: Requirement) -> bool:
    match need:
        case ExactDivergence(source=source):
            return source in SNAPSHOTS
        case LogProbs(source=source):
            return source in ("policy", *SNAPSHOTS)
    return isinstance(need, VocabStat) or need == Column("token_ids")


def streamed(needs: frozenset[Requirement]) -> tuple[Statistic, ...]:
    """What has to be streamed from hidden states; nothing where the host's fused head gives all that is read."""
    if VocabStat("log_z") in needs:
        return ("logp", "entropy", "top1", "log_z")
    return ("logp", "entropy", "top1") if any(isinstance(need, ExactDivergence) for need in needs) else ()


def checked_period(snapshot_every: int) -> int:
    """A number of optimizer steps, or a refusal."""
    if snapshot_every < 1:
        raise ConfigError(f"snapshot_every: expected at least 1 optimizer step, got {snapshot_every!r}")
    return snapshot_every


def check_host(trainer: TrustRegionSFTTrainer, sources: set[str]) -> None:
    """Refuse what the host is set up for and the objective cannot go along with."""
    if sources and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ConfigError(
            f"the objective compares with {sorted(sources)[0]!r}, earlier weights of the policy, which FSDP and "
            "DeepSpeed spread over ranks: use DDP, or terms that read the policy alone (SFT, DFT, TrSFT, CHORD)"
        )
    parallel = trainer.accelerator.parallelism_config
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
        raise ConfigError(
            "context and sequence parallelism spread a demonstration over ranks, and terms need its tokens together: "
            "use data or tensor parallelism"
        )
    if is_peft_model(trainer.model) and trainer.model.active_peft_config.is_prompt_learning:
        raise ConfigError(
            "peft_config: prompt learning puts tokens of its own before each row, where terms would take them for "
            "demonstrated ones: expected an adapter such as LoRA"
        )


def notice_inert_parts(objective: Objective, snapshot_every: int) -> list[str]:
    """Say which parts cannot act because the snapshot is taken anew at every step."""
    if snapshot_every > 1:
        return []
    inert = [f"{name}: {text}" for name, term in objective.terms.items() for text in term.inert_on_policy]
    for text in inert:
        logger.warning("%s is inert with a snapshot at every step (policy = old): set snapshot_every > 1", text)
    return inert
