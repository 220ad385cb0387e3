"""Small helpers on transformers models: tiny models and tokenizers built locally, and an isolated random state."""

from rlstab.models._rng import isolated_rng
from rlstab.models._tiny import tiny_causal_lm, tiny_moe, tiny_tokenizer

__all__ = ["isolated_rng", "tiny_causal_lm", "tiny_moe", "tiny_tokenizer"]
