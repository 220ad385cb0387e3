"""Rollout engines and worker pools: empty so far, rollouts are those of the host trainer."""

if __name__ != "rlstab.rollouts":
    raise ImportError(
        f"this room is rlstab.rollouts; as {__name__!r} it would be a second copy: import rlstab.rollouts"
    )

__all__: list[str] = []
