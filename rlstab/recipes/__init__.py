"""Recipes: a YAML file becomes frozen dataclasses, and these become a run."""

from rlstab.recipes._evaluate import Estimate, Evaluation, Example, evaluate
from rlstab.recipes._warmup import WarmUp, warm_up

__all__ = ["Estimate", "Evaluation", "Example", "WarmUp", "evaluate", "warm_up"]
