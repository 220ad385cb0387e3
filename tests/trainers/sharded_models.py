"""Exact divergences of models that FSDP2 has sharded over two processes, beside those of whole models."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from equality import ALPHABET
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlstab.batch import ExactDivergence
from rlstab.losses import JensenShannon, ReverseKL
from rlstab.models import tiny_tokenizer
from rlstab.trainers._exact_pass import Statistics, Streaming
from rlstab.trainers._guard import restore, take
from rlstab.trainers._weights import Copies

DIVERGENCES = tuple(ExactDivergence(generator, "initial") for generator in (ReverseKL(), JensenShannon()))
STREAMING = Streaming(temperature=0.8)
ROWS, LENGTH = 2, 7
HEADS = {"tied": True, "untied": False}


def model_of(seed: int, *, tied: bool) -> Any:
    """A policy or a reference; a vocabulary of odd size does not split evenly."""
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    size["num_key_value_heads"] = 2
    return Qwen2ForCausalLM(
        Qwen2Config(**dict[str, Any]({"vocab_size": len(tiny_tokenizer(ALPHABET)), **size}), tie_word_embeddings=tied)
    ).eval()


def sharded(model: Any, mesh: Any) -> Any:
    """As the trainer does it: each block on its own, then the rest."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    for block in base.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def rows_of(rank: int) -> tuple[Tensor, Tensor]:
    """Ids of a rank and their labels."""
    ids = torch.randint(3, 17, (ROWS, LENGTH), generator=torch.Generator().manual_seed(rank))
    labels = ids.clone()
    labels[:, :3] = -100
    return ids, labels


def loss_of(policy: Any, reference: Any, rank: int, *, adapter: bool = False) -> Tensor:
    """A sum of everything that the pass returns."""
    ids, labels = rows_of(rank)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    accelerator: Any = Accelerator(cpu=True)
    if adapter:
        with policy.disable_adapter():
            states = STREAMING.states(policy, accelerator, inputs, labels)
    else:
        states = STREAMING.states(reference, accelerator, inputs, labels)
    found = policy(within=Statistics(STREAMING, DIVERGENCES, {"initial": states}), labels=labels, **inputs)
    return torch.stack([weight * value.sum() for weight, value in enumerate(found.values(), start=1)]).sum()


def gradients(model: Any) -> dict[str, Tensor]:
    """Whole, whatever is sharded."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def pair(*, tied: bool) -> tuple[Any, Any]:
    """Policy and reference, ready for streaming."""
    models = model_of(0, tied=tied), model_of(1, tied=tied)
    for model in models:
        STREAMING.attach(model)
    return models


def adapted() -> Any:
    """A policy with an adapter that does not start at zero; what is compared with is the policy without it."""
    policy = pair(tied=True)[0]
    torch.manual_seed(3)
    return get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def alone(make: Any, *, adapter: bool = False) -> dict[str, Tensor]:
    """The mean gradient of both ranks' losses, by one process."""
    policy, reference = make()
    torch.stack([loss_of(policy, reference, rank, adapter=adapter) for rank in (0, 1)]).mean().backward()
    return gradients(policy)


def sharded_gradients() -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The gradients of a policy, by two processes and by one."""
    rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (2,))
    results = {}
    for name, tied in HEADS.items():
        policy, reference = (sharded(model, mesh) for model in pair(tied=tied))
        loss_of(policy, reference, rank).backward()
        results[name] = gradients(policy), alone(lambda tied=tied: pair(tied=tied))
    policy = sharded(adapted(), mesh)
    loss_of(policy, None, rank, adapter=True).backward()
    results["adapter"] = gradients(policy), alone(lambda: (adapted(), None), adapter=True)
    return results


def restored_shards() -> dict[str, Any]:
    """Losses after a snapshot of sharded weights and moments, and again after going back to it."""
    rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (2,))
    model = sharded(model_of(0, tied=False), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    copies = Copies(model, optimizer)

    def steps(count: int) -> list[float]:
        losses = []
        for _ in range(count):
            ids = torch.randint(3, 17, (ROWS, LENGTH))
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    torch.manual_seed(rank)
    steps(2)
    snapshot = take(2, copies, optimizer, scheduler, {})
    places = [parameter.to_local().data_ptr() for parameter in model.parameters()]
    expected = steps(3)
    steps(1)
    restore(snapshot, copies, optimizer, scheduler)
    again = steps(3)
    stayed = places == [parameter.to_local().data_ptr() for parameter in model.parameters()]
    held = sum(t.numel() for name, t in snapshot.tensors.items() if name.startswith("weights/"))
    return {"losses": (again, expected), "stayed": stayed, "share": held / sum(p.numel() for p in model.parameters())}
