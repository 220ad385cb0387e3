"""Rollout engines and worker pools: empty so far, rollouts are those of the host trainer."""

__all__: list[str] = []
