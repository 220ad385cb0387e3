"""Prompts with images, of different sizes and lengths in one call, and text among them."""

import pytest
import torch
from scoring import trainer_logprobs
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from rlstab.errors import ConfigError
from rlstab.rollouts import Request, Rollout, Sampling, TransformersEngine

IMAGE, VIDEO, START, END = 20, 21, 22, 23
SAMPLING = Sampling(max_new_tokens=20, seed=0, forbidden_ids=(IMAGE, VIDEO, START, END))


@pytest.fixture
def qwen2_vl() -> PreTrainedModel:
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 24,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.eval()
    return model


def request(place: int) -> Request:
    """An image of 4, 8 or 16 patches, four of which make a token, between some text."""
    height, width = [(2, 2), (4, 2), (4, 4)][place % 3]
    patches = height * width
    prompt = [4 + place % 5, START, *[IMAGE] * (patches // 4), END, *range(5, 5 + place % 4)]
    noise = torch.Generator().manual_seed(place)
    return Request(
        prompt_ids=prompt,
        max_new_tokens=3 + 2 * place,
        features={
            "pixel_values": torch.randn(patches, 12, generator=noise),
            "image_grid_thw": torch.tensor([[1, height, width]]),
            "mm_token_type_ids": torch.tensor([int(token == IMAGE) for token in prompt]),
        },
    )


REQUESTS = [*[request(place) for place in range(7)], Request(prompt_ids=[4, 5, 6]), request(7)]


def expected(model: PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    if not rollout.features:
        return trainer_logprobs(model, rollout)
    ids = torch.cat([rollout.prompt_ids, rollout.token_ids])[None]
    kinds = torch.cat([rollout.features["mm_token_type_ids"], torch.zeros_like(rollout.token_ids)])[None]
    with torch.no_grad():
        logits = model(input_ids=ids, **{**rollout.features, "mm_token_type_ids": kinds}).logits[0]
    logprobs: torch.Tensor = logits[len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, rollout.token_ids[:, None]).squeeze(-1)


@pytest.mark.parametrize("slots", [3, 100])
def test_images_are_looked_at(qwen2_vl: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, slots: int) -> None:
    rollouts = TransformersEngine(qwen2_vl, tokenizer, slots=slots).generate(REQUESTS, SAMPLING)
    for rollout, asked in zip(rollouts, REQUESTS, strict=True):
        assert rollout.prompt_ids.tolist() == list(asked.prompt_ids)
        assert rollout.features is asked.features
        assert not set(rollout.token_ids.tolist()) & set(SAMPLING.forbidden_ids)
        torch.testing.assert_close(rollout.logprobs, expected(qwen2_vl, rollout), rtol=0, atol=1e-5)


def test_the_models_own_generation_config_adds_nothing_and_stays(
    qwen2_vl: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Penalties and limits that a checkpoint brings along would bend the distribution."""
    config = qwen2_vl.generation_config
    config.repetition_penalty, config.min_new_tokens, config.top_k = 5.0, 9, 2
    rollouts = TransformersEngine(qwen2_vl, tokenizer).generate(REQUESTS, SAMPLING)
    for rollout in rollouts:
        torch.testing.assert_close(rollout.logprobs, expected(qwen2_vl, rollout), rtol=0, atol=1e-5)
    assert qwen2_vl.generation_config is config


def test_raw_images_need_the_processors_features(qwen2_vl: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    raw = Request(prompt_ids=[START, IMAGE, END], images=[torch.zeros(4, 4, 3, dtype=torch.uint8)])
    with pytest.raises(ConfigError, match="has images only; expected the processor's features"):
        TransformersEngine(qwen2_vl, tokenizer).generate([raw], SAMPLING)
