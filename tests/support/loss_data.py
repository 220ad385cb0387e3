"""Data for losses, and batches that hold exactly what is required of them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlstab.batch import Column, ExactDivergence, LogProbs, Requirement, TokenBatch, VocabStat
from rlstab.losses import Needs, RolloutPart, StepStatistic, prepared_parts


@dataclass(frozen=True)
class Data:
    """Everything that can be asked for, before any of it is put into a batch."""

    mask: Tensor
    loss_mask: Tensor
    logps: dict[str, Tensor]
    vocab: dict[str, Tensor]
    columns: dict[str, Tensor]

    def to(self, dtype: torch.dtype) -> "Data":
        return replace(
            self,
            logps={name: value.to(dtype) for name, value in self.logps.items()},
            vocab={name: value.to(dtype) for name, value in self.vocab.items()},
        )

    def junk(self, value: float) -> "Data":
        """The same with `value` wherever nothing is trained on, and foreign ids where there is no token."""

        def fill(tensor: Tensor) -> Tensor:
            return torch.where(self.loss_mask, tensor, value)

        ids = torch.where(self.mask, self.columns["token_ids"], -(2**31))
        routed = torch.where(self.loss_mask[..., None, None], self.columns["router_log_ratios"], value)
        return replace(
            self,
            logps={name: fill(tensor) for name, tensor in self.logps.items()},
            vocab={name: fill(tensor) for name, tensor in self.vocab.items()},
            columns={**self.columns, "token_ids": ids, "router_log_ratios": routed},
        )

    def leaves(self) -> dict[str, Tensor]:
        """What gradient may flow to."""
        return {"policy": self.logps["policy"], **self.vocab}


def data_of(rows: int = 7, length: int = 6, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Data:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(2, length + 1, (rows, 1), generator=generator) if length > 2 else torch.tensor([[length]])
    mask = torch.arange(length) < lengths
    tool = (torch.arange(length) == 1) & (torch.arange(rows).unsqueeze(-1) % 3 == 1) & (lengths > 2)
    policy = -0.2 - 2 * torch.rand(rows, length, generator=generator, dtype=torch.float64)
    sources = ("old", "sampler", "initial", "moving")
    logps = {"policy": policy} | {source: (policy + 0.15 * noise(rows, length)).clamp(max=-0.01) for source in sources}
    columns = {
        "advantages": noise(rows),
        "rewards": noise(rows),
        "baseline": noise(rows),
        "group": torch.tensor([4, 9, 4, 9, 4, 2, 4])[:rows],
        "token_ids": torch.randint(0, 3, (rows, length), generator=generator),
        "truncated": torch.arange(rows) == 2,
    }
    moved = torch.Generator().manual_seed(seed + 1)
    columns["router_log_ratios"] = 0.2 * torch.randn(rows, length, 3, 2, generator=moved, dtype=torch.float64)
    columns = {name: value.to(dtype) if value.is_floating_point() else value for name, value in columns.items()}
    vocab = {
        name: 0.1 + torch.rand(rows, length, generator=generator, dtype=torch.float64)
        for name in ("entropy", "exact", "log_z")
    }
    return Data(mask, mask & ~tool, logps, vocab, columns).to(dtype)


def batch_with(requires: frozenset[Requirement], data: Data) -> TokenBatch:
    """A batch with what is required, for which rollout parts and step statistics have run on what they require."""
    left: dict[str, Tensor] = {}

    def holding(requires: frozenset[Requirement]) -> TokenBatch:
        unknown = {type(need) for need in requires} - {LogProbs, VocabStat, ExactDivergence, Column, Needs}
        assert not unknown, f"the contract test cannot supply {unknown}: teach it how"
        keys = {need.part.key for need in requires if isinstance(need, Needs)}
        columns = {need.name: data.columns[need.name] for need in requires if isinstance(need, Column)}
        return TokenBatch(
            mask=data.mask,
            loss_mask=data.loss_mask,
            logps={need.source: data.logps[need.source] for need in requires if isinstance(need, LogProbs)},
            vocab={need.name: data.vocab[need.name] for need in requires if isinstance(need, VocabStat)}
            | {need.key: data.vocab["exact"] for need in requires if isinstance(need, ExactDivergence)},
            parts={key: left[key] for key in keys},
            **columns,  # type: ignore[arg-type]
        )

    for kind in (RolloutPart, StepStatistic):
        for needed in prepared_parts(requires, kind):
            left[needed.key] = needed.compute(holding(needed.requires)).detach()
    return holding(requires)
