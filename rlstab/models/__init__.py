"""Small helpers on transformers models: their heads, tiny ones built locally, and an isolated random state."""

from rlstab.models._head import language_head
from rlstab.models._rng import isolated_rng
from rlstab.models._tiny import tiny_causal_lm, tiny_moe, tiny_tokenizer
from rlstab.models._tiny_chat import tiny_chat_tokenizer

__all__ = ["isolated_rng", "language_head", "tiny_causal_lm", "tiny_chat_tokenizer", "tiny_moe", "tiny_tokenizer"]
