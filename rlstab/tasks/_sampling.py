"""What is shown and how it is sampled: thoughts left out, prompts by their influence, the temperature by its yield."""

import math
import random
import re
from collections.abc import Callable, Sequence

from datasets import Dataset

from rlstab.errors import ConfigError

__all__ = ["choose_temperature", "draw_prompts", "drop_thoughts", "prompt_influence", "reward_pass_at"]

TEMPERATURES = tuple(tenths / 10 for tenths in range(3, 17))
THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
EMPTY_THOUGHT = "<think>\n\n</think>"


def drop_thoughts(completions: Sequence[str], *, probability: float = 0.5, seed: int = 0) -> list[str]:
    r"""TON's thought dropout: some demonstrations answer after an empty thought.

    Supervised training on the result shows a policy that it may answer at once; reinforcement learning then lets it
    choose. Each completion loses the inside of its thoughts with the given probability.

    Args:
        completions: demonstrations with their thought between `<think>` and `</think>`.
        probability: chance that a thought is emptied.
        seed: seed of the choice.

    Returns:
        The completions, some with an empty thought.

    Raises:
        ConfigError: if `probability` is none.

    Example:
        >>> drop_thoughts(["<think>2 + 2</think><answer>4</answer>"], probability=1.0)
        ['<think>\n\n</think><answer>4</answer>']

    Reference: Think or Not? Selective Reasoning via Reinforcement Learning for Vision-Language Models,
        https://arxiv.org/abs/2505.16854.
    """
    if not 0 <= probability <= 1:
        raise ConfigError(f"drop_thoughts: probability {probability}; expected between 0 and 1")
    rng = random.Random(seed)
    return [THOUGHT.sub(EMPTY_THOUGHT, text) if rng.random() < probability else text for text in completions]


def prompt_influence(accuracy: float) -> float:
    r"""How much a prompt can teach: $\sqrt{\alpha(1 - \alpha)}$, the factor of its influence on the GRPO objective.

    Greatest where half of the rollouts are right, 0 where all or none are.

    Args:
        accuracy: $\alpha$, share of right rollouts.

    Raises:
        ConfigError: if `accuracy` is no share.

    Example:
        >>> [round(prompt_influence(accuracy), 3) for accuracy in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 0.433, 0.5, 0.0]

    Reference: Behavior Injection: Preparing Language Models for Reinforcement Learning,
        https://arxiv.org/abs/2505.18917.
    """
    if not 0 <= accuracy <= 1:
        raise ConfigError(f"prompt_influence: accuracy {accuracy}; expected a share between 0 and 1")
    return math.sqrt(accuracy * (1 - accuracy))


def draw_prompts(prompts: Dataset, weights: Sequence[float], n: int, *, seed: int = 0) -> Dataset:
    """`n` rows drawn with replacement, each with a probability in proportion to its weight.

    Args:
        prompts: rows of a task.
        weights: one for each row, such as its `prompt_influence`; at least one is positive.
        n: number of rows to draw.
        seed: seed of the draw.

    Raises:
        ConfigError: if there is not one weight of at least 0 for each row, or all are 0.

    Example:
        >>> from rlstab.tasks import SortDigits
        >>> prompts = SortDigits(digits=3).prompts(3)
        >>> drawn = draw_prompts(prompts, [prompt_influence(accuracy) for accuracy in (0.0, 0.5, 1.0)], 4)
        >>> set(drawn["prompt"]) == {prompts[1]["prompt"]}
        True
    """
    if len(weights) != len(prompts) or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ConfigError(f"draw_prompts: expected a weight of at least 0 for each of {len(prompts)} rows, not all 0")
    return prompts.select(random.Random(seed).choices(range(len(prompts)), weights=weights, k=n))


def reward_pass_at(scores: Sequence[Sequence[float]], correct: Sequence[Sequence[bool]], *, k: int = 2) -> float:
    """M-STaR's Reward-Pass@k: how often one of the k responses that a reward model likes best is right.

    It tells how much of what a policy explores can be exploited: it falls when nothing right is sampled any more, and
    when the reward model no longer finds it.

    Args:
        scores: the reward model's score of each response, for each prompt.
        correct: whether it is right.
        k: responses that are looked at.

    Returns:
        The share of prompts.

    Raises:
        ConfigError: if there is no prompt, or scores and verdicts do not match, or a prompt has fewer than k responses.

    Example:
        >>> reward_pass_at([[0.9, 0.8, 0.1], [0.9, 0.8, 0.1]], [[False, True, False], [False, False, True]], k=2)
        0.5

    Reference: Diving into Self-Evolving Training for Multimodal Reasoning (M-STaR), https://arxiv.org/abs/2412.17451.
    """
    sizes = [len(row) for row in scores]
    if not sizes or sizes != [len(row) for row in correct] or not 1 <= k <= min(sizes):
        raise ConfigError(
            f"reward_pass_at: expected a score and a verdict for each response, at least k={k} of a prompt"
        )
    found = 0
    for row, verdicts in zip(scores, correct, strict=True):
        best = sorted(range(len(row)), key=row.__getitem__, reverse=True)[:k]
        found += any(verdicts[index] for index in best)
    return found / len(sizes)


def choose_temperature(measure: Callable[[float], float], *, temperatures: Sequence[float] = TEMPERATURES) -> float:
    """M-STaR's choice of the sampling temperature: the one that yields most on validation prompts.

    The authors repeat it every second iteration with Reward-Pass@2 (`reward_pass_at`), over 0.3, 0.4, ..., 1.6.

    Args:
        measure: what sampling at a temperature yields.
        temperatures: the candidates.

    Returns:
        The best candidate, the lowest of several.

    Raises:
        ConfigError: if there is no candidate, or one is not positive.

    Example:
        >>> choose_temperature(lambda temperature: -(temperature - 0.72) ** 2)
        0.7

    Reference: M-STaR, https://arxiv.org/abs/2412.17451.
    """
    if not temperatures or min(temperatures) <= 0:
        raise ConfigError(f"choose_temperature: temperatures {tuple(temperatures)}; expected numbers above 0")
    return max(sorted(temperatures), key=measure)
