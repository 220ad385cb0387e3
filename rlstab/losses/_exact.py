"""Divergences summed over the whole vocabulary, with their gradient in closed form."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlstab.batch import ExactDivergence, Generator, Requirement, TokenBatch
from rlstab.errors import MissingFieldError, ShapeError
from rlstab.losses._checks import check_positive
from rlstab.losses._divergence import at_least_float32, exact_metrics
from rlstab.losses._parts import part_name
from rlstab.losses._term import Loss, Term

ELEMENTS_AT_ONCE = 2**24


@torch.no_grad()
def exact_kl(
    logits: Float[Tensor, "*shape V"], ref_logits: Float[Tensor, "*shape V"], *, temperature: float = 1.0
) -> Float[Tensor, "*shape"]:
    r"""$\mathrm{KL}(\pi \Vert \text{ref})$ at each position, summed over the vocabulary, as a number without gradient.

    Works through the positions in portions, so that beside the logits only a few arrays of 16 million numbers are
    held. Tokens with $\pi = 0$ and $\text{ref} = 0$ count 0; one with $\pi > 0$ and $\text{ref} = 0$ makes the
    divergence $+\infty$. Half precision is raised to float32.

    Args:
        logits: logits of the policy.
        ref_logits: logits of the reference over the same vocabulary.
        temperature: divisor of both logits.

    Returns:
        Nats per position.

    Raises:
        ConfigError: if the temperature is not positive.
        ShapeError: if the two have different shapes.

    >>> policy, reference = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> exact_kl(policy, reference)  # log(2) / 2 + log(2 / 3) / 2
    tensor([0.1438])
    """
    _check(logits, ref_logits, temperature)
    vocabulary = logits.shape[-1]
    ours, theirs = logits.reshape(-1, vocabulary), ref_logits.reshape(-1, vocabulary)
    values = torch.empty_like(at_least_float32(ours[:, 0]))
    for part in _portions(len(ours), vocabulary):
        values[part] = _kl(_log_probs(ours[part], temperature), _log_probs(theirs[part], temperature))
    return values.reshape(logits.shape[:-1])


def _portions(rows: int, vocabulary: int) -> list[slice]:
    """Slices of the rows in which intermediate arrays stay small."""
    at_once = max(1, ELEMENTS_AT_ONCE // vocabulary)
    return [slice(start, start + at_once) for start in range(0, rows, at_once)]


def _kl(logp: Float[Tensor, "N V"], ref_logp: Float[Tensor, "N V"]) -> Float[Tensor, "N"]:
    """The sum of `π a - π + ref`, which rounding of the normalisers changes in second order only."""
    a, p, ref = logp - ref_logp, logp.exp(), ref_logp.exp()
    summand = torch.where(a > -1, p * (torch.expm1(-a) + a), ref - p + p * a)
    return torch.where(p > 0, summand, ref).sum(-1)


def exact_divergence(
    generator: Generator,
    logits: Float[Tensor, "*shape V"],
    ref_logits: Float[Tensor, "*shape V"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*shape"]:
    r"""The divergence of $\pi = \operatorname{softmax}(z/\tau)$ from the reference, summed over the vocabulary.

    $$D = \sum_v \text{ref}_v f(u_v), \qquad
    \frac{\partial D}{\partial z_v} = \frac{\pi_v}{\tau} \left( f'(u_v) - E_\pi f'(u) \right)$$

    The gradient has this closed form, computed with the value: it is finite where entries underflow, are exactly 0 or
    exceed the dtype (there it is held at a large number and the value is `+inf`). The reference has none. Beside the
    log-probs and the gradient only a few arrays of 16 million numbers are held.

    Args:
        generator: a divergence such as `JensenShannon()`; only its parameters count.
        logits: $z$, logits of the policy.
        ref_logits: logits of the reference over the same vocabulary.
        temperature: $\tau$, divisor of both logits.

    Returns:
        The divergence per position; half precision is raised to float32.

    Raises:
        ConfigError: if the temperature is not positive.
        ShapeError: if the two have different shapes.

    >>> from rlstab.losses import ReverseKL
    >>> logits, reference = torch.tensor([[0.5, 0.5]]).log().requires_grad_(), torch.tensor([[0.25, 0.75]]).log()
    >>> value = exact_divergence(ReverseKL(), logits, reference)
    >>> value.sum().backward(); value.detach(), logits.grad  # 1/4 (log 2 - log 2/3) and minus that
    (tensor([0.1438]), tensor([[ 0.2747, -0.2747]]))
    """
    _check(logits, ref_logits, temperature)
    log_probs, ref_log_probs = (_log_probs(z.detach(), temperature) for z in (logits, ref_logits))
    return _with_gradient(generator, logits, log_probs, ref_log_probs, temperature)


def exact_statistics(
    requirements: Iterable[Requirement],
    logits: Float[Tensor, "*shape V"],
    ref_logits: Mapping[str, Float[Tensor, "*shape V"]],
    *,
    temperature: float = 1.0,
) -> dict[str, Float[Tensor, "*shape"]]:
    """Every exact divergence among the requirements, by its key, as `TokenBatch.vocab` wants them.

    The policy is normalised once, and each reference once.

    Args:
        requirements: requirements; those that are no `ExactDivergence` are passed over.
        logits: logits of the policy.
        ref_logits: logits of the references, by source.
        temperature: divisor of all logits.

    Returns:
        Divergences per position, with gradient in `logits` (see `exact_divergence`).

    Raises:
        ConfigError: if the temperature is not positive.
        MissingFieldError: if a source has no logits.
        ShapeError: if a reference has another shape than the policy.

    >>> from rlstab.losses import Hellinger
    >>> logits = torch.tensor([[0.5, 0.5]]).log()
    >>> exact_statistics(Hellinger(form="exact").requires, logits, {"initial": logits})
    {'hellinger() from initial': tensor([0.])}
    """
    by_key = {need.key: need for need in requirements if isinstance(need, ExactDivergence)}
    if not by_key:
        return {}
    missing = sorted({need.source for need in by_key.values()} - set(ref_logits))
    if missing:
        raise MissingFieldError(f"exact divergences need logits of {missing}, got those of {sorted(ref_logits)}")
    sources = {need.source: ref_logits[need.source].detach() for need in by_key.values()}
    for reference in sources.values():
        _check(logits, reference, temperature)
    log_probs = _log_probs(logits.detach(), temperature)
    references = {source: _log_probs(reference, temperature) for source, reference in sources.items()}
    return {
        key: _with_gradient(by_key[key].generator, logits, log_probs, references[by_key[key].source], temperature)
        for key in sorted(by_key)
    }


def _with_gradient(generator: Generator, logits: Tensor, logp: Tensor, ref_logp: Tensor, temperature: float) -> Tensor:
    value: Tensor = _Exact.apply(logits, logp, ref_logp, generator, temperature)  # type: ignore[no-untyped-call]
    return value


def _check(logits: Tensor, ref_logits: Tensor, temperature: float) -> None:
    check_positive("temperature", temperature)
    if logits.shape != ref_logits.shape:
        raise ShapeError(f"ref_logits: expected the shape of logits {list(logits.shape)}, got {list(ref_logits.shape)}")


def _log_probs(logits: Float[Tensor, "*shape V"], temperature: float) -> Float[Tensor, "*shape V"]:
    return (at_least_float32(logits) / temperature).log_softmax(-1)


class _Exact(torch.autograd.Function):
    """A divergence whose gradient in the logits was found along with its value."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, logp: Tensor, ref_logp: Tensor, generator: Generator, temperature: float
    ) -> Tensor:
        vocabulary = logits.shape[-1]
        ours, theirs = logp.reshape(-1, vocabulary), ref_logp.reshape(-1, vocabulary)
        values = torch.empty_like(ours[:, 0])
        gradient = torch.empty_like(ours, dtype=logits.dtype) if ctx.needs_input_grad[0] else None
        for part in _portions(len(ours), vocabulary):
            values[part], slope = generator.over_vocabulary(ours[part], theirs[part])
            if gradient is not None:
                gradient[part] = _logit_gradient(ours[part], slope, temperature, logits.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient.reshape(logits.shape))
        return values.reshape(logits.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (per_logit,) = ctx.saved_tensors
        return (grad.unsqueeze(-1) * per_logit).to(per_logit.dtype), None, None, None, None


def _logit_gradient(
    logp: Float[Tensor, "*shape V"], slope: Float[Tensor, "*shape V"], temperature: float, dtype: torch.dtype
) -> Float[Tensor, "*shape V"]:
    """The gradient in the logits from that in the log-probs; entries are bounded so that their sum is finite."""
    bound = torch.finfo(slope.dtype).max / (4 * slope.shape[-1])
    slope = slope.clamp(-bound, bound)
    gradient = (slope - logp.exp() * slope.sum(-1, keepdim=True)) / temperature
    limit = torch.finfo(dtype).max
    return gradient.clamp(-limit, limit).to(dtype)


@dataclass(frozen=True, kw_only=True)
class CauchySchwarz(Term):
    r"""The Cauchy-Schwarz divergence $\log \sum \text{ref}^2 + \log \sum \pi^2 - 2 \log \sum \text{ref} \cdot \pi$.

    No f-divergence: it has no estimate from single tokens, and always sums over the vocabulary. Target: token, the
    divergence of next-token distributions at the prefixes that were sampled.

    Args:
        coef: coefficient, a number or a controller.
        mean: how the loss becomes a number.
        rows: which rows the term acts on.
        reference: source of the reference policy.

    Metrics: `value`, its token mean; `overflow`, at how many positions it is infinite: no token has probability under
    both.

    >>> policy, reference = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    >>> exact_divergence(CauchySchwarz(), policy, reference)  # log 1 + log 1/2 - 2 log 1/2
    tensor([0.6931])
    """

    reference: str = "initial"

    _exact_key = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_exact_key", ExactDivergence(self, self.reference).key)

    @property
    def name(self) -> str:
        """The name of the divergence."""
        return f"{part_name(self)}()"

    @property
    def _exact(self) -> ExactDivergence:
        return ExactDivergence(CauchySchwarz(), self.reference)

    @property
    def requires(self) -> frozenset[Requirement]:
        """The divergence over the vocabulary."""
        return super().requires | {self._exact}

    def loss(self, batch: TokenBatch) -> Loss:
        """The divergence per token."""
        divergence = batch.statistic(self._exact_key)
        return Loss(divergence, exact_metrics(divergence, batch.loss_mask))

    @torch.no_grad()
    def over_vocabulary(
        self, logp: Float[Tensor, "*shape V"], ref_logp: Float[Tensor, "*shape V"]
    ) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape V"]]:
        r"""The divergence, and $2 \pi_v (\pi_v / \sum \pi^2 - \text{ref}_v / \sum \text{ref} \cdot \pi)$."""
        squares, ref_squares = (2 * logp).logsumexp(-1), (2 * ref_logp).logsumexp(-1)
        product = (logp + ref_logp).logsumexp(-1)
        shared = torch.where(product == -torch.inf, 0.0, product)  # no common token: the product has no gradient
        slope = 2 * (torch.exp(2 * logp - squares.unsqueeze(-1)) - torch.exp(logp + ref_logp - shared.unsqueeze(-1)))
        return squares + ref_squares - 2 * product, slope
