import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlstab.errors import ConfigError
from rlstab.models import isolated_rng, tiny_causal_lm, tiny_tokenizer
from rlstab.recipes._evaluate import _ratio, _sample, evaluate, pass_at_k
from rlstab.tasks import Countdown, SortDigits, Split, Task

ALPHABET = "abcd"


@dataclass(frozen=True, kw_only=True)
class StartsWith(Task):
    """Correct is a completion that starts with `letter`; one that starts with `unjudged` cannot be judged."""

    name: ClassVar[str] = "starts_with"
    answer_columns: ClassVar[tuple[str, ...]] = ("letter",)

    letter: str = "a"
    unjudged: str = "-"

    def prompts(self, n: int, *, split: Split = "train", seed: int = 0) -> Dataset:
        texts = ["".join(letters) for letters in itertools.product(ALPHABET, repeat=2)]
        return Dataset.from_dict({"prompt": texts[:n], "letter": [self.letter] * n})

    def score(self, completion: str, row: Mapping[str, Any]) -> float | None:
        return None if completion.startswith(self.unjudged) else float(completion.startswith(row["letter"]))


def lively_model(task_alphabet: str = ALPHABET, *, seed: int = 0) -> tuple[Any, PreTrainedTokenizerBase]:
    """A random model whose distributions are far from uniform."""
    tokenizer = tiny_tokenizer(task_alphabet)
    model = tiny_causal_lm(tokenizer, hidden=16, heads=2, layers=1, seed=seed)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 10
    return model, tokenizer


def first_token_probs(model: Any, tokenizer: Any, prompt: str, *, temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].double()
    return torch.softmax(logits / temperature, dim=-1)


class TestPassAtK:
    @pytest.mark.parametrize(
        ("samples", "correct", "k"), [(8, 3, 1), (8, 3, 4), (5, 5, 5), (5, 0, 3), (6, 4, 3), (6, 1, 6)]
    )
    def test_is_the_share_of_subsets_that_hold_a_correct_sample(self, samples: int, correct: int, k: int) -> None:
        outcomes = [index < correct for index in range(samples)]
        subsets = list(itertools.combinations(outcomes, k))
        assert pass_at_k(samples=samples, correct=correct, k=k) == pytest.approx(sum(map(any, subsets)) / len(subsets))

    @pytest.mark.parametrize("k", [1, 2, 3, 6])
    def test_is_unbiased(self, k: int) -> None:
        samples, p = 6, 0.3
        expected = sum(
            math.comb(samples, correct)
            * p**correct
            * (1 - p) ** (samples - correct)
            * pass_at_k(samples=samples, correct=correct, k=k)
            for correct in range(samples + 1)
        )
        assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


class TestStandardError:
    def test_of_a_plain_mean(self) -> None:
        values = [0.0, 1.0, 0.5, 0.25]
        estimate = _ratio(values, [1] * 4)
        sample = torch.tensor(values, dtype=torch.float64)
        assert estimate.mean == pytest.approx(sample.mean().item())
        assert estimate.se == pytest.approx((sample.std() / 2).item())

    def test_of_a_ratio_covers_the_truth(self) -> None:
        generator = torch.Generator().manual_seed(0)
        covered = 0
        for _ in range(400):
            size = torch.randint(1, 8, (60,), generator=generator)
            total = size * 0.5 + size.double().sqrt() * torch.randn(60, generator=generator)
            estimate = _ratio(total.tolist(), size.tolist())
            covered += abs(estimate.mean - 0.5) <= 1.96 * estimate.se
        assert 0.90 <= covered / 400 <= 0.98

    def test_of_one_prompt_is_unknown(self) -> None:
        estimate = _ratio([0.5], [1])
        assert estimate.mean == 0.5
        assert math.isnan(estimate.se)


