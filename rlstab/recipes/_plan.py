"""What a run will do, and what it will need, before anything is downloaded or started."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from rlstab.recipes._arguments import check_recipe, host_arguments
from rlstab.recipes._engines import VLLM, EngineSource, Overlapped, RayPool, Transformers, VLLMServer
from rlstab.recipes._memory import (
    Device,
    Memory,
    ModelSize,
    Sharding,
    amount,
    sampling_memory,
    training_memory,
)
from rlstab.recipes._models import ModelSource
from rlstab.recipes._reading import ReadRecipe
from rlstab.recipes._recipe import Recipe
from rlstab.trainers import GRPOConfig, SFTConfig

__all__ = ["Plan", "plan_checked", "plan_recipe"]

VLLM_SHARE = 0.9
OF_THE_POLICY = ("anchor", "previous(")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe will do here.

    Args:
        lines: what it trains, on what, how long, by topic.
        memory: what a process needs on its device, roughly; None where the size of the model is not known.
        device: what there is.
        notes: what stands in the way of a run on this machine.

    Example:
        >>> from rlstab.recipes import Recipe, TinyModel
        >>> from rlstab.tasks import SortDigits
        >>> recipe = Recipe(model=TinyModel(), task=SortDigits(), trainer={"bf16": False, "max_steps": 10})
        >>> plan = plan_recipe(ReadRecipe(recipe=recipe, text=""))
        >>> plan.lines["model"], plan.memory.optimizer, plan.notes
        ('TinyModel: 83,520 parameters, 83,520 of them trained', 668160.0, ())
    """

    lines: Mapping[str, str]
    memory: Memory | None
    device: Device
    notes: tuple[str, ...]

    def show(self, console: Console) -> None:
        """Print it."""
        for topic, text in self.lines.items():
            console.print(f"{topic:<12}{text}", markup=False, highlight=False, soft_wrap=True)
        self.warn(console)

    def warn(self, console: Console) -> None:
        """Print what stands in the way, if anything does."""
        for note in self.notes:
            console.print(f"warning:    {note}", markup=False, highlight=False, soft_wrap=True, style="yellow")


def plan_recipe(read: ReadRecipe) -> Plan:
    """Check a recipe as a run of it would, and say what the run will do; nothing is downloaded, built or written.

    Args:
        read: the recipe.

    Raises:
        ConfigError: for what a run would refuse before it loads anything.
    """
    recipe = read.recipe
    args = host_arguments(recipe, recipe.output or Path("runs"), anywhere=not torch.cuda.is_available())
    return plan_checked(recipe, args, check_recipe(recipe, args).references)


def plan_checked(recipe: Recipe, args: GRPOConfig | SFTConfig, references: frozenset[str]) -> Plan:
    """The plan of a recipe that has been checked.

    Args:
        recipe: the recipe.
        args: the host's arguments for it.
        references: the sources that the policy is compared with.
    """
    device = Device.here()
    model = recipe.model.outline(recipe.task)
    size = None if model is None else ModelSize.of(model, recipe.adapter)
    memory = None if size is None else _memory(recipe, args, references, size, device)
    shown = "prompts" if recipe.supervised is None else "demonstrations"
    lines = {
        "model": f"{_source(recipe.model)}: {_sizes(size)}",
        "task": f"{type(recipe.task).__name__}: {recipe.prompts} {shown} to train on, {recipe.evaluation.prompts} x "
        f"{recipe.evaluation.samples} completions held out",
        **_rollouts(recipe, args),
        "objective": _objective(recipe),
        "references": ", ".join(sorted(references)) or "none",
        "steps": _steps(recipe, args),
        "memory": f"{memory} per process; {device.name} has {amount(device.memory)}"
        if memory
        else f"not known; {device.name} has {amount(device.memory)}",
    }
    return Plan(lines=lines, memory=memory, device=device, notes=tuple(_obstacles(recipe, args, memory, device)))


def _rollouts(recipe: Recipe, args: GRPOConfig | SFTConfig) -> dict[str, str]:
    """What rewards the policy, and what samples from it."""
    if isinstance(args, SFTConfig):
        return {}
    rewards = ", ".join(f"{part.weight:g} {name}" for name, part in recipe.named_rewards.items())
    return {"rewards": rewards, "sampled by": _sampler(recipe, args)}


def _memory(
    recipe: Recipe, args: GRPOConfig | SFTConfig, references: frozenset[str], size: ModelSize, device: Device
) -> Memory | None:
    """The estimate, unless a teacher's size is not known."""
    beside = 0.0
    for source in references:
        teacher = recipe.teachers.get(source)
        if isinstance(teacher, ModelSource):
            outline = teacher.outline(recipe.task)
            if outline is None:
                return None
            held = ModelSize.of(outline)
            beside += held.parameters * held.bytes_each
        elif teacher is None and recipe.adapter is None and not source.startswith(OF_THE_POLICY):
            beside += size.parameters * size.bytes_each
    training = training_memory(size, args, Sharding.of_launch(), references=beside)
    return Memory(**training, sampling=_sampling(recipe.engine, args, size, device))


