"""What stands between backward and update in a recipe: gradient stabilisers, and optimizers that hold out spikes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, final

from torch.optim import Optimizer

from rlstab.optim import SPAM, Chain, GradientStabiliser, StableSPAM
from rlstab.trainers import (
    GRPOConfig,
    SFTConfig,
    StableGRPOTrainer,
    SteadyGradients,
    TrustRegionSFTTrainer,
    check_unclipped,
)

__all__ = ["OptimizerSource", "SpamAdam", "StableSpamAdam", "Updates"]


class OptimizerSource(ABC):
    """An optimizer by its settings; learning rate and weight decay are those of the trainer.

    Example:
        >>> import torch
        >>> class Momentum(OptimizerSource):
        ...     def choice(self):
        ...         return torch.optim.SGD, {"momentum": 0.9}
        >>> Momentum().of(GRPOConfig("runs/a", learning_rate=0.1, max_grad_norm=0.0, bf16=False))[1]
        {'momentum': 0.9, 'lr': 0.1}
    """

    @abstractmethod
    def choice(self) -> tuple[type[Optimizer], dict[str, Any]]:
        """The optimizer's class, and its arguments but for parameters, learning rate and weight decay."""

    def of(self, args: GRPOConfig | SFTConfig) -> tuple[type[Optimizer], dict[str, Any]]:
        """Class and arguments as a host's trainer takes them (`optimizer_cls_and_kwargs`).

        Raises:
            ConfigError: if the host clips gradients before they come here.
        """
        check_unclipped(args, type(self).__name__)
        kind, settings = self.choice()
        return kind, {**settings, "lr": args.learning_rate}


@final
@dataclass(frozen=True, kw_only=True)
class SpamAdam(OptimizerSource):
    r"""SPAM (`rlstab.optim.SPAM`): AdamW that clips gradient elements beyond their second moment, with resets.

    Args:
        betas: decay of first and second moment.
        eps: added to the denominator.
        theta: $\theta$, by how much $g^2$ may exceed the second moment.
        reset: steps between resets of the moments; 0 for none.
        warmup: steps of the warm-up after a reset.

    Example:
        >>> SpamAdam(reset=100).choice()[1]["reset"]
        100
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    theta: float = 5000.0
    reset: int = 500
    warmup: int = 150

    def choice(self) -> tuple[type[Optimizer], dict[str, Any]]:
        """SPAM, with these settings."""
        return SPAM, asdict(self)


@final
@dataclass(frozen=True, kw_only=True)
class StableSpamAdam(OptimizerSource):
    """Stable-SPAM (`rlstab.optim.StableSPAM`): AdamW on gradients clipped and normalised tensor by tensor, with resets.

    Args:
        betas: decay of first and second moment.
        eps: added to denominators.
        gamma1: decay of the mean norm.
        gamma2: decay of the mean squared norm.
        theta: decay of the clip's threshold.
        reset: steps between resets of the moments; 0 for none.
        compat: `paper`, or `released` for the resets of the released class.

    Example:
        >>> StableSpamAdam().choice()[0].__name__
        'StableSPAM'
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    gamma1: float = 0.7
    gamma2: float = 0.9
    theta: float = 0.999
    reset: int = 1000
    compat: Literal["paper", "released"] = "paper"

    def choice(self) -> tuple[type[Optimizer], dict[str, Any]]:
        """Stable-SPAM, with these settings."""
        return StableSPAM, asdict(self)


@dataclass(frozen=True, kw_only=True)
class Updates:
    """What a run does between backward and update, checked before a model is loaded.

    Args:
        stabilisers: what every gradient passes, in turn.
        optimizer: class and arguments of an optimizer; None leaves it to the trainer.
    """

    stabilisers: tuple[GradientStabiliser, ...]
    optimizer: tuple[type[Optimizer], dict[str, Any]] | None

    @classmethod
    def of(
        cls,
        gradients: Sequence[GradientStabiliser],
        optimizer: OptimizerSource | None,
        args: GRPOConfig | SFTConfig,
    ) -> Self:
        """What a recipe asks for; its stabilisers are copied, because they hold the state of a run.

        Raises:
            ConfigError: if the host clips or scales gradients before they can be seen.
        """
        if gradients:
            check_unclipped(args, type(gradients[0]).__name__)
        copies = tuple(deepcopy(list(gradients)))
        return cls(stabilisers=copies, optimizer=None if optimizer is None else optimizer.of(args))

    def attach(self, trainer: StableGRPOTrainer | TrustRegionSFTTrainer) -> None:
        """Have a trainer do so."""
        if self.optimizer is not None:
            trainer.optimizer_cls_and_kwargs = self.optimizer
        if self.stabilisers:
            single = len(self.stabilisers) == 1
            trainer.add_callback(SteadyGradients(self.stabilisers[0] if single else Chain(self.stabilisers)))
