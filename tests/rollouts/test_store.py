"""Rollouts come back from a file as they went, and a file is whole or not there."""

import dataclasses
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from two_processes import PROCESSES

from rlstab.errors import RecordError
from rlstab.rollouts import (
    KeptSets,
    Request,
    Rollout,
    Sampling,
    Timing,
    TransformersEngine,
    Turn,
    load_rollouts,
    save_rollouts,
)


def rollout(size: int = 3, prompt: int = 2, **fields: object) -> Rollout:
    logprobs = torch.linspace(-1, -2, size)
    logprobs[1:2] = torch.nan
    whole = Rollout(
        prompt_ids=torch.arange(prompt),
        token_ids=torch.arange(10, 10 + size),
        loss_mask=torch.arange(size) != 1,
        logprobs=logprobs,
        weight_versions=torch.full((size,), 2**40),
        turns=(Turn("policy", 0, size),),
        finish_reason="length",
        engine="a",
        timing=Timing(waiting=0.1, generating=1 / 3),
    )
    return dataclasses.replace(whole, **fields)  # type: ignore[arg-type]


PIXELS = torch.rand(4, 6)
VARIED = [
    rollout(),
    rollout(0, finish_reason="abort", turns=()),
    rollout(4, turns=(Turn("policy", 0, 1), Turn("tool", 1, 3), Turn("policy", 3, 4)), finish_reason="stop"),
    rollout(2, kept=KeptSets(torch.tensor([5, 6, 11]), torch.tensor([0, 3]))),
    rollout(3, 2, routed_experts=torch.arange(4 * 2 * 3, dtype=torch.uint8).reshape(4, 2, 3)),
    rollout(1, images=(torch.zeros(2, 3, 3, dtype=torch.uint8), torch.ones(1, 1, 1, dtype=torch.uint8))),
    rollout(1, features={"pixel_values": PIXELS, "grid": torch.tensor([[1, 2, 2]])}),
    rollout(5, features={"pixel_values": PIXELS}, engine='é "quoted"'),
]


def test_rollouts_of_every_kind_come_back_equal(tmp_path: Path) -> None:
    save_rollouts(tmp_path / "file.safetensors", VARIED)
    assert load_rollouts(tmp_path / "file.safetensors") == VARIED


def test_none_come_back_as_none(tmp_path: Path) -> None:
    save_rollouts(tmp_path / "file", [])
    assert load_rollouts(tmp_path / "file") == []


def test_what_an_engine_samples_comes_back_equal(
    tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    sampling = Sampling(max_new_tokens=9, top_k=3, truncation="renormalise")
    rollouts = TransformersEngine(model, tokenizer).generate([Request(prompt_ids=[4, 5])] * 5, sampling)
    save_rollouts(tmp_path / "file", rollouts)
    assert load_rollouts(tmp_path / "file") == rollouts


def test_a_shared_tensor_is_written_once(tmp_path: Path) -> None:
    image = torch.zeros(500, 500, 3, dtype=torch.uint8)
    save_rollouts(tmp_path / "file", [rollout(images=(image,)) for _ in range(8)])
    assert (tmp_path / "file").stat().st_size < 2 * image.numel()


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    for rollouts in (VARIED, VARIED[:1]):
        save_rollouts(tmp_path / "file", rollouts)
    assert load_rollouts(tmp_path / "file") == VARIED[:1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def write_on(path: Path, sizes: Connection) -> None:
    """Replace the file again and again by one whose size its tokens tell."""
    for size in range(1, 10**6):
        rollout = Rollout(
            prompt_ids=torch.arange(40_000 + size),
            token_ids=torch.arange(size),
            loss_mask=torch.ones(size, dtype=torch.bool),
            logprobs=torch.zeros(size),
            weight_versions=torch.zeros(size, dtype=torch.int64),
            engine="",
            turns=(Turn("policy", 0, size),),
            finish_reason="stop",
            timing=Timing(waiting=0, generating=0),
        )
        save_rollouts(path, [rollout])
        sizes.send(size)


@pytest.mark.parametrize("seed", range(2))
def test_a_kill_leaves_a_whole_file(tmp_path: Path, seed: int) -> None:
    """A writer that never stops is killed: what stands there is the work of one call."""
    sizes, sender = PROCESSES.Pipe(duplex=False)
    writer = PROCESSES.Process(target=write_on, args=(tmp_path / "file", sender), daemon=True)
    writer.start()
    sender.close()
    while sizes.recv() < 20 + 7 * seed:
        pass
    time.sleep(0.0004 * seed)
    writer.kill()
    writer.join()
    (found,) = load_rollouts(tmp_path / "file")
    assert len(found.token_ids) >= 20 + 7 * seed
    assert found.prompt_ids.tolist() == list(range(40_000 + len(found.token_ids)))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(RecordError, match="cannot read rollouts"):
        load_rollouts(tmp_path / "absent")
    (tmp_path / "text").write_text("no tensors here")
    with pytest.raises(RecordError, match="cannot read rollouts"):
        load_rollouts(tmp_path / "text")
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(RecordError, match="holds no rollouts"):
        load_rollouts(tmp_path / "weights")


@pytest.mark.parametrize(
    "entries",
    [
        "[",
        '{"a": 1}',
        '[{"tokens": 3}]',
        '[{"tokens": 2, "prompt_tokens": 2}]',
        '[{"tokens": "3", "prompt_tokens": 2}]',
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, entries: str) -> None:
    from safetensors.torch import load_file, save_file

    save_rollouts(tmp_path / "file", [rollout()])
    tensors = load_file(tmp_path / "file")
    save_file(tensors, tmp_path / "file", {"format": "rlstab.rollouts/1", "rollouts": entries})
    with pytest.raises(RecordError, match="damaged"):
        load_rollouts(tmp_path / "file")


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    save_rollouts(tmp_path / "file", VARIED)
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content[:-5])
    with pytest.raises(RecordError, match="cannot read rollouts"):
        load_rollouts(tmp_path / "file")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot write rollouts to"):
        save_rollouts(tmp_path / "none" / "file", VARIED)