class TestEstimates:
    def test_pass_rates_and_rewards_agree_with_the_exact_probabilities(self) -> None:
        model, tokenizer = lively_model()
        task = StartsWith()
        found = evaluate(model, tokenizer, task, task.prompts(16), samples=256, ks=(1, 3), max_new_tokens=2)

        letter = tokenizer.convert_tokens_to_ids("a")
        exact = [first_token_probs(model, tokenizer, prompt)[letter].item() for prompt in task.prompts(16)["prompt"]]
        for k in (1, 3):
            truth = sum(1 - (1 - p) ** k for p in exact) / 16
            noise = (sum(k**2 * p * (1 - p) for p in exact) / 256) ** 0.5 / 16
            assert abs(found.pass_at[k].mean - truth) <= 4 * noise
        assert found.reward == found.pass_at[1]
        assert (found.prompts, found.samples, found.unscored) == (16, 256, 0)

    @pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
    def test_the_entropy_of_the_first_token_is_exact(self, temperature: float) -> None:
        model, tokenizer = lively_model()
        task = StartsWith()
        found = evaluate(model, tokenizer, task, task.prompts(6), temperature=temperature, max_new_tokens=1)
        exact = [
            torch.special.entr(first_token_probs(model, tokenizer, prompt, temperature=temperature)).sum().item()
            for prompt in task.prompts(6)["prompt"]
        ]
        assert found.entropy.mean == pytest.approx(sum(exact) / 6, rel=1e-4)
        assert found.entropy.se == pytest.approx(torch.tensor(exact).std().item() / 6**0.5, rel=1e-3)
        assert found.length.mean == 1.0

    def test_every_token_has_the_entropy_of_a_plain_forward_pass(self) -> None:
        model, tokenizer = lively_model()
        prompts, temperature = ["ab", "cdab", "a"], 0.7
        sampling = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            top_k=0,
            num_return_sequences=4,
            max_new_tokens=6,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        with isolated_rng(0):
            ids, entropies = _sample(model, tokenizer, prompts, sampling)
        assert ids.shape == entropies.shape == (12, ids.shape[1])

        compared = 0
        for row, (completion, entropy) in enumerate(zip(ids.tolist(), entropies, strict=True)):
            prompt_ids = tokenizer(prompts[row // 4])["input_ids"]
            end = (
                completion.index(tokenizer.eos_token_id) + 1
                if tokenizer.eos_token_id in completion
                else len(completion)
            )
            with torch.no_grad():
                logits = model(torch.tensor([prompt_ids + completion[:end]])).logits[0, len(prompt_ids) - 1 : -1]
            exact = torch.special.entr(torch.softmax(logits / temperature, dim=-1)).sum(dim=-1)
            torch.testing.assert_close(entropy[:end], exact, atol=1e-5, rtol=1e-4)
            compared += end
        assert compared > 20

    def test_the_length_counts_up_to_the_end_of_sequence(self) -> None:
        model, tokenizer = lively_model()
        task = StartsWith()
        ending = first_token_probs(model, tokenizer, "ab")[tokenizer.eos_token_id].item()
        found = evaluate(model, tokenizer, task, task.prompts(2).select([1]), samples=512, ks=(1,), max_new_tokens=2)
        assert 0.01 < ending < 0.99
        assert abs(found.length.mean - (2 - ending)) <= 4 * (ending * (1 - ending) / 512) ** 0.5

    def test_completions_that_cannot_be_judged_are_counted_and_left_out(self) -> None:
        model, tokenizer = lively_model()
        task = StartsWith(letter="a", unjudged="b")
        prompts = task.prompts(16)
        found = evaluate(model, tokenizer, task, prompts, samples=32, ks=(1, 32), max_new_tokens=1)
        everything = evaluate(model, tokenizer, StartsWith(letter="a"), prompts, samples=32, ks=(1,), max_new_tokens=1)

        assert 0 < found.unscored < 16 * 32
        correct = everything.reward.mean * 16 * 32
        assert found.reward.mean == pytest.approx(correct / (16 * 32 - found.unscored))
        assert found.entropy == everything.entropy

    def test_nothing_judged_gives_no_number(self) -> None:
        model, tokenizer = lively_model()
        task = StartsWith(unjudged="")
        found = evaluate(model, tokenizer, task, task.prompts(2), samples=4, ks=(1, 4), max_new_tokens=1)
        assert found.unscored == 8
        assert math.isnan(found.reward.mean)
        assert math.isnan(found.pass_at[4].mean)
        assert found.examples[0].reward is None

    def test_examples_belong_together(self) -> None:
        model, tokenizer = lively_model()
        task = StartsWith()
        found = evaluate(model, tokenizer, task, task.prompts(16), max_new_tokens=3)
        assert [example.prompt for example in found.examples] == task.prompts(16)["prompt"][:8]
        for example in found.examples:
            assert example.reward == float(example.completion.startswith("a"))
            assert set(example.completion) <= set(ALPHABET)

    def test_it_can_be_written_as_json(self) -> None:
        model, tokenizer = lively_model()
        task = StartsWith()
        found = evaluate(model, tokenizer, task, task.prompts(3), max_new_tokens=3)
        assert json.loads(json.dumps(asdict(found)))["pass_at"]["8"]["mean"] == found.pass_at[8].mean


class TestIsolation:
    def test_neither_random_state_nor_mode_nor_weights_nor_gradients_change(self) -> None:
        model, tokenizer = lively_model()
        model.train()
        model.model.norm.weight.grad = torch.ones(16)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        config = model.generation_config.to_dict()
        torch.manual_seed(5)
        state = torch.get_rng_state()

        task = StartsWith()
        evaluate(model, tokenizer, task, task.prompts(4), max_new_tokens=3)

        assert torch.equal(torch.get_rng_state(), state)
        assert model.training
        assert all(map(torch.equal, before, model.parameters()))
        assert torch.equal(model.model.norm.weight.grad, torch.ones(16))
        assert model.generation_config.to_dict() == config

    def test_the_seed_alone_decides(self) -> None:
        model, tokenizer = lively_model()
        task = StartsWith()

        def run(seed: int) -> Any:
            return evaluate(model, tokenizer, task, task.prompts(4), max_new_tokens=3, seed=seed)

        first = run(1)
        torch.rand(3)
        assert run(1) == first
        assert run(2) != first

    def test_the_sampling_defaults_of_the_model_are_not_used(self) -> None:
        model, tokenizer = lively_model()
        task = StartsWith()
        plain = evaluate(model, tokenizer, task, task.prompts(4), max_new_tokens=4)
        model.generation_config.update(top_k=1, top_p=0.1, repetition_penalty=5.0, temperature=0.1)
        assert evaluate(model, tokenizer, task, task.prompts(4), max_new_tokens=4) == plain

    @pytest.mark.parametrize("batch_size", [1, 8, 20, 1000])
    def test_any_batch_size_covers_all_prompts_in_order(self, batch_size: int) -> None:
        model, tokenizer = lively_model()
        task = StartsWith()
        found = evaluate(model, tokenizer, task, task.prompts(7), samples=8, max_new_tokens=1, batch_size=batch_size)
        whole = evaluate(model, tokenizer, task, task.prompts(7), samples=8, max_new_tokens=1)
        assert [example.prompt for example in found.examples] == task.prompts(7)["prompt"][:]
        assert found.entropy.mean == pytest.approx(whole.entropy.mean, rel=1e-5)


def test_conversational_prompts_go_through_the_chat_template() -> None:
    model, tokenizer = lively_model()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}b{% endif %}"
    task = StartsWith()
    texts = ["a", "ccd"]
    plain = Dataset.from_dict({"prompt": [text + "b" for text in texts], "letter": ["a", "a"]})
    chats = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in texts], "letter": ["a", "a"]})
    expected = evaluate(model, tokenizer, task, plain, max_new_tokens=4)
    found = evaluate(model, tokenizer, task, chats, max_new_tokens=4)
    assert found.reward == expected.reward
    assert found.entropy == expected.entropy
    assert [example.completion for example in found.examples] == [example.completion for example in expected.examples]
    assert [example.prompt for example in found.examples] == texts


