"""A tiny LLaVA with its processor, and prompts with images: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from equality import ALPHABET
from PIL import Image
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, Qwen2Config
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from rlstab.models import tiny_tokenizer

IMAGE = "<image>"
PIXELS, PATCH = 8, 4
TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def tiny_processor() -> LlavaProcessor:
    """Four tokens for an image, and one for each character."""
    tokenizer = tiny_tokenizer(ALPHABET, chat_template=TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    size = {"height": PIXELS, "width": PIXELS}
    images = LlavaImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="full", chat_template=TEMPLATE
    )


def tiny_vlm(processor: LlavaProcessor, seed: int = 1) -> Any:
    """A model whose text part sees projected patches."""
    tokenizer: Any = processor.tokenizer
    special: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        **special,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=PIXELS,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **special,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.suppress_tokens = [config.image_token_id]  # nothing but a prompt has images
    return model


def image_prompts(n: int = 16) -> Dataset:
    """A picture of noise and a question about it."""
    noise = np.random.default_rng(0)
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"{i * 7919 % 1000}="}],
                "image": Image.fromarray(noise.integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)),
            }
            for i in range(n)
        ]
    )
