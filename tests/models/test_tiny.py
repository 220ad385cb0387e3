from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlstab.errors import ConfigError
from rlstab.models import tiny_causal_lm, tiny_moe, tiny_tokenizer

ALPHABET = "0123456789= +-\n"
TEXTS = ["31 = 13\n", "0", " +-= "]

build = pytest.mark.parametrize("build", [tiny_causal_lm, tiny_moe], ids=lambda build: build.__name__)
Build = Callable[..., Any]


class TestTokenizer:
    def test_one_token_per_character_and_exact_inverse(self) -> None:
        tokenizer = tiny_tokenizer(ALPHABET)
        assert len(tokenizer) == len(ALPHABET) + 3
        for text in TEXTS:
            ids = tokenizer(text)["input_ids"]
            assert ids == [ALPHABET.index(char) + 3 for char in text]
            assert (
                tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True)
                == text
            )

    def test_pads_on_the_left(self) -> None:
        batch = tiny_tokenizer(ALPHABET)(["12", "1"], padding=True)
        assert batch["input_ids"] == [[4, 5], [0, 4]]
        assert batch["attention_mask"] == [[1, 1], [0, 1]]

    def test_round_trip_through_a_folder(self, tmp_path: Path) -> None:
        tokenizer = tiny_tokenizer(ALPHABET, chat_template="{{ messages[0]['content'] }}=")
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)

        assert loaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
        assert [loaded.decode(ids) for ids in loaded(TEXTS)["input_ids"]] == TEXTS
        assert loaded.padding_side == "left"
        assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
        message = [{"role": "user", "content": "31"}]
        assert loaded.apply_chat_template(message, tokenize=False) == "31="

    def test_a_foreign_character_is_an_error(self) -> None:
        with pytest.raises(Exception, match="UNK"):
            tiny_tokenizer("01")("2")

    @pytest.mark.parametrize(("alphabet", "message"), [("", "is empty"), ("0120", "repeats '0'")])
    def test_refuses_an_unusable_alphabet(self, alphabet: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            tiny_tokenizer(alphabet)


class TestModels:
    @build
    def test_weights_depend_on_the_seed_alone(self, build: Build) -> None:
        tokenizer = tiny_tokenizer(ALPHABET)
        torch.manual_seed(5)
        first = build(tokenizer, seed=1).state_dict()
        torch.manual_seed(6)
        again, other = build(tokenizer, seed=1).state_dict(), build(tokenizer, seed=2).state_dict()

        assert all(torch.equal(first[key], again[key]) for key in first)
        assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])

    @build
    def test_the_global_random_state_is_untouched(self, build: Build) -> None:
        tokenizer = tiny_tokenizer(ALPHABET)
        state = torch.get_rng_state()
        build(tokenizer, seed=1)
        assert torch.equal(torch.get_rng_state(), state)

    @build
    def test_sizes(self, build: Build) -> None:
        model = build(tiny_tokenizer(ALPHABET), hidden=32, layers=3, heads=2, max_positions=40)
        config = model.config
        assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (len(ALPHABET) + 3, 32, 3)
        assert (config.num_attention_heads, config.max_position_embeddings) == (2, 40)
        assert not model.training

    @build
    def test_dtype_is_that_of_the_weights_and_keeps_rotary_frequencies(self, build: Build) -> None:
        tokenizer = tiny_tokenizer(ALPHABET)
        full, half = build(tokenizer), build(tokenizer, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
        assert half.config.dtype == half.dtype == torch.bfloat16
        assert {buffer.dtype for buffer in half.buffers()} == {torch.float32}
        for (name, weight), (_, rounded) in zip(full.named_parameters(), half.named_parameters(), strict=True):
            assert torch.equal(weight.bfloat16(), rounded), name
        assert half(torch.tensor([[3, 4, 5]])).logits.dtype == torch.bfloat16

    @build
    def test_round_trip_through_a_folder(self, build: Build, tmp_path: Path) -> None:
        model = build(tiny_tokenizer(ALPHABET), seed=4)
        ids = torch.tensor([[3, 4, 5, 6]])
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(ids).logits, model(ids).logits)

    @build
    def test_padding_does_not_change_generation(self, build: Build) -> None:
        tokenizer = tiny_tokenizer(ALPHABET)
        model = build(tokenizer)
        options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        alone = model.generate(**tokenizer("12", return_tensors="pt"), **options)
        padded = model.generate(**tokenizer(["12", "12345"], padding=True, return_tensors="pt"), **options)
        for alone_logits, padded_logits in zip(alone.logits, padded.logits, strict=False):
            torch.testing.assert_close(alone_logits[0], padded_logits[0], atol=1e-5, rtol=1e-4)

    def test_the_auxiliary_loss_is_there_and_has_its_coefficient(self) -> None:
        ids = torch.tensor([[3, 4, 5, 6]])

        def losses(coefficient: float) -> Any:
            model = tiny_moe(tiny_tokenizer(ALPHABET), aux_loss_coef=coefficient)
            assert model.config.num_local_experts == 8
            return model(ids, labels=ids, output_router_logits=True)

        without, with_it = losses(0.0), losses(0.5)
        assert with_it.aux_loss > 0
        torch.testing.assert_close(with_it.loss - without.loss, 0.5 * with_it.aux_loss)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"hidden": 0}, "hidden 0; expected at least 1"),
            ({"layers": -1}, "layers -1"),
            (
                {"hidden": 36, "heads": 4},
                "hidden 36 does not split into 4 heads of even width; expected a multiple of 8",
            ),
        ],
    )
    @build
    def test_refuses_impossible_sizes(self, build: Build, arguments: dict[str, int], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            build(tiny_tokenizer(ALPHABET), **arguments)

    def test_refuses_more_experts_per_token_than_experts(self) -> None:
        with pytest.raises(ConfigError, match="experts_per_token 5 with experts 4"):
            tiny_moe(tiny_tokenizer(ALPHABET), experts=4, experts_per_token=5)