def test_adapters_take_part() -> None:
    model, tokenizer = lively_model()
    task = StartsWith()
    adapted = get_peft_model(model, LoraConfig(target_modules=["v_proj"], r=2))

    def entropy() -> float:
        return evaluate(adapted, tokenizer, task, task.prompts(4), max_new_tokens=1).entropy.mean

    with adapted.disable_adapter():
        plain = entropy()
    assert entropy() == pytest.approx(plain, rel=1e-5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1.0)
    assert abs(entropy() - plain) > 1e-3


@pytest.mark.parametrize("task", [SortDigits(), Countdown()], ids=repr)
def test_the_embedded_tasks_can_be_evaluated(task: SortDigits | Countdown) -> None:
    model, tokenizer = lively_model(task.alphabet)
    found = evaluate(model, tokenizer, task, task.prompts(5, split="test"), max_new_tokens=task.completion_length + 1)
    assert (found.prompts, found.unscored) == (5, 0)
    assert 0.0 < found.length.mean <= task.completion_length + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples 0; expected at least 1"),
        ({"samples": 4, "ks": (1, 8)}, r"ks \(1, 8\); expected each between 1 and samples \(4\)"),
        ({"temperature": 0.0}, r"temperature 0\.0; expected a positive number"),
        ({"max_new_tokens": 0}, "max_new_tokens 0; expected at least 1"),
    ],
)
def test_arguments_outside_their_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    model, tokenizer = lively_model()
    task = StartsWith()
    with pytest.raises(ConfigError, match=message):
        evaluate(model, tokenizer, task, task.prompts(2), **({"max_new_tokens": 1} | arguments))


def test_no_prompts_and_no_padding_token_are_refused() -> None:
    model, tokenizer = lively_model()
    task = StartsWith()
    with pytest.raises(ConfigError, match="prompts 0; expected at least one row"):
        evaluate(model, tokenizer, task, task.prompts(2).select([]), max_new_tokens=1)
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match="no padding token"):
        evaluate(model, tokenizer, task, task.prompts(2), max_new_tokens=1)
