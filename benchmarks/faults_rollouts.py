"""Kills processes of rollout engines at random moments, and counts what becomes of the requests.

    python benchmarks/faults_rollouts.py [--seed N] [--kinds KIND=KILLS ...] [--json FILE]

Kinds: `actor`, the process of one of two engines in a Ray pool; `hang`, the same stopped instead of killed; `core`, the
process that vLLM's engine runs in, inside a Ray actor; `holder`, such an actor itself; `server`, one of two processes
of `rlstab serve`, which is then started anew at its address (the last three need vLLM). Half of the blows fall while
requests are in flight, half while new weights are sent; the moment is drawn from the time that the same call takes
undisturbed.

Every request has a prompt of its own, eight requests make a group. After each blow the call must have answered each
request once, in its place, by weights of the right version, with log-probs that a model of these weights gives, and
with the very tokens of an undisturbed call. Of the processes that the victim had started none may be left. The exit
code is 1 if the counts do not add up.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlstab.models import tiny_causal_lm, tiny_tokenizer
from rlstab.rollouts import (
    Engine,
    MakeEngine,
    ModelWeights,
    RayEnginePool,
    Request,
    Rollout,
    Sampling,
    ServerProcess,
    TransformersEngine,
    VLLMEngine,
    VLLMServerEngine,
)

DIGITS, FIRST = 10, 4
GROUP, GROUPS = 8, 6
SAMPLING = Sampling(max_new_tokens=160, stop_ids=(), seed=3)
PATIENCE = 8.0
"""Seconds after which an engine that hangs is given up: many times what a part of a call takes."""

GRACE = 60.0
"""Seconds that a server has to be found again, and that the family of a victim has to end."""

SMALL = {"kv_cache_memory_bytes": 1 << 26, "max_model_len": 256}
IN_ACTORS: dict[str, MakeEngine] = {
    "actor": partial(TransformersEngine, share=False),
    "hang": partial(TransformersEngine, share=False),
    "core": partial(VLLMEngine, arguments=SMALL, in_process=False),
    "holder": partial(VLLMEngine, arguments=SMALL, in_process=False),
}
KILLS = {"server": 3, "core": 3, "holder": 2, "actor": 12, "hang": 2}


@dataclass
class Counts:
    """What became of the requests, over all blows of one kind and phase."""

    blows: int = 0
    deaths: int = 0
    returns: int = 0
    requested: int = 0
    delivered: int = 0
    lost: int = 0
    duplicated: int = 0
    short_groups: int = 0
    wrong_version: int = 0
    wrong_logprobs: int = 0
    other_tokens: int = 0
    orphans: int = 0
    seconds: float = 0.0

    @property
    def adds_up(self) -> bool:
        """Whether nothing was lost, repeated, wrong or left over, and every blow was seen."""
        lost = self.lost + self.duplicated + self.short_groups
        wrong = self.wrong_version + self.wrong_logprobs + self.other_tokens + self.orphans
        return not lost + wrong and self.requested == self.delivered and self.deaths == self.blows


def requests() -> list[Request]:
    """One for each number; the prompt is the number, digit by digit."""
    return [
        Request(prompt_ids=[FIRST + place // DIGITS, FIRST + place % DIGITS, FIRST]) for place in range(GROUP * GROUPS)
    ]


def number_of(rollout: Rollout) -> int:
    """Which request it answers."""
    tens, ones, _ = rollout.prompt_ids.tolist()
    return int(DIGITS * (tens - FIRST) + ones - FIRST)


@torch.no_grad()
def logprobs_agree(model: PreTrainedModel, rollout: Rollout) -> bool:
    """Whether its log-probs are those of the model."""
    ids = torch.cat([rollout.prompt_ids, rollout.token_ids])[None]
    logits = model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, rollout.token_ids[:, None]).squeeze(-1)
    return bool((rollout.logprobs - expected).abs().max() < 1e-4)


class Stand(ABC):
    """Engines of one kind behind the interface of one, and the processes that they live in."""

    engine: Engine

    @abstractmethod
    def holders(self) -> list[psutil.Process]:
        """The process of each engine, with its whole family."""

    def victim(self, holder: psutil.Process) -> psutil.Process:
        """The process of a family that is struck."""
        return holder

    @abstractmethod
    def restore(self) -> None:
        """Wait until all engines are back."""

    def close(self) -> None:
        """End the engines."""
        self.engine.close()


class Pool(Stand):
    """Engines in Ray actors."""

    def __init__(self, kind: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.kind = kind
        self.engine = self.pool = RayEnginePool(
            model,
            tokenizer,
            engine=IN_ACTORS[kind],
            size=2 if kind in ("actor", "hang") else 1,
            options={"num_cpus": 0.5},
            batch=GROUP,
            patience=PATIENCE if kind == "hang" else 120.0,
            restarts=100,
            name=kind,
        )

    def holders(self) -> list[psutil.Process]:
        living = self.pool._workers.living()
        return [psutil.Process(worker.facts.process) for worker in living if worker.facts]

    def victim(self, holder: psutil.Process) -> psutil.Process:
        if self.kind != "core":
            return holder
        return next(child for child in holder.children() if "EngineCor" in child.name())

    def restore(self) -> None:
        self.pool._workers.await_all()


class Servers(Stand):
    """Two servers, and the engine that talks to both."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.folder = tempfile.TemporaryDirectory()
        model.save_pretrained(self.folder.name)
        tokenizer.save_pretrained(self.folder.name)
        self.servers = [self.started(port=0) for _ in range(2)]
        urls = [server.url for server in self.servers]
        self.engine = VLLMServerEngine(model, tokenizer, url=urls, patience=600.0, name="server")

    def started(self, port: int) -> ServerProcess:
        return ServerProcess(self.folder.name, arguments=SMALL, port=port)

    def holders(self) -> list[psutil.Process]:
        return [psutil.Process(server.process.pid) for server in self.servers]

    def restore(self) -> None:
        for place, server in enumerate(self.servers):
            if server.process.poll() is not None:
                server.close()
                self.servers[place] = self.started(port=int(server.url.rpartition(":")[2]))
        deadline = time.monotonic() + GRACE
        while self.engine.health().detail and time.monotonic() < deadline:
            self.engine.generate(requests(), SAMPLING)  # lost servers are asked again while others work

    def close(self) -> None:
        super().close()
        for server in self.servers:
            server.close()
        self.folder.cleanup()


