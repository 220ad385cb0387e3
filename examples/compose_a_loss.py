"""Compose an objective from terms, add one of your own, and look at the loss, the gradient and the metrics.

python examples/compose_a_loss.py
"""

from dataclasses import dataclass

import torch

from rlstab.batch import LogProbs, TokenBatch
from rlstab.losses import ClippedSurrogate, JensenShannon, Loss, Objective, Term, TruncatedIS


@dataclass(frozen=True, kw_only=True)
class LengthPull(Term):
    """A term of your own: make tokens beyond a length less likely."""

    length: int

    @property
    def requires(self) -> frozenset[LogProbs]:
        """It reads the policy's log-probs and nothing else."""
        return frozenset({LogProbs("policy")})

    def loss(self, batch: TokenBatch) -> Loss:
        """The log-prob of every token that comes too late."""
        late = torch.arange(batch.shape[1]) >= self.length
        return Loss(batch.logp("policy") * late, metrics={})


def main() -> None:
    """Evaluate the objective on two made-up completions."""
    objective = Objective(
        policy=ClippedSurrogate(low=0.2, high=0.28, weights=[TruncatedIS(max=2.0)]).mean("token"),
        drift=0.05 * JensenShannon(reference="initial").mean("token"),
        length=0.01 * LengthPull(length=3),
    )
    print("needs:", ", ".join(sorted(str(need) for need in objective.requires)))

    policy = torch.tensor([[-0.6, -0.5, -0.9, -0.7], [-2.1, -0.3, -1.2, 0.0]], requires_grad=True)
    old = torch.tensor([[-0.7, -0.9, -0.2, -0.7], [-1.4, -0.7, -1.2, 0.0]])
    batch = TokenBatch(
        mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        advantages=torch.tensor([1.0, -1.0]),
        logps={"policy": policy, "old": old, "sampler": old + 0.05, "initial": old - 0.1},
    )
    loss, terms = objective(batch)
    loss.backward()
    print(f"loss {loss.item():.4f}")
    for name, report in terms.items():
        metrics = ", ".join(f"{key} {metric.value().item():.3g}" for key, metric in report.metrics.items())
        print(f"  {name:8s} {report.weight:g} x {report.loss.item():+.4f}   {metrics}")
    print("gradient of the log-probs:")
    print(policy.grad)


if __name__ == "__main__":
    main()
