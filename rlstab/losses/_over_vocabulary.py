"""Terms that compare whole next-token distributions and are no f-divergence, or the larger of two."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rlstab.batch import ExactDivergence, Requirement, TokenBatch, VocabStat
from rlstab.errors import ConfigError
from rlstab.losses._checks import check_positive, check_range
from rlstab.losses._controllers import Controller
from rlstab.losses._divergence import Divergence, exact_metrics
from rlstab.losses._divergences import AlphaDivergence, ForwardKL, ReverseKL
from rlstab.losses._metrics import Metric, masked_max, token_mean
from rlstab.losses._parts import part_name
from rlstab.losses._streamed_forms import Estimated, Form, Pair, form_of
from rlstab.losses._streamed_head import is_impossible
from rlstab.losses._term import Loss, Term

Slopes = tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape V"]]


@dataclass(frozen=True, kw_only=True)
class ClippedAlpha(Divergence):
    r"""The $\alpha$-divergence with AlphaNet's clip: $f' = (1 - \min(u^{-\alpha}, c)) / \alpha$, $f$ its integral.

    The importance factor $(\text{ref}/\pi)^\alpha$ of the gradient is held at $c$, so that no token pulls without
    bound. $f$ goes on as a straight line from there: still a divergence, with value and gradient that belong together.
    As in the released code, the clip does not act at $\alpha = 1$; nor can it at 0.

    Args:
        alpha: $\alpha$.
        clip: $c > 1$.

    Raises:
        ConfigError: unless `clip` is above 1.

    Reference: AlphaNet: Improved Training of Supernets with Alpha-Divergence, https://arxiv.org/abs/2102.07954

    >>> ClippedAlpha(alpha=-1.0, clip=5.0).df(torch.tensor([-50.0, 50.0]))  # 5 - 1 from the clip on
    tensor([-1.,  4.])
    """

    alpha: float = -1.0
    clip: float = 5.0

    _plain = AlphaDivergence()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 < self.clip < math.inf:
            raise ConfigError(f"ClippedAlpha.clip: expected a bound > 1, got {self.clip!r}")
        object.__setattr__(self, "_plain", AlphaDivergence(alpha=self.alpha))  # a compiled loss cannot build parts

    @property
    def _edge(self) -> float | None:
        """The log-ratio at which the clip begins to act."""
        return None if self.alpha in (0, 1) else -math.log(self.clip) / self.alpha

    def _inside(self, a: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        edge = self._edge
        if edge is None:
            return a
        return a.clamp(min=edge) if edge < 0 else a.clamp(max=edge)

    def df(self, a: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        r"""That of the $\alpha$-divergence, constant beyond the clip."""
        return self._plain.df(self._inside(a))

    def log_scaled_f(self, a: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        r"""That of the $\alpha$-divergence, and of the straight line beyond the clip."""
        inside = self._inside(a)
        near = self._plain.log_scaled_f(inside)
        # f(u) = f(edge) + (u - edge) f'(edge), over max(1, u)
        scale = (inside.relu() - a.relu()).exp()
        rise = (a.clamp(max=0).exp() - (inside - a.relu()).exp()) * self.df(inside)
        return torch.where(a == inside, near, torch.log(near.exp() * scale + rise))

    def log_scaled_df(self, a: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        r"""$\log (|f'(u)| \min(1, u))$."""
        inside = self._inside(a)
        near = self._plain.log_scaled_df(inside)
        return torch.where(a == inside, near, self.df(inside).abs().log() + a.clamp(max=0))


@dataclass(frozen=True, kw_only=True)
class AdaptiveAlpha(Term):
    r"""AlphaNet's adaptive divergence: at each token the larger of two $\alpha$-divergences, one of either kind.

    With the paper's $\alpha_- = -1$ and $\alpha_+ = 1$ the larger of $\frac12 \chi^2(\pi \Vert \text{ref})$, which
    punishes what the policy adds, and $\mathrm{KL}(\text{ref} \Vert \pi)$, which punishes what it gives up; both over
    the whole vocabulary and with the clip of `ClippedAlpha`.

    Args:
        negative: $\alpha_-$.
        positive: $\alpha_+$.
        clip: largest importance factor.
        reference: source of the reference or teacher.

    Metrics: `value`, the token mean of the larger; `overflow`, at how many tokens it is infinite; `positive`, the share
    of tokens at which the second is the larger.

    Raises:
        ConfigError: unless $\alpha_- < \alpha_+$, or for a clip of at most 1.

    Reference: AlphaNet: Improved Training of Supernets with Alpha-Divergence, https://arxiv.org/abs/2102.07954

    >>> term = AdaptiveAlpha()
    >>> sorted(need.key for need in term.requires)
    ['clipped_alpha(alpha=-1.0, clip=5.0) from initial', 'clipped_alpha(alpha=1.0, clip=5.0) from initial']
    """

    negative: float = -1.0
    positive: float = 1.0
    clip: float = 5.0
    reference: str = "initial"

    _keys = ("", "")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.negative < self.positive:
            raise ConfigError(
                f"AdaptiveAlpha.positive: expected a number above negative={self.negative}, got {self.positive!r}"
            )
        first, second = self._divergences()
        object.__setattr__(self, "_keys", (first.key, second.key))  # once: a compiled loss cannot build parts

    def _divergences(self) -> tuple[ExactDivergence, ExactDivergence]:
        first, second = (ClippedAlpha(alpha=alpha, clip=self.clip) for alpha in (self.negative, self.positive))
        return ExactDivergence(first, self.reference), ExactDivergence(second, self.reference)

    @property
    def requires(self) -> frozenset[Requirement]:
        """Both divergences."""
        return super().requires | set(self._divergences())

    def loss(self, batch: TokenBatch) -> Loss:
        """The larger divergence per token."""
        first, second = (batch.statistic(key) for key in self._keys)
        larger = torch.where(second > first, second, first)
        share = token_mean((second > first).to(larger.dtype), batch.token_weight)
        return Loss(larger, {**exact_metrics(larger, batch.loss_mask), "positive": share})


@dataclass(frozen=True, kw_only=True)
class VocabularyTerm(Term):
    """A term whose loss is one number per position, summed over the vocabulary of policy and reference. Abstract.

    `over_vocabulary` gives the number and its slopes, as a `Generator` does.

    Args:
        reference: source of the reference.

    Metrics: `value`, its token mean; `overflow`, at how many tokens it is infinite.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class CrossEntropy(VocabularyTerm):
    ...     def over_vocabulary(self, logp: Tensor, ref_logp: Tensor) -> Slopes:
    ...         return -(ref_logp.exp() * logp).sum(-1), -ref_logp.exp()
    >>> [need.key for need in CrossEntropy().requires]
    ['cross_entropy() from initial']
    """

    reference: str = "initial"

    _exact_key = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_exact_key", ExactDivergence(self, self.reference).key)  # a compiled loss builds none

    @property
    def name(self) -> str:
        """The term and its parameters."""
        told = ", ".join(f"{key}={value!r}" for key, value in self._parameters.items())
        return f"{part_name(self)}({told})"

    @property
    def _parameters(self) -> dict[str, float]:
        return {}

    @property
    def _exact(self) -> ExactDivergence:
        return ExactDivergence(type(self)(**self._parameters), self.reference)  # type: ignore[arg-type]

    @property
    def requires(self) -> frozenset[Requirement]:
        """The sum over the vocabulary."""
        return super().requires | {self._exact}

    def loss(self, batch: TokenBatch) -> Loss:
        """The number per token."""
        values = batch.statistic(self._exact_key)
        return Loss(values, exact_metrics(values, batch.loss_mask))

    @abstractmethod
    def over_vocabulary(self, logp: Float[Tensor, "*shape V"], ref_logp: Float[Tensor, "*shape V"]) -> Slopes:
        """The number per position, and its derivative in each entry of `logp`; without gradient."""


@dataclass(frozen=True, kw_only=True)
class EntropyBalancedKL(VocabularyTerm):
    r"""Both KLs to a teacher, weighted at each token by who is less certain, after BD-KD.

    $\delta_F \mathrm{KL}(\text{ref} \Vert \pi) + \delta_R \mathrm{KL}(\pi \Vert \text{ref})$: where the policy is
    surer than the teacher ($H_\pi < H_\text{ref}$) $\delta_F$ is `favoured` and $\delta_R$ `other`, so that it spreads
    out; elsewhere they change places, so that it makes up its mind. The weights carry no gradient. The paper's own
    weights, functions of the same gap of entropies, could not be recovered: these are a reading of its idea.

    Args:
        favoured: weight of the KL that closes the gap.
        other: weight of the other.
        reference: source of the teacher.

    Metrics: `value`, its token mean; `overflow`, at how many tokens it is infinite.

    Raises:
        ConfigError: unless 0 <= other <= favoured.

    Reference: BD-KD: Balancing the Divergences for Online Knowledge Distillation, https://arxiv.org/abs/2212.12965

    >>> from rlstab.losses import exact_divergence
    >>> policy, teacher = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    >>> exact_divergence(EntropyBalancedKL(favoured=1.0, other=0.0), policy, teacher)  # KL(teacher || policy)
    tensor([0.5108])
    """

    favoured: float = 1.0
    other: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("EntropyBalancedKL.favoured", self.favoured)
        check_range("EntropyBalancedKL.other", self.other, 0, self.favoured)

    @property
    def _parameters(self) -> dict[str, float]:
        return {"favoured": self.favoured, "other": self.other}

    @torch.no_grad()
    def over_vocabulary(self, logp: Float[Tensor, "*shape V"], ref_logp: Float[Tensor, "*shape V"]) -> Slopes:
        """The weighted sum of both KLs."""
        surer = _entropy(logp) < _entropy(ref_logp)
        total, slopes = torch.zeros_like(logp[..., 0]), torch.zeros_like(logp)
        for part, mine in ((_FORWARD, surer), (_REVERSE, ~surer)):
            weight = torch.where(mine, self.favoured, torch.full_like(total, self.other))
            value, slope = part.over_vocabulary(logp, ref_logp)
            total = total + torch.where(weight > 0, weight * value, 0.0)  # 0 also of an infinite one
            slopes = slopes + torch.where(weight.unsqueeze(-1) > 0, weight.unsqueeze(-1) * slope, 0.0)
        return total, slopes


def _entropy(logp: Float[Tensor, "*shape V"]) -> Float[Tensor, "*shape"]:
    return -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(-1)


_FORWARD, _REVERSE = ForwardKL(), ReverseKL()


@dataclass(frozen=True, kw_only=True)
class GuidedKL(VocabularyTerm):
    r"""$\mathrm{KL}(q \Vert \pi)$ to the policy's own distribution as a guide would correct it: $q \propto \pi\,g$.

    After attribute-controlled fine-tuning: $g$ says how well each next token can still meet a constraint, so that $q$
    is the nearest policy that heeds it; $q$ is taken as given. The guide is a model whose logits are $\log g$ up to a
    constant (0 and $-\infty$ for a hard constraint). Where it forbids all that the policy can say, the value is
    $+\infty$ and there is no gradient. Target: token, at the prefixes that were sampled.

    Args:
        reference: source of the guide.

    Metrics: `value`, its token mean; `overflow`, at how many tokens it is infinite.

    Reference: Attribute Controlled Fine-tuning for Large Language Models, https://arxiv.org/abs/2410.05559

    >>> from rlstab.losses import exact_divergence
    >>> policy, guide = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.0, -torch.inf]])
    >>> exact_divergence(GuidedKL(), policy, guide)  # q = (1, 0): log 2
    tensor([0.6931])
    """

    reference: str = "guide"

    @torch.no_grad()
    def over_vocabulary(self, logp: Float[Tensor, "*shape V"], ref_logp: Float[Tensor, "*shape V"]) -> Slopes:
        r"""The divergence, and $-q$."""
        joint = logp + ref_logp
        total = joint.logsumexp(-1, keepdim=True)
        possible = total > -torch.inf
        log_q = torch.where(possible, joint - torch.where(possible, total, 0.0), -torch.inf)
        q = log_q.exp()
        value = torch.where(q > 0, q * (log_q - logp), 0.0).sum(-1)
        return torch.where(possible.squeeze(-1), value, torch.inf), -q


@dataclass(frozen=True)
class _Balanced(Form):
    """`EntropyBalancedKL` as sums over tiles: both entropies, and value and slope of both KLs."""

    favoured: float
    other: float

    def sums(self, pair: Pair) -> Float[Tensor, "6 N"]:
        """What a tile contributes."""
        entropies = [
            torch.where(p > 0, p * logp, 0.0).sum(-1) for p, logp in ((pair.p, pair.logp), (pair.q, pair.ref_logp))
        ]
        return torch.cat([torch.stack(entropies), *(part.sums(pair) for part in _BOTH)])

    def _weighted(self, sums: Float[Tensor, "6 N"], forward: Tensor, reverse: Tensor) -> Tensor:
        """Both KLs by who is surer: the one with the larger negative entropy."""
        surer = sums[0] > sums[1]
        surer = surer.unsqueeze(-1) if forward.dim() > surer.dim() else surer
        total = torch.zeros_like(forward)
        for part, mine in ((forward, surer), (reverse, ~surer)):
            weight = torch.where(mine, self.favoured, torch.full_like(total, self.other))
            total = total + torch.where(weight > 0, weight * part, 0.0)  # 0 also of an infinite one
        return total

    def value(self, sums: Float[Tensor, "6 N"]) -> Float[Tensor, "N"]:
        """The weighted sum."""
        return self._weighted(sums, sums[2], sums[4]).clamp(min=0)

    def mean_slope(self, sums: Float[Tensor, "6 N"]) -> Float[Tensor, "N"]:
        """That of the slopes."""
        return self._weighted(sums, sums[3], sums[5])

    def slope(self, pair: Pair, sums: Float[Tensor, "6 N"]) -> Float[Tensor, "N V"]:
        """Of both KLs, weighted."""
        return self._weighted(sums, *(part.both(pair)[1] for part in _BOTH))


_BOTH = (Estimated(_FORWARD), Estimated(_REVERSE))


@dataclass(frozen=True)
class _Guided(Form):
    r"""`GuidedKL` as sums over tiles: $\log Z = \log\sum \pi g$ and the mean of $\log g$ under $q$."""

    def sums(self, pair: Pair) -> Float[Tensor, "2 N"]:
        """What a tile contributes."""
        joint = pair.logp + pair.ref_logp
        total = joint.logsumexp(-1)
        return torch.stack([total, (joint.softmax(-1) * pair.ref_logp).sum(-1)])

    def merge(self, left: Float[Tensor, "2 N"], right: Float[Tensor, "2 N"]) -> Float[Tensor, "2 N"]:
        """The log-sum, and the mean of both means."""
        total = torch.logaddexp(left[0], right[0])
        mean = sum(part[1] * (part[0] - total).exp() for part in (left, right))
        return torch.stack([total, torch.as_tensor(mean)])

    def value(self, sums: Float[Tensor, "2 N"]) -> Float[Tensor, "N"]:
        r"""$E_q \log g - \log Z$."""
        return torch.where(is_impossible(sums[0]), torch.inf, (sums[1] - sums[0]).clamp(min=0))

    def mean_slope(self, sums: Float[Tensor, "2 N"]) -> Float[Tensor, "N"]:
        """-1, or 0 where the guide forbids everything."""
        return torch.where(is_impossible(sums[0]), 0.0, -torch.ones_like(sums[0]))

    def slope(self, pair: Pair, sums: Float[Tensor, "2 N"]) -> Float[Tensor, "N V"]:
        """$-q$."""
        total = sums[0].unsqueeze(-1)
        return torch.where(is_impossible(total), 0.0, -(pair.logp + pair.ref_logp - total).exp())


@form_of.register
def _(generator: EntropyBalancedKL) -> Form:
    return _Balanced(generator.favoured, generator.other)


@form_of.register
def _(generator: GuidedKL) -> Form:
    return _Guided()


@dataclass(frozen=True, kw_only=True)
class ZLoss(Term):
    r"""The square of the log of the softmax's denominator, $(\log Z)^2$: keeps output logits from drifting.

    The gradient in the logits is $2 \log Z \cdot \pi$.

    Args:
        coef: coefficient; 1e-4 in the paper.

    Metrics: `log_z`, its token mean; `abs_max`, the largest absolute value.

    Reference: Small-scale proxies for large-scale Transformer training instabilities, https://arxiv.org/abs/2309.14322

    >>> batch = TokenBatch(mask=torch.ones(1, 1), vocab={"log_z": torch.tensor([[3.0]])})
    >>> ZLoss().loss(batch).values
    tensor([[9.]])
    """

    coef: float | Controller = 1e-4

    @property
    def requires(self) -> frozenset[Requirement]:
        r"""$\log Z$ of the policy."""
        return super().requires | {VocabStat("log_z")}

    def loss(self, batch: TokenBatch) -> Loss:
        """The squares."""
        log_z = batch.statistic("log_z")
        found = log_z.detach()
        metrics: dict[str, Metric] = {
            "log_z": token_mean(found, batch.token_weight),
            "abs_max": masked_max(found.abs(), batch.loss_mask),
        }
        return Loss(log_z.square(), metrics)
