"""Models and engines that the tests of this folder share."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlstab.models import tiny_causal_lm, tiny_moe, tiny_tokenizer
from rlstab.rollouts import Engine, ModelWeights, TransformersEngine, VLLMEngine

MakeEngine = Callable[[PreTrainedModel, PreTrainedTokenizerFast], Engine]
LentEngine = Callable[[str, str, PreTrainedModel, PreTrainedTokenizerFast], Engine]

# Heads of 32 dimensions: vLLM has no smaller ones on a CPU.
MODELS: dict[str, Callable[[PreTrainedTokenizerFast], PreTrainedModel]] = {
    "dense": partial(tiny_causal_lm, heads=2),
    "moe": partial(tiny_moe, heads=2),
}

# Every engine of the contract, in fp32, with the weights of the model.
ENGINES: dict[str, MakeEngine] = {
    "shared": TransformersEngine,
    "crowded": lambda model, tokenizer: TransformersEngine(model, tokenizer, slots=3, prefill_tokens=20),
    "copying": lambda model, tokenizer: TransformersEngine(model, tokenizer, share=False),
}

SMALL = {"kv_cache_memory_bytes": 1 << 26, "max_model_len": 256}

# Engines that take seconds to start: one of each serves all tests, and takes the weights of each test's model.
COSTLY: dict[str, MakeEngine] = {
    "vllm": lambda model, tokenizer: VLLMEngine(model, tokenizer, arguments=SMALL),
    "vllm in processes of its own": lambda model, tokenizer: VLLMEngine(
        model, tokenizer, arguments=SMALL, in_process=False, patience=60
    ),
}

CONTRACT = [
    *[(engine, model) for engine in ENGINES for model in MODELS],
    *[pytest.param((engine, model), marks=pytest.mark.vllm) for engine in ["vllm"] for model in MODELS],
    pytest.param(("vllm in processes of its own", "dense"), marks=pytest.mark.vllm),
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer("0123456789+= ")


def peaked(made: PreTrainedModel) -> PreTrainedModel:
    """The model with distributions that are far from uniform."""
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2.0)
    return made


@pytest.fixture(params=CONTRACT, ids="-".join, scope="module")
def lineup(request: pytest.FixtureRequest) -> tuple[str, str]:
    """An engine and a model."""
    return request.param


@pytest.fixture
def model(lineup: tuple[str, str], tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return peaked(MODELS[lineup[1]](tokenizer))


@pytest.fixture(scope="session")
def lent() -> Iterator[LentEngine]:
    """Lends an engine that takes seconds to start, with the weights of a model."""
    running: dict[tuple[str, str], Engine] = {}

    def lend(engine: str, kind: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Engine:
        found = running.get((engine, kind))
        if found is None or not found.health().alive:
            for (other, _), made in running.items():
                if other == engine == "vllm":  # one at a time in a process
                    made.close()
            found = running[engine, kind] = COSTLY[engine](model, tokenizer)
        else:
            found.sync_weights(ModelWeights(model), found.weight_version)
        return found

    yield lend
    for engine in running.values():
        engine.close()


@pytest.fixture
def engine(
    lineup: tuple[str, str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, lent: LentEngine
) -> Iterator[Engine]:
    name, kind = lineup
    if name in COSTLY:
        yield lent(name, kind, model, tokenizer)
        return
    with ENGINES[name](model, tokenizer) as made:
        yield made