def _sampling(engine: EngineSource | None, args: GRPOConfig | SFTConfig, size: ModelSize, device: Device) -> float:
    if isinstance(args, SFTConfig):
        return 0.0
    rows = args.per_device_train_batch_size * args.steps_per_generation
    match engine:
        case Overlapped(engine=overlapped):
            return _sampling(overlapped, args, size, device)
        case Transformers(slots=slots, dtype=dtype):
            copy = size.parameters * size.bytes_each if engine.copy and dtype is None else 0
            return copy + sampling_memory(size, args, slots=min(slots, rows), copied=dtype)
        case VLLM(arguments=arguments):
            return device.memory * float(arguments.get("gpu_memory_utilization", VLLM_SHARE))
        case VLLMServer() | RayPool():
            return 0.0
    if args.use_vllm:
        return device.memory * args.vllm_gpu_memory_utilization if args.vllm_mode == "colocate" else 0.0
    return sampling_memory(size, args, slots=rows)


def _source(model: ModelSource) -> str:
    name = vars(model).get("name")
    return type(model).__name__ + (f" {name}" if name else "")


def _sizes(size: ModelSize | None) -> str:
    if size is None:
        return "not on this machine, so its size is not known; a run downloads it"
    return f"{size.parameters:,} parameters, {size.trained:,} of them trained"


def _objective(recipe: Recipe) -> str:
    if recipe.objective is None:
        return f"the host's own loss, {recipe.trainer.get('loss_type')}"
    terms = [f"{name} ({type(term).__name__})" for name, term in recipe.objective.terms.items()]
    if recipe.supervised is not None:
        return " + ".join(terms)
    advantage = recipe.advantage or recipe.objective.advantage
    return f"{' + '.join(terms)}; advantage {'of the host' if advantage is None else type(advantage).__name__}"


def _sampler(recipe: Recipe, args: GRPOConfig) -> str:
    if recipe.engine is not None:
        return " of ".join(type(engine).__name__ for engine in _nested(recipe.engine))
    return f"vLLM by the host, {args.vllm_mode}" if args.use_vllm else "the host, with transformers"


def _nested(engine: EngineSource | None) -> Iterator[EngineSource]:
    """An engine, and those that work inside it."""
    while engine is not None:
        yield engine
        engine = engine.engine if isinstance(engine, Overlapped | RayPool) else None


def _steps(recipe: Recipe, args: GRPOConfig | SFTConfig) -> str:
    accumulation, world = args.gradient_accumulation_steps, args.world_size
    rows = args.per_device_train_batch_size * accumulation * world
    if isinstance(args, SFTConfig):
        steps = args.max_steps if args.max_steps > 0 else round(recipe.prompts * args.num_train_epochs / rows)
        return f"{steps} updates of {_batch(args, rows)}"
    generation = args.per_device_train_batch_size * args.steps_per_generation * world
    updates = args.steps_per_generation * args.num_iterations / accumulation
    steps = args.max_steps
    if steps <= 0:
        steps = round(recipe.prompts * args.num_generations * args.num_train_epochs * args.num_iterations / rows)
    return (
        f"{steps} updates of {_batch(args, rows)}; {generation} completions of "
        f"{generation // args.num_generations} prompts at a time, for {updates:g} updates"
    )


def _batch(args: GRPOConfig | SFTConfig, rows: int) -> str:
    world = args.world_size
    return (
        f"{rows} rows ({args.per_device_train_batch_size} x {args.gradient_accumulation_steps} on {world} "
        f"{'process' if world == 1 else 'processes'})"
    )


def _obstacles(recipe: Recipe, args: GRPOConfig | SFTConfig, memory: Memory | None, device: Device) -> Iterator[str]:
    if memory is not None and memory.total > device.memory:
        yield (
            f"memory: about {amount(memory.total)} are needed, {device.name} has {amount(device.memory)}: lower "
            "trainer.per_device_train_batch_size (and raise gradient_accumulation_steps), set "
            "trainer.gradient_checkpointing, train an adapter, or launch on several devices with FSDP"
        )
    if args.bf16 and not torch.cuda.is_available():
        yield "trainer.bf16: there is no GPU here; a run on this machine needs --trainer.bf16=false"
    engines = list(_nested(recipe.engine))
    hosts_vllm = isinstance(args, GRPOConfig) and args.use_vllm
    if (hosts_vllm or any(isinstance(engine, VLLM) for engine in engines)) and find_spec("vllm") is None:
        yield "vLLM samples, and is not installed here: pip install 'rlstab[vllm]'"
    if any(isinstance(engine, RayPool) for engine in engines) and find_spec("ray") is None:
        yield "Ray runs the engines, and is not installed here: pip install 'rlstab[ray]'"
