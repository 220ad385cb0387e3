"""Where the model of a run comes from."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlstab.errors import ConfigError
from rlstab.models import tiny_causal_lm, tiny_chat_tokenizer, tiny_moe, tiny_tokenizer
from rlstab.tasks import EmbeddedTask, Task

__all__ = ["LoRA", "LoadedModel", "ModelSource", "PretrainedModel", "TinyModel"]


class LoadedModel(NamedTuple):
    """A causal language model and its tokenizer.

    Example:
        >>> from rlstab.tasks import SortDigits
        >>> model, tokenizer = TinyModel(hidden=16, heads=2).load(SortDigits(), seed=0)
        >>> len(tokenizer) == model.config.vocab_size
        True
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class ModelSource(ABC):
    """Where a model comes from: it is loaded, or built, when the run starts.

    Example:
        >>> from rlstab.tasks import SortDigits
        >>> class Given(ModelSource):
        ...     def __init__(self, model, tokenizer):
        ...         self.loaded = LoadedModel(model, tokenizer)
        ...     def load(self, task, *, seed):
        ...         return self.loaded
        >>> Given(*TinyModel().load(SortDigits(), seed=0)).load(SortDigits(), seed=1).model.num_parameters()
        83520
    """

    @abstractmethod
    def load(self, task: Task, *, seed: int) -> LoadedModel:
        """The model with its first weights, and its tokenizer.

        Args:
            task: what the model will be trained on.
            seed: seed of the weights, where they are drawn.
        """

    def outline(self, task: Task) -> PreTrainedModel | None:
        """The model without weights, for its size; None where this machine does not know it without a download.

        Args:
            task: what the model will be trained on.
        """
        return None


@final
@dataclass(frozen=True, kw_only=True)
class TinyModel(ModelSource):
    """A small transformer of random weights over the characters of an embedded task: nothing is downloaded.

    Args:
        hidden: width of the residual stream.
        layers: number of transformer blocks.
        heads: number of attention heads.
        experts: number of experts of each block, two of which see a token; none for a dense model.
        max_positions: longest prompt and completion together, in tokens.
        chat: whether it takes conversations, calls of tools among them (`rlstab.models.tiny_chat_tokenizer`).
    """

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    experts: int | None = None
    max_positions: int = 256
    chat: bool = False

    def load(self, task: Task, *, seed: int) -> LoadedModel:
        """Build tokenizer and model.

        Raises:
            ConfigError: if the task does not say which characters it uses, or the sizes do not fit together.

        Example:
            >>> from rlstab.tasks import SortDigits
            >>> TinyModel(hidden=32).load(SortDigits(), seed=0).model.num_parameters()
            21280
        """
        if not isinstance(task, EmbeddedTask):
            raise ConfigError(
                f"model: TinyModel knows the characters of embedded tasks only, not those of {type(task).__name__}; "
                "use PretrainedModel"
            )
        tokenizer = tiny_chat_tokenizer(task.alphabet) if self.chat else tiny_tokenizer(task.alphabet)
        sizes: dict[str, Any] = {
            "hidden": self.hidden,
            "layers": self.layers,
            "heads": self.heads,
            "max_positions": self.max_positions,
        }
        if self.experts is None:
            return LoadedModel(tiny_causal_lm(tokenizer, **sizes, seed=seed), tokenizer)
        return LoadedModel(tiny_moe(tokenizer, **sizes, experts=self.experts, seed=seed), tokenizer)

    def outline(self, task: Task) -> PreTrainedModel:
        """The model itself, which is small."""
        return self.load(task, seed=0).model


@final
@dataclass(frozen=True, kw_only=True)
class PretrainedModel(ModelSource):
    """A model from the Hugging Face Hub or from a folder; weights are read from safetensors files only.

    Args:
        name: repository on the Hub, or folder.
        revision: commit, tag or branch of the repository.
        dtype: floating-point type of the weights; `auto` keeps that of the files.
        attention: attention implementation; None leaves the choice to transformers.
        trust_remote_code: run Python code that comes with the repository.

    Example:
        >>> import tempfile
        >>> from rlstab.tasks import SortDigits
        >>> folder = tempfile.mkdtemp()
        >>> for part in TinyModel().load(SortDigits(), seed=0):
        ...     _ = part.save_pretrained(folder)
        >>> PretrainedModel(name=folder).load(SortDigits(), seed=0).model.num_parameters()
        83520
    """

    name: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None = None
    trust_remote_code: bool = False

    def load(self, task: Task, *, seed: int) -> LoadedModel:
        """Download what is not there yet, and load.

        Raises:
            ConfigError: if there is no such model, or it cannot be loaded as asked.
        """
        source: dict[str, Any] = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.name, padding_side="left", **source)
            model = AutoModelForCausalLM.from_pretrained(
                self.name, dtype=self.dtype, attn_implementation=self.attention, use_safetensors=True, **source
            )
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(
                f"model: PretrainedModel.name={self.name!r} cannot be loaded: {str(error).splitlines()[0]}"
            ) from error
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return LoadedModel(model, tokenizer)

    def outline(self, task: Task) -> PreTrainedModel | None:
        """The model on torch's meta device, if its configuration is in a folder or in the cache."""
        source: dict[str, Any] = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        try:
            config = AutoConfig.from_pretrained(self.name, local_files_only=True, **source)
        except (OSError, ValueError):
            return None
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                dtype=config.dtype or torch.float32 if self.dtype == "auto" else vars(torch)[self.dtype],
                trust_remote_code=self.trust_remote_code,
            )
        return model


@final
@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Train low-rank updates of the weights instead of the weights.

    Args:
        rank: rank of the updates.
        alpha: their scale is `alpha / rank`.
        dropout: dropout before the updates, in [0, 1).
        targets: names of the modules that get one, or `all-linear`.

    Reference: LoRA: Low-Rank Adaptation of Large Language Models, https://arxiv.org/abs/2106.09685.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: list[str] | str = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"LoRA.rank: expected at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"LoRA.dropout: expected a value in [0, 1), got {self.dropout}")

    def config(self) -> LoraConfig:
        """The same for peft.

        Example:
            >>> LoRA(rank=8).config().r
            8
        """
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets,
            task_type="CAUSAL_LM",
        )
