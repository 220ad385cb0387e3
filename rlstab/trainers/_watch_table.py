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
        key: a signal, or a prefix of signals that ends in a slash or an @.
        callback: how often a plain callback has it: "step", "log" (when the host logs), "" (never).
        attached: how often `watch(trainer)` has it.
        trainers: those it is there for.
        needs: what else it takes.
        apart: a test of its own runs it, because it needs more steps or other settings than all rows together.
    """

    key: str
    callback: str
    attached: str
    trainers: tuple[str, ...] = TRAINERS
    needs: str = ""
    apart: bool = False


SIGNALS: tuple[Availability, ...] = (
    Availability("step/bad_gradients", "step", "step"),
    Availability("step/loss", "", "step"),
    Availability("train/grad_norm", "log", "step"),
    Availability("optimizer/", "step", "step", needs="an Adam; every 10 steps"),
    Availability("activation/", "step", "step", needs="its probe; every 10 steps"),
    Availability("attention/", "step", "step", needs="its probe, sdpa; every 10 steps"),
    Availability("spectral/", "step", "step", needs="its probe; every 10 steps"),
    Availability("gradient/rank", "step", "step", needs="a transformer; every 50 steps"),
    Availability("gradient/leading", "step", "step", needs="a transformer; every 50 steps"),
    Availability("gradient/roughness", "step", "step", needs="a transformer; every 50 steps"),
    Availability("gradient/outlier", "", "step", ("DPO", *_REWARDED), "weights on one device; every 10 steps"),
    Availability("gradient/cancellation", "", "step", ("DPO", *_REWARDED), "weights on one device; every 10 steps"),
    Availability("gradient/entanglement", "", "step", ("DPO", *_REWARDED), "weights on one device; every 10 steps"),
    Availability("policy/log_z", "", "step", ("DPO", *_REWARDED), "weights on one device; every 10 steps"),
    Availability("policy/entropy", "log", "step", _OF_TRL),
    Availability("train/reward", "log", "step", _REWARDED),
    Availability("train/frac_reward_zero_std", "log", "step", _REWARDED),
    Availability("completions/mean_length", "log", "step", _SAMPLING),
    Availability("eval/reward", "log", "log", _REWARDED, "evaluations of the host, or `Watch.show`", apart=True),
    Availability("eval/entropy", "log", "log", _OF_TRL, "evaluations of the host, or `Watch.show`", apart=True),
    Availability("eval/pass@", "log", "log", needs="`Watch.show`", apart=True),
    Availability("rollout/unique", "", "step", _SAMPLING),
    Availability("rollout/repetition", "", "step", _SAMPLING),
    Availability("rollout/distinct", "", "step", _REWARDED),
    Availability("rollout/best@", "", "step", _REWARDED),
    Availability("rollout/advantage_std", "", "step", _REWARDED),
    Availability("rollout/advantage_max", "", "step", _REWARDED),
    Availability("rollout/advantage_zero", "", "step", _REWARDED),
    Availability("rollout/language_shift", "", "step", _SAMPLING),
    Availability("rollout/format_shift", "", "step", _SAMPLING),
    Availability("mismatch/", "", "step", ("GRPO",), "log-probs of the sampler"),
    Availability("mismatch/", "log", "step", ("StableGRPO",), "log-probs of the sampler"),
    Availability("mismatch/lag", "", "step", ("GRPO",), "log-probs of the sampler"),
    Availability("mismatch/lag", "log", "step", ("StableGRPO",), "log-probs of the sampler"),
    Availability("drift/initial/kl", "log", "step", ("StableGRPO",), "every 10 steps"),
    Availability("drift/previous/kl", "log", "step", ("StableGRPO",), "every 10 steps"),
    Availability("drift/initial/reward_correlation", "log", "step", ("StableGRPO",), "every 10 steps", apart=True),
    Availability("law/ceiling", "", "step", _REWARDED, "20 steps", apart=True),
    Availability(
        "law/reward_per_sqrt_kl", "", "step", ("StableGRPO",), "5 measurements of drift/initial/kl", apart=True
    ),
    Availability("drift/initial/surprise", "", "step", ("StableGRPO",), "15 steps, drift/initial/kl", apart=True),
    Availability("forecast/", "step", "step", needs="8 measurements that lead to the bound, 15 of entropy", apart=True),
    Availability("drift/reference/reward_correlation", "", "step", ("GRPO",), "beta above 0", apart=True),
    Availability("tools/failure_frequency", "log", "step", ("GRPO", "StableGRPO"), "tools", apart=True),
)

ACTIONS: dict[str, tuple[str, str, str]] = {
    "Note": ("yes", "yes", ""),
    "Notify": ("yes", "yes", ""),
    "Scale the learning rate": ("yes", "yes", ""),
    "Scale a coefficient": ("", "StableGRPO", "a term whose coefficient is a number"),
    "SkipStep": ("yes", "yes", "not with DeepSpeed"),
    "RollBack": ("yes", "yes", "a guard; with DeepSpeed only when attached; rollouts are dropped only when attached"),
    "Stop": ("yes", "yes", ""),
}
"""Action: whether a callback and an attached watch can take it, and what it needs."""
