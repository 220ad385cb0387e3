"""Where an engine's new weights come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast, final

from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from peft import PeftModel
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
        if is_peft_model(self.model):
            yield from _merged_tensors(cast("PeftModel", self.model))
        else:
            yield from _detached(self.model)


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model inside PEFT's wrapper, if there is one."""
    return cast("PreTrainedModel", cast("PeftModel", model).get_base_model()) if is_peft_model(model) else model


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
