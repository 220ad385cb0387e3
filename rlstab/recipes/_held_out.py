"""What a policy does on held-out prompts, and how far it has moved there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlstab.losses import clustered_mean, exact_kl
from rlstab.models import isolated_rng
from rlstab.recipes._evaluate import Estimate, encode_prompts, evaluate
from rlstab.recipes._recipe import Recipe

__all__ = ["HeldOutExam", "held_out_kl"]

KL_PROMPTS = 64
LOGITS_AT_ONCE = 2**27


@dataclass(frozen=True, kw_only=True)
class HeldOutExam:
    """The evaluation that a recipe asks for, the same prompts and seeds at every call.

    Args:
        recipe: the recipe.
        max_new_tokens: longest completion, in tokens.
        load_initial: loads the policy that training started from; not called where an adapter can be switched off.
    """

    recipe: Recipe
    max_new_tokens: int
    load_initial: Callable[[], PreTrainedModel]

    def take(self, policy: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The numbers of a policy by metric key, each with its standard error, and a few of its completions."""
        settings = self.recipe.evaluation
        sampling: dict[str, Any] = {
            "temperature": settings.temperature,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.recipe.seed,
        }
        evaluation = evaluate(
            policy,
            tokenizer,
            self.recipe.task,
            self._prompts,
            samples=settings.samples,
            ks=settings.ks,
            batch_size=settings.batch_size,
            **sampling,
        )
        kl = held_out_kl(policy, self._initial(policy), tokenizer, self._prompts[:KL_PROMPTS]["prompt"], **sampling)
        estimates = {f"eval/pass@{k}": estimate for k, estimate in evaluation.pass_at.items()}
        estimates |= {"eval/reward": evaluation.reward, "eval/entropy": evaluation.entropy, "eval/kl": kl}
        values = {key: estimate.mean for key, estimate in estimates.items()}
        values |= {f"{key}_se": estimate.se for key, estimate in estimates.items()}
        return values, [asdict(example) for example in evaluation.examples]

    @cached_property
    def _prompts(self) -> Dataset:
        return self.recipe.task.prompts(self.recipe.evaluation.prompts, split="test", seed=self.recipe.seed)

    def _initial(self, policy: Any) -> Callable[[], AbstractContextManager[PreTrainedModel]]:
        if self.recipe.adapter is not None:
            return lambda: _without_adapter(policy)
        model = self.load_initial().to(policy.device).eval()
        return lambda: nullcontext(model)


@contextmanager
def _without_adapter(policy: Any) -> Iterator[PreTrainedModel]:
    with policy.disable_adapter():
        yield policy


@torch.no_grad()
def held_out_kl(
    policy: PreTrainedModel,
    initial: Callable[[], AbstractContextManager[PreTrainedModel]],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> Estimate:
    r"""How far a policy has moved: the mean over tokens of $\mathrm{KL}(\pi(\cdot|s) \| \pi_0(\cdot|s))$.

    Exact over the vocabulary, at the prefixes $s$ of one completion per prompt sampled from the policy. The global
    random state and the models' modes are left as they were.

    Args:
        policy: the policy now.
        initial: enters the policy as it was at the start; it may be `policy` with its adapter off.
        tokenizer: encodes the prompts.
        prompts: texts or conversations.
        temperature: temperature of both distributions.
        max_new_tokens: longest completion, in tokens.
        seed: seed of the sampling.

    Returns:
        The mean in nats per token; its standard error takes the prompts as the independent units.
    """
    encoded = encode_prompts(tokenizer, list(prompts))
    ids, attention = encoded["input_ids"].to(policy.device), encoded["attention_mask"].to(policy.device)
    sampling = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    was_training = policy.training
    policy.eval()
    try:
        with isolated_rng(seed, device=policy.device):
            generate = cast(Callable[..., Tensor], policy.generate)
            tokens = generate(input_ids=ids, attention_mask=attention, generation_config=sampling)
        completion = tokens[:, ids.shape[1] :]
        ended = (completion == tokenizer.eos_token_id).int()
        mask = ended.cumsum(1) - ended == 0
        call = {"input_ids": tokens, "attention_mask": torch.cat([attention, mask.to(attention.dtype)], dim=1)}
        kl = _token_kl(policy, initial, call, width=completion.shape[1], temperature=temperature)
    finally:
        policy.train(was_training)
    mean, error = clustered_mean(kl, mask, torch.arange(len(kl), device=kl.device))
    return Estimate(mean=mean.item(), se=error.item())


def _token_kl(
    policy: PreTrainedModel,
    initial: Callable[[], AbstractContextManager[PreTrainedModel]],
    call: dict[str, Tensor],
    *,
    width: int,
    temperature: float,
) -> Tensor:
    """KL at each of the last `width` tokens, in portions of rows whose logits fit into memory."""
    rows = max(1, LOGITS_AT_ONCE // (width * policy.config.get_text_config().vocab_size))
    portions = []
    for start in range(0, len(call["input_ids"]), rows):
        portion = {name: tensor[start : start + rows] for name, tensor in call.items()}
        ours = policy(**portion, logits_to_keep=width + 1).logits[:, :-1]
        with initial() as reference:
            theirs = reference(**portion, logits_to_keep=width + 1).logits[:, :-1]
        portions.append(exact_kl(ours.float() / temperature, theirs.float() / temperature))
    return torch.cat(portions)
