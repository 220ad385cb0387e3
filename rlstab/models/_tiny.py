"""Tiny transformers models and a character tokenizer, built locally: nothing is downloaded."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rlstab.errors import ConfigError
from rlstab.models._rng import isolated_rng

__all__ = ["tiny_causal_lm", "tiny_moe", "tiny_tokenizer"]

Model = TypeVar("Model", bound=PreTrainedModel)

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def tiny_tokenizer(alphabet: str, *, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A character-level fast tokenizer: one token per character of `alphabet`, after `<pad>`, `<bos>` and `<eos>`.

    There is no unknown token, so encoding a foreign character raises instead of losing it, and decoding is the exact
    inverse of encoding. No special token is added to a text. Batches are padded on the left, as generation needs.
    `save_pretrained` and `AutoTokenizer.from_pretrained` round-trip it.

    Args:
        alphabet: the characters, each once; ids follow their order, from 3 on.
        chat_template: Jinja template for conversational prompts; without one the tokenizer takes plain text only.

    Returns:
        The tokenizer, of `len(alphabet) + 3` tokens.

    Raises:
        ConfigError: if `alphabet` is empty or repeats a character.

    Example:
        >>> tokenizer = tiny_tokenizer("0123456789=")
        >>> tokenizer("31=")["input_ids"]
        [6, 4, 13]
        >>> tokenizer.decode([6, 4, 13, tokenizer.eos_token_id], skip_special_tokens=True)
        '31='
    """
    repeated = sorted({char for char in alphabet if alphabet.count(char) > 1})
    if repeated or not alphabet:
        problem = f"repeats {', '.join(map(repr, repeated))}" if repeated else "is empty"
        raise ConfigError(
            f"tiny_tokenizer: alphabet {alphabet!r} {problem}; expected at least one character, each once"
        )
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, *alphabet])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        chat_template=chat_template,
    )


def tiny_causal_lm(
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    max_positions: int = 256,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Qwen2ForCausalLM:
    """A dense Qwen2 of random weights, sized for `tokenizer`: 64 wide and 2 deep it has about 0.1 M parameters.

    The weights depend on the arguments alone; the global random state is left as it was.

    Args:
        tokenizer: gives the vocabulary size and the special tokens.
        hidden: width of the residual stream; the MLP is twice as wide.
        layers: number of transformer blocks.
        heads: number of attention heads, a divisor of `hidden` that leaves heads of even width.
        max_positions: longest sequence, prompt and completion, in tokens.
        seed: seed of the initial weights.
        dtype: floating-point type of the weights, which are drawn in float32 first.

    Returns:
        The model in evaluation mode, on the CPU, with tied embeddings and a `generation_config` that samples plainly.

    Raises:
        ConfigError: if a size is not positive, or if `hidden` does not split into heads of even width.

    Example:
        >>> model = tiny_causal_lm(tiny_tokenizer("0123456789="), seed=3)
        >>> model.num_parameters()
        83520
    """
    config = Qwen2Config(**_common(tokenizer, hidden=hidden, layers=layers, heads=heads, max_positions=max_positions))
    return _drawn(Qwen2ForCausalLM, config, seed=seed, dtype=dtype)


def tiny_moe(
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    experts: int = 8,
    experts_per_token: int = 2,
    aux_loss_coef: float = 0.001,
    max_positions: int = 256,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Qwen3MoeForCausalLM:
    """A Qwen3 mixture-of-experts of random weights, sized for `tokenizer`, every block sparse.

    Trainers that ask for router logits (`output_router_logits=True` in the call) get the load-balancing loss
    `aux_loss_coef · L_aux`; the configuration does not ask by itself, since decoding from a cache cannot compute it.
    The weights depend on the arguments alone; the global random state is left as it was.

    Args:
        tokenizer: gives the vocabulary size and the special tokens.
        hidden: width of the residual stream; each expert is as wide.
        layers: number of transformer blocks.
        heads: number of attention heads, a divisor of `hidden` that leaves heads of even width.
        experts: number of experts in each block.
        experts_per_token: number of experts that each token is routed to.
        aux_loss_coef: coefficient of the load-balancing loss.
        max_positions: longest sequence, prompt and completion, in tokens.
        seed: seed of the initial weights.
        dtype: floating-point type of the weights, which are drawn in float32 first.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        ConfigError: if a size is not positive, if `hidden` does not split into heads of even width, or if a token
            would go to more experts than there are.

    Example:
        >>> model = tiny_moe(tiny_tokenizer("0123456789="), experts=4)
        >>> model.config.num_experts, model.config.num_experts_per_tok
        (4, 2)
    """
    if not 1 <= experts_per_token <= experts:
        raise ConfigError(
            f"tiny_moe: experts_per_token {experts_per_token} with experts {experts}; expected between 1 and experts"
        )
    config = Qwen3MoeConfig(
        **_common(tokenizer, hidden=hidden, layers=layers, heads=heads, max_positions=max_positions),
        moe_intermediate_size=hidden,
        num_experts=experts,
        num_experts_per_tok=experts_per_token,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        router_aux_loss_coef=aux_loss_coef,
    )
    return _drawn(Qwen3MoeForCausalLM, config, seed=seed, dtype=dtype)


def _common(
    tokenizer: PreTrainedTokenizerBase, *, hidden: int, layers: int, heads: int, max_positions: int
) -> dict[str, Any]:
    """The configuration that both architectures share."""
    _check_sizes(hidden=hidden, layers=layers, heads=heads, max_positions=max_positions)
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _drawn(kind: type[Model], config: PretrainedConfig, *, seed: int, dtype: torch.dtype) -> Model:
    """A model of random weights, in evaluation mode."""
    with isolated_rng(seed):
        model = kind(config)
    # The rotary frequencies are buffers and stay in float32, as in a model loaded from a checkpoint.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.train(False)
    return model


def _check_sizes(*, hidden: int, heads: int, **others: int) -> None:
    for name, size in {"hidden": hidden, "heads": heads, **others}.items():
        if size < 1:
            raise ConfigError(f"tiny model: {name} {size}; expected at least 1")
    if hidden % (2 * heads):
        raise ConfigError(
            f"tiny model: hidden {hidden} does not split into {heads} heads of even width; "
            f"expected a multiple of {2 * heads}"
        )
