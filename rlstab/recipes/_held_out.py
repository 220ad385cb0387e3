"""What a policy does on held-out prompts, as numbers by metric key."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlstab.losses import clustered_mean, exact_kl
from rlstab.models import isolated_rng
from rlstab.recipes._evaluate import Estimate, Evaluation, encode_prompts

__all__ = ["held_out_kl", "metric_values"]

LOGITS_AT_ONCE = 2**27


def metric_values(evaluation: Evaluation, kl: Estimate) -> dict[str, float]:
    """The numbers of an evaluation by metric key, each with its standard error."""
    estimates = {f"eval/pass@{k}": estimate for k, estimate in evaluation.pass_at.items()}
    estimates |= {"eval/reward": evaluation.reward, "eval/entropy": evaluation.entropy, "eval/kl": kl}
    values = {key: estimate.mean for key, estimate in estimates.items()}
    return values | {f"{key}_se": estimate.se for key, estimate in estimates.items()}


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
    r"""How far a policy has moved: the mean over tokens of $\mathrm{KL}(\pi(\cdot|s) \| \pi_0(\cdot|s))$, $s$ the prefix.

    Exact over the vocabulary, at the prefixes of one completion per prompt sampled from the policy. The global random
    state and the models' modes are left as they were.

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
