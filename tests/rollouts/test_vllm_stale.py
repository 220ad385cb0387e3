"""The defect of vLLM's CPU backend: what it leaves stale at a sync is found at the start, and repaired it agrees."""

from typing import Any

import pytest
import torch
from engines import MODELS, SMALL, peaked
from transformers import PreTrainedTokenizerFast

from rlstab.errors import ConfigError, EngineError, WeightSyncError
from rlstab.rollouts import Request, Sampling, SyncVerifier, VLLMEngine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the defect is of vLLM's CPU backend"),
]

PROMPTS = [[4, 5, 6], [7, 8], [9]]


@pytest.mark.parametrize(
    ("kind", "causes"),
    [("dense", ["head that is tied to the embedding"]), ("moe", ["head that is tied", "experts kept their old"])],
)
def test_the_stale_weights_of_the_cpu_backend(kind: str, causes: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    model = peaked(MODELS[kind](tokenizer))
    sampling = Sampling(max_new_tokens=20, seed=0)
    with (
        VLLMEngine(model, tokenizer, arguments=SMALL, repair=False) as engine,
        pytest.raises(WeightSyncError, match="does not follow the policy") as caught,
    ):
        SyncVerifier(engine, model, sampling).start(PROMPTS, 1)
    assert all(cause in str(caught.value) for cause in causes)


def test_with_the_repair_it_agrees_and_raw_log_probs_do_not(tokenizer: PreTrainedTokenizerFast) -> None:
    model = peaked(MODELS["moe"](tokenizer))
    arguments: dict[str, Any] = {**SMALL, "logprobs_mode": "raw_logprobs"}
    with VLLMEngine(model, tokenizer, arguments=arguments) as engine:
        exact = SyncVerifier(engine, model, Sampling(max_new_tokens=20, seed=0))
        assert exact.start(PROMPTS, 1).mean_abs < 1e-5
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        assert exact.sync(2).mean_abs < 1e-5
        with pytest.raises(WeightSyncError, match=r"raw log-probs.*processed_logprobs"):
            SyncVerifier(engine, model, Sampling(max_new_tokens=20, seed=0, temperature=0.6)).start(PROMPTS, 3)
        with pytest.raises(EngineError, match=r"prompt of 256 tokens.*max_model_len=256"):
            engine.generate([Request(prompt_ids=[5] * 256)], Sampling(max_new_tokens=1))
        with pytest.raises(ConfigError, match="another one runs in this process"):
            VLLMEngine(model, tokenizer)
        (rollout,) = engine.generate([Request(prompt_ids=[5] * 250)], Sampling(max_new_tokens=90, stop_ids=()))
        assert (len(rollout.token_ids), rollout.finish_reason) == (6, "length")


def test_a_kept_set_that_was_not_recorded_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    model = MODELS["dense"](tokenizer)
    with VLLMEngine(model, tokenizer, arguments=SMALL, kept_limit=4) as engine:
        sampling = Sampling(max_new_tokens=4, top_p=0.99, truncation="renormalise")
        with pytest.raises(EngineError, match=r"larger than the 4 tokens recorded.*top_k.*kept_limit"):
            engine.generate([Request(prompt_ids=[5])], sampling)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"arguments": {"dtype": "bfloat16"}}, "arguments name dtype.*engine's dtype"),
        ({"patience": 0}, "patience 0"),
        ({"kept_limit": 0}, "kept_limit 0"),
    ],
)
def test_settings_that_cannot_be_honoured(
    settings: dict[str, Any], complaint: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match=f"VLLMEngine: {complaint}"):
        VLLMEngine(MODELS["dense"](tokenizer), tokenizer, **settings)
