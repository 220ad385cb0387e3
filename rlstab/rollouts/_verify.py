"""`SyncVerifier`: proof at every weight sync that engine and trainer are the same model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlstab.errors import ConfigError, WeightSyncError
from rlstab.rollouts._canary import perturbed, share_followed, weight_groups
from rlstab.rollouts._engine import Engine
from rlstab.rollouts._kept import renormalised_logprobs
from rlstab.rollouts._request import Request, Sampling
from rlstab.rollouts._rollout import Rollout
from rlstab.rollouts._score import evaluating, sequence_logits, sequence_logprobs
from rlstab.rollouts._weights import ModelWeights

__all__ = ["SyncReport", "SyncVerifier"]

EXACT = 1e-5
"""Largest mean difference of log-probs between two engines of one model in float32, in nats."""

FOLLOWED = 0.75
"""Smallest share of the trainer's move that an engine in another precision must make."""

UNMOVED = 1e-3
"""Largest move of an engine that has not moved, as a share of the policy's."""

SIGMAS = 3.0

EASILY_LOST = {"tied head", "experts", "adapters"}

CAUSES = {
    "tied head": (
        "the head that is tied to the embedding kept its old weights (vLLM on a CPU does so unless it is repaired: "
        "VLLMEngine does it, with repair=True)"
    ),
    "experts": (
        "the experts kept their old weights, or have them in the wrong layout (vLLM on a CPU does so unless it is "
        "repaired: VLLMEngine does it, with repair=True)"
    ),
    "adapters": "the adapters were not merged into the weights that were sent",
    "head": "the output head kept its old weights",
    "layers": "a part of the layers kept its old weights",
}


