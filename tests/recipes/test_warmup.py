from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlstab.errors import ConfigError
from rlstab.models import tiny_causal_lm, tiny_moe, tiny_tokenizer
from rlstab.recipes._warmup import WarmUp, warm_up
from rlstab.tasks import Countdown, EmbeddedTask, SortDigits

TASK = SortDigits(digits=3)
SHORT = WarmUp(steps=3, batch_size=8, noise=0.0)


def model_for(task: EmbeddedTask, *, seed: int = 0, hidden: int = 16) -> tuple[Any, PreTrainedTokenizerBase]:
    tokenizer = tiny_tokenizer(task.alphabet)
    return tiny_causal_lm(tokenizer, hidden=hidden, heads=2, layers=1, seed=seed), tokenizer


def weights(model: PreTrainedModel) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def answer_loss(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Any) -> float:
    """Mean −log π over answer and end-of-sequence tokens, one sequence at a time and without padding."""
    logps = []
    for prompt, completion in zip(rows["prompt"], rows["completion"], strict=True):
        prompt_ids, answer_ids = tokenizer(prompt)["input_ids"], tokenizer(completion)["input_ids"]
        ids = torch.tensor([[*prompt_ids, *answer_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            scores = log_softmax(model(ids).logits[0, :-1], dim=-1)
        sampled = scores.gather(1, ids[0, 1:, None]).squeeze(1)
        logps.append(sampled[len(prompt_ids) - 1 :])
    return -torch.cat(logps).mean().item()


@pytest.mark.parametrize("task", [TASK, Countdown(numbers=2)], ids=repr)
def test_the_loss_is_that_of_the_answer_tokens_whatever_their_lengths(task: EmbeddedTask) -> None:
    model, tokenizer = model_for(task)
    rows = task.demonstrations(8, seed=5)
    expected = answer_loss(model, tokenizer, rows)
    (loss,) = warm_up(model, tokenizer, task, replace(SHORT, steps=1), seed=5)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_it_teaches_the_task_to_a_small_model() -> None:
    task = SortDigits(digits=2)
    model, tokenizer = model_for(task, hidden=32)
    losses = warm_up(model, tokenizer, task, WarmUp(steps=120, batch_size=32, learning_rate=1e-2, noise=0.0))

    assert len(losses) == 120
    assert answer_loss(model, tokenizer, task.demonstrations(50, seed=9)) < 0.1
    assert losses[-1] < 0.1 < losses[0]


def test_noise_leaves_a_loss_that_cannot_be_learnt_away() -> None:
    task = SortDigits(digits=2)
    model, tokenizer = model_for(task, hidden=32)
    losses = warm_up(model, tokenizer, task, WarmUp(steps=120, batch_size=32, learning_rate=1e-2, noise=1.0))
    assert min(losses) > 0.5


def test_it_is_deterministic_and_leaves_the_random_state_and_the_mode() -> None:
    def run(seed: int) -> tuple[list[float], list[torch.Tensor]]:
        model, tokenizer = model_for(TASK)
        return warm_up(model, tokenizer, TASK, SHORT, seed=seed), weights(model)

    torch.manual_seed(1)
    state = torch.get_rng_state()
    losses, trained = run(seed=2)
    assert torch.equal(torch.get_rng_state(), state)

    torch.manual_seed(99)
    again, trained_again = run(seed=2)
    assert again == losses
    assert all(map(torch.equal, trained, trained_again))
    assert run(seed=3)[0] != losses


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_returns_and_no_gradient_stays(training: bool) -> None:
    model, tokenizer = model_for(TASK)
    model.train(training)
    warm_up(model, tokenizer, TASK, SHORT)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_active_and_follows_the_seed() -> None:
    def losses(seed: int, dropout: float) -> list[float]:
        model, tokenizer = model_for(TASK)
        model.config.attention_dropout = dropout
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = dropout
        return warm_up(model, tokenizer, TASK, SHORT, seed=seed)

    assert losses(2, dropout=0.5) == losses(2, dropout=0.5)
    assert losses(2, dropout=0.5) != losses(2, dropout=0.0)


def test_the_gradient_is_clipped() -> None:
    model, tokenizer = model_for(TASK)
    before = weights(model)
    warm_up(model, tokenizer, TASK, replace(SHORT, steps=1, max_grad_norm=1e-12))
    # Adam divides by |g| + 1e-8, so a gradient of norm 1e-12 moves nothing by more than 1e-4 of the step size.
    moved = max((new - old).abs().max().item() for new, old in zip(weights(model), before, strict=True))
    assert moved <= 1.1e-4 * SHORT.learning_rate


def test_progress_is_reported_after_every_step() -> None:
    model, tokenizer = model_for(TASK)
    seen: list[tuple[int, int, float]] = []
    losses = warm_up(model, tokenizer, TASK, SHORT, on_step=lambda *report: seen.append(report))
    assert seen == [(1, 3, losses[0]), (2, 3, losses[1]), (3, 3, losses[2])]


def test_an_interrupt_leaves_a_model_in_order() -> None:
    model, tokenizer = model_for(TASK)
    state = torch.get_rng_state()

    def interrupt(step: int, total: int, loss: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm_up(model, tokenizer, TASK, SHORT, on_step=interrupt)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_no_steps_leave_the_model_as_it_is() -> None:
    model, tokenizer = model_for(TASK)
    before = weights(model)
    assert warm_up(model, tokenizer, TASK, replace(SHORT, steps=0)) == []
    assert all(map(torch.equal, weights(model), before))


def test_a_mixture_of_experts_learns_too() -> None:
    tokenizer = tiny_tokenizer(TASK.alphabet)
    model = tiny_moe(tokenizer, hidden=16, heads=2, layers=1, experts=4)
    losses = warm_up(model, tokenizer, TASK, replace(SHORT, steps=30, learning_rate=1e-2))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("token", ["pad_token", "eos_token"])
def test_a_tokenizer_without_its_special_tokens_is_refused(token: str) -> None:
    model, tokenizer = model_for(TASK)
    setattr(tokenizer, token, None)
    with pytest.raises(ConfigError, match="no padding or no end-of-sequence token"):
        warm_up(model, tokenizer, TASK, SHORT)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("steps", -1, "at least 0"),
        ("batch_size", 0, "at least 1"),
        ("learning_rate", 0.0, "a positive number"),
        ("noise", 1.1, "a probability between 0 and 1"),
        ("max_grad_norm", -1.0, "a positive number"),
    ],
)
def test_settings_outside_their_range_are_refused(key: str, value: Any, expected: str) -> None:
    make: Callable[..., WarmUp] = WarmUp
    with pytest.raises(ConfigError, match=f"WarmUp: {key} {value}; expected {expected}"):
        make(**{key: value})
