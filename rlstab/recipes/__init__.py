"""Recipes: a YAML file becomes frozen dataclasses, and these become a run."""

from rlstab.recipes._beside import WarmedUp
from rlstab.recipes._buffer import BufferSource
from rlstab.recipes._build_buffer import build_recipe_buffer
from rlstab.recipes._engines import VLLM, EngineSource, Overlapped, RayPool, Transformers, VLLMServer
from rlstab.recipes._environments import Attempts, EnvironmentSource
from rlstab.recipes._evaluate import Estimate, Evaluation, Example, evaluate
from rlstab.recipes._expert import ExpertRows
from rlstab.recipes._gradients import OptimizerSource, SpamAdam, StableSpamAdam
from rlstab.recipes._memory import Device, Memory, ModelSize, Sharding
from rlstab.recipes._models import LoadedModel, LoRA, ModelSource, PretrainedModel, TinyModel
from rlstab.recipes._plan import Plan, plan_recipe
from rlstab.recipes._reading import ReadRecipe, read_recipe, recipe_parser
from rlstab.recipes._recipe import HeldOut, Recipe
from rlstab.recipes._run import Outcome, run_recipe
from rlstab.recipes._supervised import Supervised
from rlstab.recipes._warmup import WarmUp, warm_up
from rlstab.recipes._watching import Watching

__all__ = [
    "VLLM",
    "Attempts",
    "BufferSource",
    "Device",
    "EngineSource",
    "EnvironmentSource",
    "Estimate",
    "Evaluation",
    "Example",
    "ExpertRows",
    "HeldOut",
    "LoRA",
    "LoadedModel",
    "Memory",
    "ModelSize",
    "ModelSource",
    "OptimizerSource",
    "Outcome",
    "Overlapped",
    "Plan",
    "PretrainedModel",
    "RayPool",
    "ReadRecipe",
    "Recipe",
    "Sharding",
    "SpamAdam",
    "StableSpamAdam",
    "Supervised",
    "TinyModel",
    "Transformers",
    "VLLMServer",
    "WarmUp",
    "WarmedUp",
    "Watching",
    "build_recipe_buffer",
    "evaluate",
    "plan_recipe",
    "read_recipe",
    "recipe_parser",
    "run_recipe",
    "warm_up",
]