NOTHING_TAKEN = (
    "it did not take the new weights, or goes on with what it computed before (a cache that was not cleared)"
)


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What was seen at one weight sync, on tokens that stay the same throughout.

    Args:
        version: version of the weights.
        mean_abs: mean of the absolute difference between the engine's log-probs and the trainer's, in nats.
        max_abs: its largest value.
        staleness: where the engine stands between the new weights (0) and those before (1), over all syncs so far; NaN
            before the weights have changed.
        staleness_se: standard error of `staleness`.

    Example:
        >>> SyncReport(version=3, mean_abs=2e-7, max_abs=9e-7, staleness=0.0, staleness_se=0.01).version
        3
    """

    version: int
    mean_abs: float
    max_abs: float
    staleness: float
    staleness_se: float


@final
class SyncVerifier:
    r"""Syncs an engine with the policy, and proves each time that both are the same model.

    The first sync brings a canary: copies of all tensors, visibly changed, that the engine must follow as the policy
    does; then the true weights return, to the bit. A few completions are sampled, whose log-probs must be the trainer's
    at the temperature that is sampled with.

    From then on, the tokens of these completions are scored on both sides at each sync. In float32 both must agree. In
    lower precision one step of training moves log-probs by less than the rounding does, so the evidence is summed over
    syncs: with the engine's scores $e_t$, the trainer's $n_t$ and the residual against the first sync
    $r_t = (e_t - n_t) - (e_0 - n_0)$,

    $$\Lambda = -\frac{\sum_t \langle r_t, d_t\rangle}{\sum_t \lVert d_t\rVert^2}, \qquad d_t = n_t - n_{t-1}$$

    is 0 for an engine with the new weights and 1 for one with those before. It fails where it is nearer to the weights
    before, by three standard errors.

    Args:
        engine: the engine; one that shares the model's weights is only told the version.
        model: the policy, unwrapped, whole on this process. It is changed for the time of the canary, and restored.
        sampling: how the trainer samples.
        tolerance: largest mean difference in nats where both sides compute in float32.
        mixed: the policy's forward runs in lower precision than its weights have (autocast).
        tokens: most tokens that a completion of the check has.

    Raises:
        ConfigError: if the tolerance is not positive.

    Example:
        >>> from rlstab.models import tiny_causal_lm, tiny_tokenizer
        >>> from rlstab.rollouts import TransformersEngine
        >>> tokenizer = tiny_tokenizer("0123456789=")
        >>> model = tiny_causal_lm(tokenizer)
        >>> engine = TransformersEngine(model, tokenizer, share=False)
        >>> verifier = SyncVerifier(engine, model, Sampling(max_new_tokens=8))
        >>> verifier.start([[4, 5, 6], [7, 8]], version=0).mean_abs < 1e-5
        True
        >>> verifier.sync(version=1).version
        1
    """

    def __init__(
        self,
        engine: Engine,
        model: PreTrainedModel,
        sampling: Sampling,
        *,
        tolerance: float = EXACT,
        mixed: bool = False,
        tokens: int = 64,
    ) -> None:
        if not tolerance > 0:
            raise ConfigError(f"SyncVerifier: tolerance {tolerance}; expected a number above 0")
        self._engine = engine
        self._model = model
        self._sampling = sampling
        self._tolerance = tolerance
        self._tokens = tokens
        self._exact = engine.dtype == model.dtype == torch.float32 and not mixed
        self._sequences: list[Tensor] = []
        self._offset = self._before = torch.empty(0)
        self._along = self._squares = self._noise = 0.0
        self._count = 0

    def start(self, prompts: Sequence[Sequence[int]], version: int) -> SyncReport:
        """Sync for the first time, with the canary.

        Args:
            prompts: prompts to sample completions of, a few are enough.
            version: version of the policy's weights.

        Raises:
            WeightSyncError: if the engine does not agree or does not follow, with the likely cause.
        """
        self._send(version)
        rollouts = self._sample(prompts)
        self._sequences = [torch.cat([rollout.prompt_ids, rollout.token_ids]) for rollout in rollouts]
        trainer, engine = self._trainer_scores(), self._engine_scores()
        self._check_canary(trainer, engine, version)
        engine = self._engine_scores()
        self._check_agreement(trainer, engine, version)
        self._check_samples(rollouts)
        self._offset, self._before = engine - trainer, trainer
        return self._report(trainer, engine, version)

    def sync(self, version: int) -> SyncReport:
        """Sync, and compare with the new weights and with those before.

        Args:
            version: version of the policy's weights.

        Raises:
            WeightSyncError: if the engine has not taken the new weights, with the likely cause.
        """
        self._send(version)
        trainer, engine = self._trainer_scores(), self._engine_scores()
        moved, residual = trainer - self._before, engine - trainer - self._offset
        self._along -= float(residual @ moved)
        self._squares += float(moved @ moved)
        self._noise += float(residual @ residual)
        self._count += len(residual)
        self._before = trainer
        report = self._report(trainer, engine, version)
        behind = report.staleness - SIGMAS * report.staleness_se > 0.5
        if behind or (self._exact and report.mean_abs > self._tolerance and -(residual @ moved) > 0.5 * moved @ moved):
            raise WeightSyncError(
                f"{self._engine.id}: the engine is nearer to the weights before than to those of version {version} "
                f"(staleness over all syncs {report.staleness:.2f} ± {report.staleness_se:.2f}, mean difference "
                f"{report.mean_abs:.2g} nats). Likely cause: {NOTHING_TAKEN}"
            )
        self._check_agreement(trainer, engine, version)
        return report

    def _send(self, version: int) -> None:
        self._engine.sync_weights(ModelWeights(self._model), version)

    def _sample(self, prompts: Sequence[Sequence[int]]) -> list[Rollout]:
        limit = min(self._tokens, self._sampling.max_new_tokens)
        requests = [Request(prompt_ids=prompt, max_new_tokens=limit) for prompt in prompts]
        return self._engine.generate(requests, self._sampling)

    def _trainer_scores(self) -> Tensor:
        with evaluating(self._model):
            return torch.cat([sequence_logprobs(self._model, sequence) for sequence in self._sequences])

    def _engine_scores(self) -> Tensor:
        return torch.cat(self._engine.score(self._sequences))

    def _report(self, trainer: Tensor, engine: Tensor, version: int) -> SyncReport:
        difference = (engine - trainer).abs()
        moved = self._squares > 0
        spread = math.sqrt(self._noise / self._count / self._squares) if moved else math.nan
        return SyncReport(
            version=version,
            mean_abs=float(difference.mean()),
            max_abs=float(difference.max()),
            staleness=self._along / self._squares if moved else math.nan,
            staleness_se=spread,
        )

    def _check_canary(self, trainer: Tensor, engine: Tensor, version: int) -> None:
        if self._engine.shares_weights:
            return
        groups = weight_groups(self._model)
        everything = [parameter for group in groups.values() for parameter in group]
        share, moved, distance = self._follows(everything, trainer, engine, version)
        if share >= FOLLOWED and (distance <= self._tolerance or not self._exact):
            self._send(version)
            return
        followed = {name: self._follows(group, trainer, engine, version)[0] for name, group in groups.items()}
        self._send(version)
        cause = NOTHING_TAKEN if moved < UNMOVED else _cause(followed)
        found = ", ".join(f"{name} {max(value, 0):.0%}" for name, value in followed.items())
        raise WeightSyncError(
            f"{self._engine.id}: the engine does not follow the policy: after a sync of visibly changed weights its "
            f"log-probs differ by {distance:.2g} nats on average. Share of the change that it made, by what was "
            f"changed: {found}. Likely cause: {cause}"
        )

    def _follows(
        self, parameters: Sequence[torch.nn.Parameter], trainer: Tensor, engine: Tensor, version: int
    ) -> tuple[float, float, float]:
        """The share of a change that the engine follows, how far it moves at all, and its distance from the trainer."""
        with perturbed(parameters):
            self._send(version)
            changed, answer = self._trainer_scores(), self._engine_scores()
        change, move = changed - trainer, answer - engine
        moved = float(move.norm() / change.norm())
        return share_followed(change, move), moved, float((answer - changed).abs().mean())

    def _check_agreement(self, trainer: Tensor, engine: Tensor, version: int) -> None:
        distance = float((engine - trainer).abs().mean())
        if self._exact and not distance <= self._tolerance:
            raise WeightSyncError(
                f"{self._engine.id}: with the weights of version {version} the engine's log-probs differ from the "
                f"trainer's by {distance:.2g} nats on average; expected at most {self._tolerance:.2g} in float32. "
                "Likely cause: a part of the new weights was not taken, or the engine computes in lower precision"
            )

    def _check_samples(self, rollouts: Sequence[Rollout]) -> None:
        """Do completions carry the log-probs of the distribution that the trainer believes in?"""
        sampled = torch.cat([rollout.logprobs for rollout in rollouts])
        distance = self._distance(rollouts, sampled, self._sampling.temperature or 1.0)
        limit = self._tolerance if self._exact else 1 - FOLLOWED
        if distance <= limit:
            return
        raw = self._distance(rollouts, sampled, 1.0)
        if raw < distance / 2:
            cause = (
                "they are raw log-probs, of temperature 1 (vLLM: set logprobs_mode='processed_logprobs', its default "
                "is 'raw_logprobs')"
            )
        elif self._sampling.truncated or bool((sampled >= 0).all()):
            cause = "sampling is truncated on the engine's side in another way than asked for"
        else:
            cause = "the engine changes tokens or logits on its way (chat template, penalties, bias, other precision)"
        raise WeightSyncError(
            f"{self._engine.id}: log-probs of sampled tokens differ from the trainer's by {distance:.2g} nats on "
            f"average at temperature {self._sampling.temperature:g}; expected at most {limit:.2g}. Likely cause: "
            f"{cause}"
        )

    def _distance(self, rollouts: Sequence[Rollout], sampled: Tensor, temperature: float) -> float:
        with evaluating(self._model):
            expected = torch.cat([self._expected(rollout, temperature) for rollout in rollouts])
        return float((sampled - expected).abs().mean())

    def _expected(self, rollout: Rollout, temperature: float) -> Tensor:
        """The trainer's log-probs of a completion, over the kept sets where there are some."""
        sequence = torch.cat([rollout.prompt_ids, rollout.token_ids])
        if rollout.kept is None:
            return sequence_logprobs(self._model, sequence, temperature)[len(rollout.prompt_ids) - 1 :]
        logits = sequence_logits(self._model, sequence, temperature)[len(rollout.prompt_ids) - 1 :]
        return renormalised_logprobs(logits, rollout.token_ids, rollout.kept.padded())


def _cause(followed: Mapping[str, float]) -> str:
    """What may have gone wrong, by the share of each group's change that the engine followed."""
    lost = [name for name, share in followed.items() if share < FOLLOWED]
    named = [name for name in lost if name in EASILY_LOST] or lost[:1]
    return "; ".join(CAUSES[name] for name in named) or "the engine computes in another precision than the policy"
