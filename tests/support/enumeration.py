"""Every token and every sequence of a small world, so that expectations are sums and proofs are exact."""

from collections.abc import Callable, Mapping
from itertools import product

import torch
from torch import Tensor

from rlstab.batch import TokenBatch
from rlstab.losses import Term

SOURCES = ("policy", "old", "sampler", "initial")
Generator = Callable[[Tensor], Tensor]


def policies(*shape: int, seed: int = 0, distance: float = 0.8) -> dict[str, Tensor]:
    """Logits of four different policies by source; that of `policy` asks for gradient."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(*shape, generator=generator, dtype=torch.float64)
    logits = {
        source: centre + distance * torch.randn(*shape, generator=generator, dtype=torch.float64) for source in SOURCES
    }
    logits["policy"].requires_grad_()
    return logits


class Tokens:
    """All tokens of one distribution as the rows of a batch, one token each."""

    def __init__(self, vocabulary: int = 7, *, seed: int = 0) -> None:
        self.logits = policies(vocabulary, seed=seed)

    @property
    def rows(self) -> dict[str, Tensor]:
        """Log-probs `[rows, 1]` of each row's token, by source."""
        return {source: logits.log_softmax(-1).unsqueeze(-1) for source, logits in self.logits.items()}

    def divergence(self, f: Generator) -> Tensor:
        """`Σ ref f(π/ref)` for `f` as a function of u."""
        return divergence(f, self.rows["policy"][:, 0], self.rows["initial"][:, 0])


class Sequences:
    """All sequences of a small autoregressive policy as the rows of a batch."""

    def __init__(self, length: int = 3, vocabulary: int = 3, *, seed: int = 0) -> None:
        self.length, self.vocabulary = length, vocabulary
        prefixes = [prefix for n in range(length) for prefix in product(range(vocabulary), repeat=n)]
        self.prefixes = {prefix: index for index, prefix in enumerate(prefixes)}
        self.logits = policies(len(prefixes), vocabulary, seed=seed)
        self.sequences = list(product(range(vocabulary), repeat=length))
        self.visited = torch.tensor([[self.prefixes[y[:t]] for t in range(length)] for y in self.sequences])
        self.tokens = torch.tensor(self.sequences)

    @property
    def rows(self) -> dict[str, Tensor]:
        """Log-probs `[rows, T]` of each sequence's tokens, by source."""
        return {source: logits.log_softmax(-1)[self.visited, self.tokens] for source, logits in self.logits.items()}

    def divergence(self, f: Generator) -> Tensor:
        """That between the distributions of whole sequences."""
        rows = self.rows
        return divergence(f, rows["policy"].sum(-1), rows["initial"].sum(-1))

    def prefix_probability(self, source: str) -> Tensor:
        """How likely `source` visits each prefix, without gradient."""
        conditional = self.logits[source].detach().softmax(-1)
        found = torch.ones(len(self.prefixes), dtype=torch.float64)
        for prefix, index in self.prefixes.items():
            for t, token in enumerate(prefix):
                found[index] *= conditional[self.prefixes[prefix[:t]], token]
        return found

    def local_divergence(self, f: Generator, source: str) -> Tensor:
        """The sum over tokens of the divergences of next tokens at the prefixes that `source` visits, as given."""
        policy, reference = (self.logits[name].log_softmax(-1) for name in ("policy", "initial"))
        at_prefix = (reference.exp() * f((policy - reference).exp())).sum(-1)
        return (self.prefix_probability(source) * at_prefix).sum()


def divergence(f: Generator, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """`Σ ref f(π/ref)` over the entries."""
    return (ref_logp.exp() * f((logp - ref_logp).exp())).sum()


def expectation(
    term: Term,
    world: Tokens | Sequences,
    *,
    drawn_by: str,
    recorded: tuple[str, ...] = SOURCES,
    vocab: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The mean of a term's loss over rows drawn by `drawn_by`; tokens of a row are added up."""
    rows = world.rows
    batch = TokenBatch(
        mask=torch.ones_like(rows["policy"], dtype=torch.bool),
        logps={source: rows[source] for source in recorded},
        vocab=vocab or {},
    )
    loss = term.loss(batch).values
    probability = rows[drawn_by].detach().sum(-1).exp()
    return (probability * (loss.sum(-1) if loss.dim() == 2 else loss)).sum()


def gradient(value: Tensor, world: Tokens | Sequences) -> Tensor:
    """The gradient in the logits of the policy."""
    leaf = [world.logits["policy"]]
    (found,) = torch.autograd.grad(value, leaf, retain_graph=True, materialize_grads=True, allow_unused=True)
    return found


def relative(error: Tensor, truth: Tensor) -> float:
    """The size of an error as a share of the truth's."""
    return float(error.detach().norm() / truth.detach().norm())


def assert_exact(found: Tensor, truth: Tensor) -> None:
    """Equal to 1e-10 in float64."""
    assert found.dtype == truth.dtype == torch.float64
    torch.testing.assert_close(found, truth, atol=1e-10, rtol=0.0)
