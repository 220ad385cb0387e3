"""Host and drop-in side by side: the cases, how a run is traced, and what counts as equal.

The documentation builds its table of tested combinations from `CASES`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rlstab.losses import presets
from rlstab.models import tiny_causal_lm, tiny_moe, tiny_tokenizer
from rlstab.trainers import StableGRPOTrainer

ALPHABET = "0123456789=+-$"
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
SAMPLER_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True)
class Case:
    """One combination of host features, trained by both trainers with the same seed."""

    title: str
    config: dict[str, Any] = field(default_factory=dict)
    steps: int = 4
    moe: bool = False
    peft: bool = False
    sampler: bool = False
    tools: bool = False
    evaluate: bool = False

    @property
    def old_logps(self) -> bool:
        """Whether the host records log-probs of the policy that sampled, for later updates or for the sampler."""
        accumulation = self.config.get("gradient_accumulation_steps", 1)
        updates = self.config.get("steps_per_generation", accumulation) * self.config.get("num_iterations", 1)
        return self.sampler or accumulation % updates != 0

    @property
    def identical(self) -> tuple[str, ...]:
        """What is the host's bit for bit, because it comes from the same operations in the same order."""
        loss_type, tokens = self.config.get("loss_type"), self.config.get("top_entropy_quantile", 1.0)
        other_terms = self.config.get("beta") or (self.config.get("entropy_coef") and tokens < 1)
        if (
            other_terms or loss_type == "sapo"
        ):  # the host adds up per-token losses; its gate multiplies in another order
            return ()
        return ("gradient",) if loss_type == "luspo" else ("loss", "gradient")


