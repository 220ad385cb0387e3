"""Which signal comes at which level for which trainer; the tests run every cell, the guide shows it."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ACTIONS", "LEVELS", "TRAINERS", "Availability"]

TRAINERS = ("Trainer", "SFT", "DPO", "Distillation", "RLOO", "GRPO", "StableGRPO")
"""The trainers that are tried."""

LEVELS = ("callback", "attached")
"""`add_callback(Watch())` alone, and `watch(trainer)`."""

_OF_TRL = ("SFT", "DPO", "Distillation", "RLOO", "GRPO", "StableGRPO")
_SAMPLING = ("Distillation", "RLOO", "GRPO", "StableGRPO")
_REWARDED = ("RLOO", "GRPO", "StableGRPO")


class Availability(NamedTuple):
    """A row of the table.

    Args:
        key: a signal, or a prefix of signals that ends in a slash.
        callback: how often a plain callback has it: "step", "log" (when the host logs), "" (never).
        attached: how often `watch(trainer)` has it.
        trainers: those it is there for.
        needs: what else it takes.
    """

    key: str
    callback: str
    attached: str
    trainers: tuple[str, ...] = TRAINERS
    needs: str = ""


SIGNALS: tuple[Availability, ...] = (
    Availability("step/bad_gradients", "step", "step"),
    Availability("step/loss", "", "step"),
    Availability("train/grad_norm", "log", "step"),
    Availability("optimizer/", "step", "step", needs="an Adam; every 10 steps"),
    Availability("activation/", "step", "step", needs="its probe; every 10 steps"),
    Availability("attention/", "step", "step", needs="its probe, sdpa; every 10 steps"),
    Availability("spectral/", "step", "step", needs="its probe; every 10 steps"),
    Availability("policy/entropy", "log", "step", _OF_TRL),
    Availability("train/reward", "log", "step", _REWARDED),
    Availability("train/frac_reward_zero_std", "log", "step", _REWARDED),
    Availability("completions/mean_length", "log", "step", _SAMPLING),
    Availability("rollout/unique", "", "step", _SAMPLING),
    Availability("mismatch/", "", "step", ("GRPO",), "log-probs of the sampler"),
    Availability("mismatch/", "log", "step", ("StableGRPO",), "log-probs of the sampler"),
    Availability("drift/initial/kl", "log", "step", ("StableGRPO",), "every 10 steps"),
)

ACTIONS: dict[str, tuple[str, str, str]] = {
    "Note": ("yes", "yes", ""),
    "Notify": ("yes", "yes", ""),
    "Scale the learning rate": ("yes", "yes", ""),
    "Scale a coefficient": ("", "StableGRPO", "a term whose coefficient is a number"),
    "SkipStep": ("yes", "yes", "not with DeepSpeed"),
    "RollBack": ("yes", "yes", "a guard; not with DeepSpeed or FSDP; rollouts in use are dropped only when attached"),
    "Stop": ("yes", "yes", ""),
}
"""Action: whether a callback and an attached watch can take it, and what it needs."""
