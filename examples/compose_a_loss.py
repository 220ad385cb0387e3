"""Compose an objective from terms, add one of your own, and look at the loss, the gradient and the metrics.

python examples/compose_a_loss.py
"""

from dataclasses import dataclass

import torch

from rlstab.batch import Requirement, TokenBatch, VocabStat
from rlstab.losses import ClippedSurrogate, JensenShannon, Loss, Objective, Term, TruncatedIS, token_mean


@dataclass(frozen=True, kw_only=True)
class EntropyFloor(Term):
    """A term of your own: push entropy up where it falls below a floor, in nats."""

    floor: float

    @property
    def requires(self) -> frozenset[Requirement]:
        return frozenset({VocabStat("entropy")})

    def loss(self, batch: TokenBatch) -> Loss:
        missing = (self.floor - batch.vocab["entropy"]).clamp(min=0)
        return Loss(missing, metrics={"below": token_mean((missing > 0).float(), batch.token_weight)})


def main() -> None:
    """Evaluate the objective on two made-up completions."""
    objective = Objective(
        policy=ClippedSurrogate(low=0.2, high=0.28, weights=[TruncatedIS(max=2.0)]).mean("token"),
        drift=0.05 * JensenShannon(reference="initial").mean("token"),
        floor=0.1 * EntropyFloor(floor=1.0),
    )
    print("needs:", ", ".join(sorted(str(need) for need in objective.requires)))

    logits = torch.normal(0.0, 2.0, (2, 4, 5), generator=torch.Generator().manual_seed(0)).requires_grad_()
    distribution = torch.distributions.Categorical(logits=logits)
    tokens = torch.tensor([[3, 1, 4, 1], [0, 2, 1, 0]])
    policy = distribution.log_prob(tokens)
    old = policy.detach() + torch.tensor([[-0.1, -0.4, 0.7, 0.0], [0.7, -0.4, 0.0, 0.0]])
    batch = TokenBatch(
        mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        advantages=torch.tensor([1.0, -1.0]),
        logps={"policy": policy, "old": old, "sampler": old + 0.05, "initial": old - 0.1},
        vocab={"entropy": distribution.entropy()},
    )
    loss, terms = objective(batch)
    loss.backward()
    print(f"loss {loss.item():.4f}")
    for name, report in terms.items():
        metrics = ", ".join(f"{key} {metric.value().item():.3g}" for key, metric in report.metrics.items())
        print(f"  {name:8s} {report.weight:g} x {report.loss.item():+.4f}   {metrics}")
    print("gradient of each token's logits, its norm:")
    print(torch.linalg.vector_norm(logits.grad, dim=-1))


if __name__ == "__main__":
    main()
