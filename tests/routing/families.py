"""Ten families of mixtures of experts, two layers deep, with random weights."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.ernie4_5_moe import Ernie4_5_MoeConfig
from transformers.models.glm4_moe import Glm4MoeConfig
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.granitemoe import GraniteMoeConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.olmoe import OlmoeConfig
from transformers.models.qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig

from rlstab.models import isolated_rng

EXPERTS, TOP_K = 8, 2
COMMON: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
GROUPS: dict[str, Any] = {"n_routed_experts": EXPERTS, "moe_intermediate_size": 16, "n_shared_experts": 1}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **COMMON, num_experts=EXPERTS, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**COMMON, num_experts=EXPERTS, moe_intermediate_size=16, norm_topk_prob=True),
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=EXPERTS),
    "olmoe": lambda: OlmoeConfig(**COMMON, num_experts=EXPERTS),
    "gpt_oss": lambda: GptOssConfig(**COMMON, num_local_experts=EXPERTS, head_dim=16),
    "deepseek_v2": lambda: DeepseekV2Config(
        **COMMON, **LATENT, **GROUPS, first_k_dense_replace=0, topk_method="greedy", n_group=1, topk_group=1
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **COMMON, **LATENT, **GROUPS, first_k_dense_replace=0, n_group=4, topk_group=2
    ),
    "glm4_moe": lambda: Glm4MoeConfig(**COMMON, **GROUPS, first_k_dense_replace=0, n_group=1, topk_group=1),
    "granitemoe": lambda: GraniteMoeConfig(**COMMON, num_local_experts=EXPERTS),
    "ernie4_5_moe": lambda: Ernie4_5_MoeConfig(
        **{key: value for key, value in COMMON.items() if key != "num_experts_per_tok"},
        moe_num_experts=EXPERTS,
        moe_k=TOP_K,
        moe_intermediate_size=16,
        moe_layer_start_index=0,
    ),
}


def built(config: PretrainedConfig, *, seed: int = 0, scale: float = 4.0) -> PreTrainedModel:
    """A model of this configuration whose routers are far from indifferent."""
    config._attn_implementation = "eager"
    with isolated_rng(seed):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=scale * 0.02)
    model.train(False)
    return model


def family(name: str) -> PreTrainedModel:
    """The model of one of the ten families."""
    return built(CONFIGS[name]())
