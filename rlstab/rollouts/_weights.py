"""Where an engine's new weights come from."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeGuard, cast, final

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlstab.rollouts._adapters import DOWN, UP, AdaptedWeights

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["ModelWeights", "WeightSource"]


class WeightSource(ABC):
    """Named tensors of a model, under the names of its checkpoints; can be read any number of times.

    Example:
        >>> import torch
        >>> class Averaged(WeightSource):
        ...     def __init__(self, *models):
        ...         self.models = models
        ...     def named_tensors(self):
        ...         for name in self.models[0].state_dict():
        ...             yield name, torch.stack([model.state_dict()[name] for model in self.models]).mean(0)
        >>> source = Averaged(nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False))
        >>> [(name, tuple(tensor.shape)) for name, tensor in source.named_tensors()]
        [('weight', (1, 2))]
    """

    @abstractmethod
    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and persistent buffer, tied ones under each of their names, adapters merged.

        A tensor is valid as long as the trainer does not step; its reader must not write to it.
        """

    def adapted(self) -> AdaptedWeights | None:
        """The same weights as a base that stays and changes that are small; None where there is nothing to gain."""
        return None


@final
class ModelWeights(WeightSource):
    """The weights of a model in this process, as it is whenever they are read.

    Adapters of PEFT are merged into copies: the model is exactly as before when the reading ends.

    Args:
        model: the model, unwrapped, each of its parameters whole on this process.

    Example:
        >>> source = ModelWeights(nn.Linear(2, 1, bias=False))
        >>> [(name, tuple(tensor.shape)) for name, tensor in source.named_tensors()]
        [('weight', (1, 2))]
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As in `WeightSource`."""
        if _is_adapted(self.model):
            yield from _merged_tensors(self.model)
        else:
            yield from _detached(self.model)

    def adapted(self) -> AdaptedWeights | None:
        """As in `WeightSource`: of a model with PEFT's adapters."""
        return _adapted(self.model) if _is_adapted(self.model) else None


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model inside PEFT's wrapper, if there is one."""
    return cast("PreTrainedModel", model.get_base_model()) if _is_adapted(model) else model


def _is_adapted(model: nn.Module) -> TypeGuard[PeftModel]:
    """Is it a model of PEFT? Without looking for the package, which takes milliseconds: it has one only if loaded."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(extract_model_from_parallel(model), peft.PeftModel)


def _detached(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, tensor in module.state_dict().items():
        yield prefix + name, tensor.detach()


def _merged_tensors(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    base = model.get_base_model()
    inside: list[str] = []
    for path, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{path}.")
            yield from _merged_layer(module, f"{path}.")
        elif isinstance(module, ModulesToSaveWrapper):
            inside.append(f"{path}.")
            yield from _detached(module.modules_to_save[str(module.active_adapter)], f"{path}.")
    for name, tensor in base.state_dict().items():
        if not name.startswith(tuple(inside)):
            yield name, tensor.detach()


def _merged_layer(layer: BaseTunerLayer, prefix: str) -> Iterator[tuple[str, Tensor]]:
    # Merging and unmerging in place would leave a rounding error in the base weights each time.
    base: nn.Module = layer.get_base_layer()
    before = {name: tensor.detach().clone() for name, tensor in base.state_dict().items()}
    layer.merge()
    merged = {name: tensor.detach().clone() for name, tensor in base.state_dict().items()}
    layer.unmerge()
    base.load_state_dict(before)
    for name, tensor in merged.items():
        yield prefix + name, tensor


def _adapted(model: PeftModel) -> AdaptedWeights:
    """Factors of plain LoRA layers, and whole what other adapters change and what is trained beside them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    whole = model.get_base_model()
    base: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    inside: list[str] = []
    for path, module in whole.named_modules():
        prefix = f"{path}."
        if isinstance(module, BaseTunerLayer):
            inside.append(prefix)
            base |= _detached(module.get_base_layer(), prefix)
            changes |= _factors(module, prefix) if _is_plain(module) else _merged_layer(module, prefix)
        elif isinstance(module, ModulesToSaveWrapper):
            inside.append(prefix)
            base |= _detached(module.original_module, prefix)
            changes |= _detached(module.modules_to_save[str(module.active_adapter)], prefix)
    trained = {name for name, parameter in whole.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    for name, tensor in _detached(whole):
        if not name.startswith(tuple(inside)):
            (changes if name in trained else {})[name] = base[name] = tensor
    return AdaptedWeights(base=base, changes=changes)


def _is_plain(layer: BaseTunerLayer) -> TypeGuard[Linear]:
    """Is the adapter of a layer a product of two factors and nothing else?"""
    from peft.tuners.lora import Linear

    if type(layer) is not Linear or layer.fan_in_fan_out or layer.disable_adapters:
        return False
    active = layer.active_adapters
    return len(active) == 1 and active[0] in layer.lora_A and not (layer.lora_variant or any(layer.lora_bias.values()))


def _factors(layer: Linear, prefix: str) -> dict[str, Tensor]:
    (active,) = layer.active_adapters
    down, up = (cast(nn.Linear, part[active]).weight.detach() for part in (layer.lora_A, layer.lora_B))
    return {f"{prefix}weight{DOWN}": down, f"{prefix}weight{UP}": up.float() * layer.scaling[active]}
