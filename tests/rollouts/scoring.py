"""What a trainer says about a rollout: one forward over prompt and completion, without cache, padding or batch."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlstab.rollouts import Rollout


def trainer_logits(model: PreTrainedModel, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Logits of every position of the completion, divided by the temperature: `[T, V]`."""
    ids = torch.cat([rollout.prompt_ids, rollout.token_ids])[None]
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits[0].float() / temperature
    return logits[len(rollout.prompt_ids) - 1 : -1]


def trainer_logprobs(model: PreTrainedModel, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Log-probs of the completion: `[T]`."""
    logprobs = trainer_logits(model, rollout, temperature).log_softmax(-1)
    return logprobs.gather(-1, rollout.token_ids[:, None]).squeeze(-1)
