"""Tokens per second of the rollout engines against the bare backend, on the same requests, in turn, in one run.

    python benchmarks/rollouts.py [--rounds N] [--engines transformers|vllm|server ...] [--json FILE]

One thread, the tiny dense model of `rlstab.models`, batches of 32 prompts with 8 completions each. The backend is
`model.generate` with the settings that TRL gives it, and the unpadded lists that TRL makes of its result. Where lengths
vary, a stopping criterion ends each row of `generate` at the length at which the engine's request ends. A ratio above 1
means that the engine is faster; beside it stands the ratio of the backend against itself, the noise of the machine.
Time is CPU time, which equals wall time where one thread has a core to itself, and bears other work on the machine.

With vLLM installed, `VLLMEngine` is compared with `vllm.LLM` itself on the same requests (log-probs asked of both), and
`VLLMServerEngine` with a bare client of the same server, in wall time: it posts each request on its own to vLLM's route
of tokens, `/inference/v1/generate`, which makes no text, and reads tokens and log-probs. The time of a weight sync is
noted for both. Numbers are printed and written as they come.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import httpx
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rlstab.models import tiny_causal_lm, tiny_tokenizer
from rlstab.rollouts import (
    Engine,
    ModelWeights,
    Request,
    Sampling,
    ServerProcess,
    TransformersEngine,
    VLLMEngine,
    VLLMServerEngine,
)
from rlstab.rollouts._vllm_cores import InProcess

BATCH, GROUP = 256, 8
CASES = {"lengths equal": (1, 64, 64), "lengths 20 to 200": (1, 20, 200), "the same, 3 batches": (3, 20, 200)}
"""Number of batches, shortest and longest completion."""


class RowLimits(StoppingCriteria):
    """Ends each row at a length of its own."""

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self.lengths


def requests_of(batches: int, low: int, high: int) -> list[Request]:
    """Prompts of 8 to 24 tokens; limits spread evenly over the range."""
    rng = random.Random(0)
    count = batches * BATCH
    prompts = [[rng.randrange(3, 16) for _ in range(rng.randint(8, 24))] for _ in range(count // GROUP)]
    limits = [low + (high - low) * place // (count - 1) for place in range(count)]
    rng.shuffle(limits)
    return [Request(prompt_ids=prompts[i // GROUP], max_new_tokens=limit) for i, limit in enumerate(limits)]


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, requests: Sequence[Request]) -> int:
    """The backend, called as TRL calls it, batch after batch; returns the number of tokens."""
    starts = range(0, len(requests), BATCH)
    return sum(generate_batch(model, tokenizer, requests[start : start + BATCH]) for start in starts)


def generate_batch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, requests: Sequence[Request]) -> int:
    limits = [request.max_new_tokens or 0 for request in requests]
    width = max(len(request.prompt_ids) for request in requests)
    ids = torch.full((len(requests), width), cast(int, tokenizer.pad_token_id))
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        mask[row, width - len(request.prompt_ids) :] = 1
    config = GenerationConfig(
        max_new_tokens=max(limits),
        do_sample=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.vocab_size,  # is never drawn: all rows reach their limits
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        disable_compile=True,
    )
    ends = [RowLimits(torch.tensor(limits) + width)] if len(set(limits)) > 1 else []
    with torch.no_grad():
        out = cast(Callable[..., Tensor], model.generate)(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList(ends),
        )
    lists = [row[:limit].tolist() for row, limit in zip(out[:, width:], limits, strict=True)]
    return sum(map(len, lists))


def engine_generate(engine: Engine, requests: Sequence[Request]) -> int:
    rollouts = engine.generate(requests, Sampling(max_new_tokens=200, stop_ids=()))
    return sum(len(rollout.token_ids) for rollout in rollouts)


def bare_vllm(llm: Any, requests: Sequence[Request]) -> int:
    """vLLM, called as a trainer calls it: all prompts at once, the log-prob of each token."""
    from vllm import SamplingParams

    params = [
        SamplingParams(max_tokens=request.max_new_tokens, ignore_eos=True, logprobs=0, detokenize=False)
        for request in requests
    ]
    prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
    with torch.compiler.set_stance("force_eager"):
        outputs = llm.generate(prompts, params, use_tqdm=False)
    lists = [(list(o.outputs[0].token_ids), [p.logprobs for p in o.outputs]) for o in outputs]
    return sum(len(ids) for ids, _ in lists)


Row = tuple[str, dict[str, float]]


def compare_transformers(tokenizer: PreTrainedTokenizerFast, rounds: int) -> Iterator[Row]:
    """`TransformersEngine` against `generate` of the same model."""
    model = tiny_causal_lm(tokenizer)
    engine = TransformersEngine(model, tokenizer, slots=BATCH)
    for name, case in CASES.items():
        requests = requests_of(*case)
        ours, bare = partial(engine_generate, engine, requests), partial(generate, model, tokenizer, requests)
        yield f"transformers, {name}", compare(ours, bare, rounds)


def compare_vllm(tokenizer: PreTrainedTokenizerFast, rounds: int) -> Iterator[Row]:
    """`VLLMEngine` against the very vLLM inside it, so that both have the same model and settings."""
    model = tiny_causal_lm(tokenizer, heads=2)
    with VLLMEngine(model, tokenizer, arguments={"max_model_len": 256, "kv_cache_memory_bytes": 1 << 27}) as engine:
        assert isinstance(engine._core, InProcess)
        for name, case in CASES.items():
            requests = requests_of(*case)
            ours, bare = partial(engine_generate, engine, requests), partial(bare_vllm, engine._core._llm, requests)
            yield f"vllm, {name}", compare(ours, bare, rounds)
        yield "vllm, weight sync", time_of_a_sync(engine, model)


class BareClient:
    """A client that keeps its connections: all requests at once, each a call of its own."""

    def __init__(self, url: str) -> None:
        self._runner = asyncio.Runner()
        limits = httpx.Limits(max_connections=BATCH, keepalive_expiry=2.0)  # the server closes idle ones after 5 s
        self._http = httpx.AsyncClient(base_url=url, timeout=600, limits=limits)

    def generate(self, requests: Sequence[Request]) -> int:
        return self._runner.run(self._generate(requests))

    async def _generate(self, requests: Sequence[Request]) -> int:
        return sum(await asyncio.gather(*map(self._complete, requests)))

    async def _complete(self, request: Request) -> int:
        sampling = {"max_tokens": request.max_new_tokens, "ignore_eos": True, "logprobs": 0, "detokenize": False}
        call = {"token_ids": list(request.prompt_ids), "sampling_params": sampling}
        answer = await self._http.post("/inference/v1/generate", json=call)
        (choice,) = answer.raise_for_status().json()["choices"]
        assert len(choice["logprobs"]["content"]) == len(choice["token_ids"])
        return len(choice["token_ids"])

    def close(self) -> None:
        self._runner.run(self._http.aclose())
        self._runner.close()


def compare_server(tokenizer: PreTrainedTokenizerFast, rounds: int) -> Iterator[Row]:
    """`VLLMServerEngine` against a bare client of the very server that it talks to."""
    model = tiny_causal_lm(tokenizer, heads=2)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        arguments = {"max_model_len": 256, "kv_cache_memory_bytes": 1 << 27, "enable_scale_out": True}
        with (
            ServerProcess(folder, arguments=arguments) as server,
            VLLMServerEngine(model, tokenizer, url=server.url) as engine,
        ):
            for name, case in CASES.items():
                requests = requests_of(*case)
                ours = partial(engine_generate, engine, requests)
                with closing(BareClient(server.url)) as bare:
                    row = compare(ours, partial(bare.generate, requests), rounds, clock=time.perf_counter)
                yield f"server, {name}", row
            yield "server, weight sync", time_of_a_sync(engine, model)


def time_of_a_sync(engine: Engine, model: PreTrainedModel) -> dict[str, float]:
    seconds = []
    for version in range(1, 11):
        start = time.perf_counter()
        engine.sync_weights(ModelWeights(model), version)
        seconds.append(time.perf_counter() - start)
    return {"milliseconds": 1000 * statistics.median(seconds)}


def tokens_per_second(work: Callable[[], int], clock: Callable[[], float]) -> float:
    start = clock()
    return work() / (clock() - start)


def compare(
    engine: Callable[[], int],
    backend: Callable[[], int],
    rounds: int,
    *,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Median rates, and medians of the ratios of each round, in which all three run one after the other."""
    engine(), backend()
    rates = [[tokens_per_second(work, clock) for work in (backend, engine, backend)] for _ in range(rounds)]
    ratios = sorted(ours / statistics.fmean((before, after)) for before, ours, after in rates)
    return {
        "engine tokens/s": statistics.median(ours for _, ours, _ in rates),
        "backend tokens/s": statistics.median(rate for before, _, after in rates for rate in (before, after)),
        "ratio": statistics.median(ratios),
        "ratio min": ratios[0],
        "ratio max": ratios[-1],
        "backend to itself": statistics.median(before / after for before, _, after in rates),
    }


ENGINES = {"transformers": compare_transformers, "vllm": compare_vllm, "server": compare_server}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    here = list(ENGINES) if find_spec("vllm") else ["transformers"]
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=here)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer("0123456789+= ")
    results: dict[str, dict[str, float]] = {}
    for engine in arguments.engines:
        for name, row in ENGINES[engine](tokenizer, arguments.rounds):
            results[name] = row
            print(f"{name:34}" + ", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
