"""`VLLMEngine`: samples with vLLM, in this process or in processes of its own."""

from __future__ import annotations

import atexit
import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, cast, final

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlstab.errors import ConfigError, EngineError
from rlstab.rollouts._engine import Health
from rlstab.rollouts._named import NamedEngine
from rlstab.rollouts._request import Request, Sampling
from rlstab.rollouts._rollout import Rollout
from rlstab.rollouts._vllm_calls import Call, Limits, check_images, rollout_of
from rlstab.rollouts._vllm_cores import Core, InProcess, OwnProcesses
from rlstab.rollouts._vllm_driver import InFlight
from rlstab.rollouts._vllm_routes import NATIVE, RouteReader, no_experts, route_settings
from rlstab.rollouts._vllm_settings import check_settings, end_of_sequence, engine_defaults
from rlstab.rollouts._weight_file import Parcel, Shapes, WeightFiles, check_shapes, parcel_of, shapes_of_config
from rlstab.rollouts._weights import ModelWeights, WeightSource, base_model
from rlstab.routing import is_mixture

__all__ = ["VLLMEngine"]


@final
class VLLMEngine(NamedEngine):
    """Samples with vLLM: fast on a GPU, usable on a CPU.

    Defaults are those that make sampler and trainer agree: the precision of the policy (vLLM would turn float32 into
    bfloat16), log-probs at the temperature that is sampled with (vLLM's own default is temperature 1), no sampling
    settings from the model's generation config. Every argument of vLLM can be set through `arguments`.

    A policy in memory never touches the disk: vLLM starts from its configuration, and takes its weights as at every
    later sync, through vLLM's weight-transfer interface. In this process they are passed as they are; processes of
    vLLM's own map a file of shared memory. Where the policy has adapters of PEFT, only these travel: the base stays in
    that file and is sent again when it has changed, and vLLM's workers merge the adapters into it. vLLM's caches are
    cleared with each sync, so that nothing that was computed with old weights is used again. On a CPU the engine
    repairs what vLLM leaves stale when it takes new weights (the head tied to the embedding, and experts).

    A seed given with `Sampling` or `Request` is given on to vLLM, one for each request, which samples more slowly for
    it. Without one, vLLM is seeded once per call from torch's global generator: in this process a restored generator
    repeats its samples.

    Args:
        model: the policy, whose weights the engine starts with, or the path or name of a checkpoint.
        tokenizer: names the end-of-sequence token, beside those of the model's generation config.
        dtype: precision to sample in; that of the model by default.
        in_process: run vLLM here, one engine at a time, which starts fastest and samples on the calling thread;
            otherwise in processes of its own, whose death is an error here and nothing worse, and which take new
            weights while requests are in flight. The calling script then needs the guard `if __name__ == "__main__":`.
        in_flight: what happens to requests in flight at a sync, in processes of its own: `keep` goes on with them under
            the new weights (each token's version says which sampled it), `wait` ends them first, `abort` returns what
            there is of them.
        patience: seconds without a token after which processes of its own are taken for dead, and killed.
        arguments: arguments of vLLM's engine, which go before all defaults.
        kept_limit: most tokens recorded per position for `truncation="renormalise"` without `top_k`.
        routes: return the experts that every token went to, for a mixture of experts: through vLLM's own flag where it
            takes that, else recorded by the engine, eagerly and without vLLM's cache of prefixes. The flag needs CUDA:
            how its arrays are read is tested, a run with it is not; `rlstab check` or `routes/agreement` shows.
        repair: bring vLLM's CPU backend up to date after each sync. Off only to see what happens without.
        name: id of the engine in rollouts and events.

    Raises:
        ConfigError: if an argument is not the user's to set, or the engine cannot run as asked.

    Example:
        ```python
        engine = VLLMEngine(model, tokenizer, arguments={"max_model_len": 4096, "gpu_memory_utilization": 0.4})
        rollouts = engine.generate([Request(prompt_ids=ids)], Sampling(max_new_tokens=256))
        ```
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        dtype: torch.dtype | None = None,
        in_process: bool = True,
        in_flight: InFlight = "keep",
        patience: float = 300.0,
        arguments: Mapping[str, Any] = MappingProxyType({}),
        kept_limit: int = 1024,
        routes: bool = False,
        repair: bool = True,
        name: str = "vllm",
    ) -> None:
        check_settings("VLLMEngine", arguments, patience=patience, kept_limit=kept_limit)
        if routes and not isinstance(model, str) and not is_mixture(model):
            raise no_experts("VLLMEngine")
        super().__init__(name)
        self._closed = False
        self._fault = ""
        self._in_process = in_process
        config = AutoConfig.from_pretrained(model) if isinstance(model, str) else base_model(model).config
        self._shapes: Shapes | None = shapes_of_config(config) if isinstance(model, str) else None
        self._files = WeightFiles()
        generation = _generation_config(model, config) if isinstance(model, str) else model.generation_config
        self._stop_ids = end_of_sequence(generation, tokenizer)
        self._dtype = dtype or cast("torch.dtype | None", config.dtype) or torch.float32
        settings = {**engine_defaults(self._dtype), "skip_tokenizer_init": True, **arguments}
        settings |= {} if isinstance(model, str) else {"load_format": "dummy"}
        with _model_folder(model, config) as folder:
            settings["model"] = folder
            if routes:
                settings = route_settings("VLLMEngine", settings, arguments)
            self._core: Core = (
                InProcess(settings, {"repair": repair})
                if in_process
                else OwnProcesses(settings, {"repair": repair}, patience=patience, in_flight=in_flight)
            )
        atexit.register(self.close)
        self._routes = self._route_reader(native=NATIVE in settings) if routes else None
        self._limits = Limits(
            context=self._core.context, vocabulary=config.get_text_config().vocab_size, kept=kept_limit
        )
        if not isinstance(model, str):
            self._take(ModelWeights(model), 0)

    @property
    def shares_weights(self) -> bool:
        """Never: vLLM has weights of its own."""
        return False

    @property
    def works_beside(self) -> bool:
        """In processes of its own: vLLM here seeds the generators of this process while it samples."""
        return not self._in_process

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights that it samples with."""
        return self._dtype

    @property
    def returns_routes(self) -> bool:
        """Do its rollouts say which experts every token went to?"""
        return self._routes is not None

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """Continue every prompt: see `Engine.generate`.

        A completion ends at vLLM's `max_model_len` too, with the finish reason `length`.

        Raises:
            ConfigError: if a request has images.
            EngineError: if the engine is closed or dead, if a prompt leaves no room for a completion, if the model's
                logits are not finite, or if a kept set is larger than what is recorded of it.
            RoutingError: if vLLM returned routes of a part of the tokens only.
        """
        self._check_usable()
        check_images("VLLMEngine", requests)
        if not requests:
            return []
        call = Call(requests, sampling, self._stop_ids, self._limits)
        seed = int(torch.randint(2**62, ())) if sampling.seed is None else sampling.seed
        reading = nullcontext() if self._routes is None else self._routes.reading(call)
        with reading:
            completions = self._core.generate(call, seed)
        routes = [None] * len(requests) if self._routes is None else self._routes.read(call, completions)
        return [
            rollout_of(request, call, completion, engine=self._name, routes=routed)
            for request, completion, routed in zip(requests, completions, routes, strict=True)
        ]

    def score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """Log-probs of given tokens: see `Engine.score`."""
        self._check_usable()
        return self._core.score(sequences)

    def sync_weights(self, source: WeightSource, version: int) -> None:
        """Take the weights of `source`, all of them, and clear vLLM's caches.

        Raises:
            WeightSyncError: if the version is older than the present one, or if names or shapes differ.
            EngineError: if the engine is closed or dead.
        """
        self._check_usable()
        self._check_version(version)
        self._take(source, version)

    def _take(self, source: WeightSource, version: int) -> None:
        parcel = parcel_of(source)
        if self._shapes is None:
            self._shapes = parcel.shapes
        check_shapes(self._name, self._shapes, parcel.shapes)
        self._fault = "has a part of its new weights only, as a sync failed"
        self._core.update(self._sent(parcel), version)
        self._fault = ""
        self._version = version
        if parcel.changes is None:
            self._files.clear()

    def _sent(self, parcel: Parcel) -> dict[str, Any]:
        """What tells a worker where the weights are."""
        if self._in_process:
            return {"tensors": list(parcel.base.items()), "changes": parcel.changes or {}}
        self._files.write(parcel)
        return {"paths": {kind: str(path) for kind, path in self._files.paths.items()}}

    def health(self) -> Health:
        """The state of the engine."""
        detail = "closed" if self._closed else self._fault or self._core.fault()
        return Health(alive=not detail, engine=self._name, weight_version=self._version, detail=detail)

    def close(self) -> None:
        """Stop vLLM and give its memory back."""
        if not self._closed:
            self._closed = True
            atexit.unregister(self.close)
            self._core.close()
            self._files.clear()

    def _check_usable(self) -> None:
        if self._closed:
            raise EngineError(f"{self._name}: the engine is closed; make a new one")
        if fault := self._fault or self._core.fault():
            raise EngineError(f"{self._name}: vLLM {fault}; make a new engine")

    def _route_reader(self, *, native: bool) -> RouteReader:
        try:
            return RouteReader(self._core, native=native)
        except ConfigError:
            self.close()
            raise


def _generation_config(path: str, config: PretrainedConfig) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:  # the checkpoint has none
        return GenerationConfig.from_model_config(config)


@contextmanager
def _model_folder(model: PreTrainedModel | str, config: PretrainedConfig) -> Iterator[str]:
    """What vLLM reads the model's configuration from: the checkpoint, or a folder with nothing else in it."""
    if isinstance(model, str):
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="rlstab-model-") as folder:
        described = copy.deepcopy(config)
        described.architectures = [type(base_model(model)).__name__]
        described.save_pretrained(folder)
        yield folder
