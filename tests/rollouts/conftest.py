"""Models and engines that the tests of this folder share."""

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlstab.models import tiny_causal_lm, tiny_moe, tiny_tokenizer
from rlstab.rollouts import Engine, TransformersEngine

MakeEngine = Callable[[PreTrainedModel, PreTrainedTokenizerFast], Engine]

MODELS: dict[str, Callable[[PreTrainedTokenizerFast], PreTrainedModel]] = {"dense": tiny_causal_lm, "moe": tiny_moe}

# Every engine of the contract, in fp32, with the weights of the model as version 0.
ENGINES: dict[str, MakeEngine] = {
    "shared": TransformersEngine,
    "crowded": lambda model, tokenizer: TransformersEngine(model, tokenizer, slots=3, prefill_tokens=20),
    "copying": lambda model, tokenizer: TransformersEngine(model, tokenizer, share=False),
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer("0123456789+= ")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model whose distributions are far from uniform."""
    made = MODELS[request.param](tokenizer)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2.5)
    return made


@pytest.fixture(params=ENGINES)
def engine(
    request: pytest.FixtureRequest, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Engine]:
    with ENGINES[request.param](model, tokenizer) as made:
        yield made