def _cases() -> dict[str, Case]:
    twice = {"num_iterations": 2, "gradient_accumulation_steps": 2}
    cases = {name: Case(f"loss_type={name}", {"loss_type": name, **twice}) for name in LOSS_TYPES}
    cases |= {
        f"{name}-on-policy": Case(f"loss_type={name}, one update per batch", {"loss_type": name}) for name in LOSS_TYPES
    }
    cases |= {
        f"{name}-kl": Case(f"loss_type={name}, beta", {"loss_type": name, "beta": 0.1, **twice})
        for name in LOSS_TYPES
        if name != "vespo"
    }
    cases["vespo-kl"] = Case(
        "loss_type=vespo, beta", {"loss_type": "vespo", "beta": 0.1, "learning_rate": 1e-3, **twice}
    )
    cases |= {
        f"dapo-{mode}": Case(
            f"sampler correction {mode}",
            {
                "loss_type": "dapo",
                "vllm_importance_sampling_mode": mode,
                "vllm_importance_sampling_clip_max": 1.2,
                "vllm_importance_sampling_clip_min": 0.7,
                **twice,
            },
            sampler=True,
        )
        for mode in SAMPLER_MODES
    }
    corrected = {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.2}
    cases |= {
        f"{name}-sampler": Case(
            f"loss_type={name}, sampler correction", {"loss_type": name, **corrected, **twice}, sampler=True
        )
        for name in LOSS_TYPES
        if name != "dapo"
    }
    sequence = {"importance_sampling_level": "sequence"}
    cases |= {
        "gspo": Case("GSPO", {"loss_type": "grpo", **sequence, **twice}),
        "gspo-kl": Case("GSPO, beta", {"loss_type": "grpo", "beta": 0.1, **sequence, **twice}),
        "luspo-sequence": Case("LUSPO at sequence level", {"loss_type": "luspo", **sequence, **twice}),
        "cispo-sequence": Case("CISPO at sequence level", {"loss_type": "cispo", **sequence, **twice}),
        "kl-uncorrected": Case("beta without bias correction", {"beta": 0.1, "use_bias_correction_kl": False, **twice}),
        "kl-moving": Case(
            "beta towards a moving reference",
            {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5, **twice},
        ),
        "asymmetric-clip": Case("epsilon, epsilon_high", {"epsilon": 0.01, "epsilon_high": 0.02, **twice}),
        "two-sided-clip": Case("delta", {"epsilon": 0.01, "delta": 1.03, **twice}),
        "off-policy-mask": Case("off-policy sequence mask", {"off_policy_mask_threshold": 1e-3, **twice}),
        "off-policy-mask-sampler": Case(
            "off-policy sequence mask against the sampler", {"off_policy_mask_threshold": 0.01, **twice}, sampler=True
        ),
        "top-entropy": Case("top-entropy tokens", {"top_entropy_quantile": 0.4, **twice}),
        "entropy-bonus": Case("entropy bonus", {"entropy_coef": 0.01, **twice}),
        "entropy-bonus-top": Case(
            "entropy bonus on top-entropy tokens", {"entropy_coef": 0.01, "top_entropy_quantile": 0.4, **twice}
        ),
        "adaptive-entropy": Case(
            "adaptive entropy bonus",
            {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 2.5, **twice},
        ),
        "truncated-masked": Case("truncated completions masked", {"mask_truncated_completions": True, **twice}),
        "truncated-masked-grpo": Case(
            "truncated completions masked, loss_type=grpo",
            {"mask_truncated_completions": True, "loss_type": "grpo", **twice},
        ),
        "accumulation-4": Case("4 micro-batches per step", {"gradient_accumulation_steps": 4}),
        "accumulation-over-generation": Case(
            "two generations in one step", {"gradient_accumulation_steps": 4, "steps_per_generation": 2}
        ),
        "generation-over-accumulation": Case(
            "two steps per generation", {"gradient_accumulation_steps": 2, "steps_per_generation": 4}
        ),
        "temperature": Case("temperature 0.7", {"temperature": 0.7, **twice}),
        "batch-scaled-rewards": Case("rewards scaled by the batch", {"scale_rewards": "batch", **twice}),
        "moe": Case("mixture of experts with auxiliary loss", dict(twice), moe=True),
        "peft": Case("LoRA adapters", dict(twice), peft=True),
        "peft-kl": Case("LoRA adapters, beta", {"beta": 0.1, **twice}, peft=True),
        "tool-mask": Case("tokens of tools masked", dict(twice), tools=True),
        "tool-mask-grpo": Case("tokens of tools masked, loss_type=grpo", {"loss_type": "grpo", **twice}, tools=True),
        "evaluation": Case(
            "evaluation between steps", {"eval_strategy": "steps", "eval_steps": 2, **twice}, evaluate=True
        ),
    }
    return cases


CASES = _cases()


def digits_reward(completions: list[str], **_: Any) -> list[float]:
    """How often the completion rises from one character to the next: varied within a group."""
    return [sum(a < b for a, b in pairwise(text)) + 0.1 * len(text) for text in completions]


def prompts(n: int = 32) -> Dataset:
    """Prompts of different lengths."""
    return Dataset.from_dict({"prompt": [f"{i * 7919 % 1000}=" for i in range(n)]})


def tool_rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Random completions in which every third token counts as a tool's."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    tokenizer = trainer.processing_class
    completion_ids = [
        [*torch.randint(4, 14, (5 + i % 4,), generator=generator).tolist(), tokenizer.eos_token_id]
        for i in range(len(prompts))
    ]
    return {
        "prompt_ids": tokenizer(prompts)["input_ids"],
        "completion_ids": completion_ids,
        "logprobs": None,
        "env_mask": [[int(t % 3 != 2) for t in range(len(ids))] for ids in completion_ids],
    }


