from pathlib import Path

import pytest
import torch

from rlstab.errors import ConfigError
from rlstab.models import tiny_causal_lm, tiny_tokenizer
from rlstab.recipes import LoRA, PretrainedModel, TinyModel
from rlstab.tasks import ExactAnswer, HubTask, SortDigits

TASK = SortDigits(digits=3)


def test_a_tiny_model_speaks_the_task() -> None:
    model, tokenizer = TinyModel(hidden=16, heads=2).load(TASK, seed=3)
    same = TinyModel(hidden=16, heads=2).load(TASK, seed=3).model
    other = TinyModel(hidden=16, heads=2).load(TASK, seed=4).model
    assert tokenizer.decode(tokenizer(f"{TASK.prompts(1)['prompt'][0]}")["input_ids"]) == TASK.prompts(1)["prompt"][0]
    first, second, third = (next(iter(found.parameters())) for found in (model, same, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_experts_make_a_mixture() -> None:
    model = TinyModel(hidden=16, heads=2, experts=4).load(TASK, seed=0).model
    assert model.config.num_experts == 4


def test_a_tiny_model_needs_an_embedded_task() -> None:
    with pytest.raises(ConfigError, match=r"not those of HubTask; use PretrainedModel"):
        TinyModel().load(HubTask(dataset="d", scorer=ExactAnswer()), seed=0)


def saved(folder: Path) -> Path:
    tokenizer = tiny_tokenizer(TASK.alphabet)
    tiny_causal_lm(tokenizer, hidden=16, heads=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_is_loaded_from_a_folder(tmp_path: Path) -> None:
    model, tokenizer = PretrainedModel(name=str(saved(tmp_path)), dtype="bfloat16").load(TASK, seed=0)
    assert model.dtype == torch.bfloat16
    assert tokenizer.padding_side == "left"


def test_weights_are_read_from_safetensors_only(tmp_path: Path) -> None:
    saved(tmp_path)
    model = PretrainedModel(name=str(tmp_path)).load(TASK, seed=0).model
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"^model: PretrainedModel.name='.*' cannot be loaded: .*safetensors"):
        PretrainedModel(name=str(tmp_path)).load(TASK, seed=0)


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model: PretrainedModel.name='.*nothing' cannot be loaded: ") as caught:
        PretrainedModel(name=str(tmp_path / "nothing")).load(TASK, seed=0)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    saved(tmp_path)
    tokenizer = tiny_tokenizer(TASK.alphabet)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert PretrainedModel(name=str(tmp_path)).load(TASK, seed=0).tokenizer.pad_token == "<eos>"


def test_lora_reaches_peft() -> None:
    config = LoRA(rank=4, alpha=8, dropout=0.1, targets=["q_proj"]).config()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.1)
    assert list(config.target_modules or []) == ["q_proj"]


@pytest.mark.parametrize(("change", "name"), [({"rank": 0}, "rank"), ({"dropout": 1.0}, "dropout")])
def test_lora_refuses(change: dict[str, float], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^LoRA.{name}: expected"):
        LoRA(**change)  # type: ignore[arg-type]