class Trial:
    """Blows that engines of one kind take."""

    def __init__(self, stand: Stand, kind: str, rng: random.Random, model: PreTrainedModel) -> None:
        self.stand, self.kind, self.rng, self.model = stand, kind, rng, model
        self.version = 0
        self.events: list[str] = []
        stand.engine.listen(lambda event, fields: self.events.append(event))

    def blow(self, phase: str, counts: Counts) -> None:
        """Strike once, and look at what comes of the call, and of the next one."""
        undisturbed, took = self.sampled() if phase == "generation" else ([], self.synced())
        self.events.clear()
        holder = self.rng.choice(self.stand.holders())
        family = [holder, *holder.children(recursive=True)]
        began = time.perf_counter()
        blow = signal.SIGSTOP if self.kind == "hang" else signal.SIGKILL
        striking = threading.Timer(self.rng.uniform(0.0, took), self.stand.victim(holder).send_signal, [blow])
        striking.start()
        if phase == "sync":
            self.synced()
        else:
            self.count(self.sampled()[0], undisturbed, counts)
        striking.join()
        self.count(self.sampled()[0], undisturbed, counts)  # one that died too late for the first call is found now
        counts.seconds += time.perf_counter() - began
        self.stand.restore()
        counts.blows += 1
        counts.deaths += self.events.count("engine_died")
        counts.returns += self.events.count("engine_returned")
        counts.orphans += orphans(family)

    def sampled(self) -> tuple[list[Rollout], float]:
        """A call, and how long it took."""
        began = time.perf_counter()
        return self.stand.engine.generate(requests(), SAMPLING), time.perf_counter() - began

    def synced(self) -> float:
        """New weights, and how long they took."""
        self.version += 1
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.001)
        began = time.perf_counter()
        self.stand.engine.sync_weights(ModelWeights(self.model), self.version)
        return time.perf_counter() - began

    def count(self, rollouts: list[Rollout], undisturbed: list[Rollout], counts: Counts) -> None:
        """Add up one call."""
        asked = range(GROUP * GROUPS)
        answered = Counter(map(number_of, rollouts))
        groups = Counter(number_of(rollout) // GROUP for rollout in rollouts)
        counts.requested += len(asked)
        counts.delivered += len(rollouts)
        counts.lost += sum(not answered[place] for place in asked)
        counts.duplicated += sum(answered[place] > 1 for place in asked)
        counts.short_groups += sum(groups[group] != GROUP for group in range(GROUPS))
        counts.wrong_version += sum(set(r.weight_versions.tolist()) != {self.version} for r in rollouts)
        counts.wrong_logprobs += sum(not logprobs_agree(self.model, rollout) for rollout in rollouts)
        pairs = zip(rollouts, undisturbed, strict=True) if undisturbed else ()
        counts.other_tokens += sum(not torch.equal(one.token_ids, other.token_ids) for one, other in pairs)


def orphans(family: Iterable[psutil.Process]) -> int:
    """How many of the processes run on, though their holder is dead."""
    deadline = time.monotonic() + GRACE
    while (left := sum(map(runs, family))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def runs(process: psutil.Process) -> bool:
    """Is it there, and not merely waiting to be buried?"""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def run(kinds: Mapping[str, int], seed: int, note: Callable[[Mapping[str, Counts]], None]) -> dict[str, Counts]:
    """All blows of all kinds; `note` is told the counts so far after each."""
    rng = random.Random(seed)
    results: dict[str, Counts] = {}
    for kind, kills in kinds.items():
        tokenizer = tiny_tokenizer("0123456789+= ")
        model = tiny_causal_lm(tokenizer, heads=2)
        phases = ["generation", "sync"] * (kills // 2) + ["generation"] * (kills % 2)
        rng.shuffle(phases)
        stand = Servers(model, tokenizer) if kind == "server" else Pool(kind, model, tokenizer)
        trial = Trial(stand, kind, rng, model)
        for place, phase in enumerate(phases):
            counts = results.setdefault(f"{kind}, {phase}", Counts())
            trial.blow(phase, counts)
            print(f"{kind} {place + 1}/{kills}: {phase}, {trial.events}", flush=True)
            note(results)
        stand.close()
    return results


def summary(results: Mapping[str, Counts], seed: int) -> dict[str, Any]:
    """The counts, and their sums."""
    rows = {name: asdict(counts) for name, counts in results.items()}
    total = {key: sum(row[key] for row in rows.values()) for key in asdict(Counts())}
    return {"seed": seed, "total": total, "by kind and phase": rows}


def _kills(text: str) -> tuple[str, int]:
    kind, _, kills = text.partition("=")
    if kind not in KILLS or not kills.isdigit():
        raise argparse.ArgumentTypeError(f"expected KIND=KILLS with a kind among {sorted(KILLS)}, got {text!r}")
    return kind, int(kills)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", type=_kills, nargs="+", default=list(KILLS.items()), metavar="KIND=KILLS")
    parser.add_argument("--json", type=Path, help="file for the counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def note(results: Mapping[str, Counts]) -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(summary(results, arguments.seed), indent=2) + "\n")

    results = run(dict(arguments.kinds), arguments.seed, note)
    print(json.dumps(summary(results, arguments.seed)["total"]))
    return 0 if all(counts.adds_up for counts in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
