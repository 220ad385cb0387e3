"""Run by two processes with a rank and a file to meet in: shards have the norms and updates of whole tensors.

Prints `same`.
"""

import sys

import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from rlstab.optim import SPAM, StableSPAM, ZClip, global_norm


def main(rank: str, meeting: str) -> None:
    init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 3, generator=draw), torch.randn(4, generator=draw)]
    for optimizer in (StableSPAM, SPAM):
        whole = [torch.nn.Parameter(x.clone()) for x in start]
        shards = [torch.nn.Parameter(distribute_tensor(x.clone(), mesh, [Shard(0)])) for x in start]
        ours, theirs = optimizer(shards, lr=0.1), optimizer(whole, lr=0.1)
        clips = ZClip(warmup=2), ZClip(warmup=2)
        for step in range(30):
            for p, q in zip(whole, shards, strict=True):
                p.grad = torch.randn(p.shape, generator=draw) * (50.0 if step in (9, 25) else 1.0)
                q.grad = distribute_tensor(p.grad.clone(), mesh, [Shard(0)])
            assert abs(global_norm(whole) - global_norm(shards)) <= 1e-5 * global_norm(whole)
            a, b = clips[0].apply(whole), clips[1].apply(shards)
            assert (a.limit is None) == (b.limit is None)
            ours.step()
            theirs.step()
        for p, q in zip(whole, shards, strict=True):
            torch.testing.assert_close(q.full_tensor(), p.data)  # type: ignore[attr-defined]
            assert ours.state[q]["exp_avg"].shape == q.shape
    print("same", flush=True)
    destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