class OtherSampler:
    """An engine that disagrees a little with the policy and cannot score one token of each sequence."""

    state: Any
    model: Any

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        self.use_vllm = False
        completion_ids, _ = super()._generate_single_turn(prompt_ids, *args, **kwargs)  # type: ignore[misc]
        self.use_vllm = True
        generator = torch.Generator().manual_seed(self.state.global_step)
        logprobs = []
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
            ids = torch.tensor([[*prompt, *completion]])
            with torch.no_grad():
                logp = self.model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            chosen = logp.gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)
            chosen = chosen + 0.15 * torch.randn(chosen.shape, generator=generator)
            scores: list[float | None] = chosen.tolist()
            if len(scores) > 2:
                scores[1] = None
            logprobs.append(scores)
        return completion_ids, logprobs


class HostWithOtherSampler(OtherSampler, GRPOTrainer):
    """The host, sampled for by another policy."""


class OursWithOtherSampler(OtherSampler, StableGRPOTrainer):
    """The drop-in, sampled for by another policy."""


@dataclass
class Trace:
    """What a run did: the loss of every micro-batch, the gradients of every step, the final weights, the logs."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    logs: list[dict[str, float]] = field(default_factory=list)


class Tracer(TrainerCallback):
    """Copies gradients before each optimizer step (nothing is clipped in these runs)."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.trace.gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )


def config(tmp_path: Any, **changes: Any) -> GRPOConfig:
    """A small, deterministic run on the CPU."""
    values: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 5e-3,
        "max_steps": 4,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    }
    return GRPOConfig(**{**values, **changes})


def build(case: Case, tmp_path: Any, *, host: bool, **extra: Any) -> Any:
    """The trainer of a case, on a model made anew."""
    tokenizer = tiny_tokenizer(ALPHABET)
    args = config(tmp_path, **{"max_steps": case.steps, **case.config})
    dense = tiny_causal_lm(tokenizer, seed=1, hidden=32, layers=2, heads=2)
    model = tiny_moe(tokenizer, seed=1) if case.moe else dense
    kwargs: dict[str, Any] = {"train_dataset": prompts(), "processing_class": tokenizer, **extra}
    if case.evaluate:
        kwargs["eval_dataset"] = prompts(4)
    if case.peft:
        # A fresh adapter starts at zero; ours starts elsewhere so that it matters.
        kwargs["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    elif args.beta:
        # The host loads its reference from a path: the same weights, for both.
        model.save_pretrained(tmp_path / "start")
        tokenizer.save_pretrained(tmp_path / "start")
        model = type(model).from_pretrained(tmp_path / "start")
    if case.tools:
        kwargs["rollout_func"] = tool_rollout
    host_class = HostWithOtherSampler if case.sampler else GRPOTrainer
    our_class = OursWithOtherSampler if case.sampler else StableGRPOTrainer
    if host:
        trainer = host_class(model, digits_reward, args, **kwargs)
    else:
        if case.sampler:
            with_engine = copy.deepcopy(args)
            with_engine.use_vllm = True
            kwargs.setdefault("objective", presets.from_config(with_engine))
            args = config(tmp_path, **{"max_steps": case.steps, **_schedule_only(case.config)})
        trainer = our_class(model, digits_reward, args, signals=None, **kwargs)
    if case.sampler:
        trainer.use_vllm = True
    return trainer


def _schedule_only(changes: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in changes.items() if k in ("num_iterations", "gradient_accumulation_steps")}


def run(trainer: Any) -> Trace:
    """Train and trace."""
    trace = Trace()
    trainer.add_callback(Tracer(trace))
    step = trainer.training_step

    def traced(*args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = step(*args, **kwargs)
        trace.losses.append(float(loss))
        return loss

    trainer.training_step = traced
    trainer.train()
    trace.weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trace.logs = trainer.state.log_history
    return trace


def gradient_distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of any parameter's gradient, relative to the norm of the whole gradient."""
    assert ours.keys() == theirs.keys()
    norm = torch.stack([g.norm() for g in theirs.values()]).norm()
    worst = max(float((ours[name] - theirs[name]).norm()) for name in theirs)
    return worst / max(float(norm), 1e-12)
