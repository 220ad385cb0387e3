"""Importance ratios between the policy and the policy that the rollouts are judged by, in log space."""

import math
from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn.functional import hardtanh

from rlstab.batch import LogProbs, Requirement, TokenBatch
from rlstab.losses._checks import check_part, check_positive, check_range
from rlstab.losses._estimate import Estimate, attached
from rlstab.losses._metrics import Max, mask_like
from rlstab.losses._parts import Part


def ratio_limit(dtype: torch.dtype) -> float:
    """The log-ratio at which `ratio_of` stops: half the range of `dtype`, so that a product of two ratios is finite."""
    return (math.log(torch.finfo(dtype).max) - 1) / 2


_BOUNDS = {
    dtype: (-torch.finfo(dtype).max, ratio_limit(dtype))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def ratio_of(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`exp(log_ratio)`, held at `exp(ratio_limit)` with gradient 0 beyond (1.1e19 in float32).

    An infinite ratio would turn the gradient of all parameters into NaN as soon as a clip or mask multiplies it by 0.

    >>> import torch
    >>> ratio_of(torch.tensor([0.0, 500.0]))
    tensor([1.0000e+00, 1.1189e+19])
    """
    return bounded_log(log_ratio).exp()


def bounded_log(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The finite logarithm of `ratio_of`."""
    # hardtanh: a clamp whose backward pass is several times faster on a CPU
    return hardtanh(log_ratio, *_BOUNDS[log_ratio.dtype])


def finite_logp(logp: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Log-probs with -inf held at a large finite number (gradient 0 there), so that a weight of 0 gives 0 and not NaN.

    >>> import torch
    >>> finite_logp(torch.tensor([-1.0, -torch.inf]))
    tensor([-1.0000e+00, -1.8447e+19])
    """
    largest = torch.finfo(logp.dtype).max
    return hardtanh(logp, -math.sqrt(largest), largest)


def scored_logp(batch: TokenBatch, source: str) -> Float[Tensor, "B T"]:
    """The log-probs of `source`, held by `finite_logp` where they are not known to be finite.

    >>> batch = TokenBatch(mask=torch.ones(1, 2), logps={"policy": torch.tensor([[-1.0, -torch.inf]])})
    >>> scored_logp(batch, "policy")
    tensor([[-1.0000e+00, -1.8447e+19]])
    """
    logp = batch.logp(source)
    return logp if batch.scores_all(source) else finite_logp(logp)


def scored_log_ratio(batch: TokenBatch, reference: str) -> Float[Tensor, "B T"]:
    """The log-ratio of the policy to `reference`, without gradient, of log-probs as `scored_logp` holds them.

    >>> logps = {"policy": torch.tensor([[-1.0]]), "initial": torch.tensor([[-3.0]])}
    >>> scored_log_ratio(TokenBatch(mask=torch.ones(1, 1), logps=logps), "initial")
    tensor([[2.]])
    """
    if batch.scores_all("policy") and batch.scores_all(reference):
        return batch.apart("policy", reference)
    return finite_logp(batch.held("policy")) - finite_logp(batch.held(reference))


def with_slope(estimate: Estimate, batch: TokenBatch) -> Float[Tensor, "B T"]:
    """A loss with this value and, where the policy's log-prob is finite, this slope in it.

    >>> logp = torch.tensor([[-1.0]], requires_grad=True)
    >>> found = Estimate(value=torch.tensor([[9.0]]), slope=torch.tensor([[6.0]]))
    >>> loss = with_slope(found, TokenBatch(mask=torch.ones(1, 1), logps={"policy": logp}))
    >>> loss.backward(); loss.detach(), logp.grad
    (tensor([[9.]]), tensor([[6.]]))
    """
    if batch.scores_all("policy"):
        return estimate.value + estimate.slope * batch.zero
    return attached(estimate, finite_logp(batch.logp("policy")))


def masked_row_mean(values: Float[Tensor, "B T"], mask: Shaped[Tensor, "B T"]) -> Float[Tensor, "B 1"]:
    """The mean over the tokens of each row, where `mask` is 1 or true; 0 in a row without tokens."""
    return ((values * mask).sum(-1) / mask.sum(-1).clamp(min=1)).unsqueeze(-1)


def missing(batch: TokenBatch, source: str) -> Bool[Tensor, "B T"]:
    """Tokens that a ratio to `source` knows nothing about: their log-prob there is -inf, or NaN if `source` scores.

    A policy cannot have drawn a token to which it gives probability 0. NaN is what an engine says of a token that it
    could not score; from any other source it is an error, and stays visible.

    >>> batch = TokenBatch(mask=torch.ones(1, 3), logps={"sampler": torch.tensor([[-1.0, torch.nan, -torch.inf]])})
    >>> missing(batch, "sampler")
    tensor([[False,  True,  True]])
    """
    source = batch.recorded(source)
    return batch.once(("missing", source), lambda batch: _missing(batch, source))


def _missing(batch: TokenBatch, source: str) -> Bool[Tensor, "B T"]:
    if batch.scores_all(source):
        return torch.zeros_like(batch.loss_mask)
    logp = batch.held(source)
    return ~(logp > -torch.inf) if source == "sampler" else logp.isneginf()


def leave_out(values: Float[Tensor, "B #T"], batch: TokenBatch, source: str) -> Float[Tensor, "B #T"]:
    """`values`, but 0 without gradient at the tokens that are `missing` from a source.

    >>> batch = TokenBatch(mask=torch.ones(1, 2), logps={"old": torch.tensor([[-1.0, -torch.inf]])})
    >>> leave_out(torch.tensor([[2.0, torch.inf]]), batch, "old")
    tensor([[2., 0.]])
    """
    return values if batch.scores_all(source) else torch.where(missing(batch, source), 0.0, values)


def ratio_max(ratio: Float[Tensor, "B #T"], batch: TokenBatch) -> Max:
    """The largest ratio of a token, or of a row that has one; 0 without tokens.

    >>> ratio_max(torch.tensor([[0.5, 1.0]]), TokenBatch(mask=torch.tensor([[True, False]]))).value()
    tensor(0.5000)
    """
    return Max((ratio.detach() * mask_like(ratio, batch.token_weight)).amax())


@dataclass(frozen=True, kw_only=True)
class Ratio(Part):
    r"""The log of an importance ratio $\pi/\pi_\text{against}$, with gradient. Abstract.

    A token that the denominator cannot have drawn (its log-prob is -inf), or that the sampler could not score (NaN),
    has no ratio. It is no evidence about a sequence: ratio 1, without gradient. Surrogates leave it out and count it.

    Args:
        against: source of the denominator: `old`, or `sampler` (PPO against the behaviour policy, "bypass": the
            mismatch is then inside the ratio and must not be corrected again by a weight).

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Halved(Ratio):
    ...     def log_ratio(self, batch: TokenBatch) -> Tensor:
    ...         return self.token_log_ratio(batch) / 2
    >>> logps = {"policy": torch.tensor([[-1.0]]), "old": torch.tensor([[-2.0]])}
    >>> Halved().log_ratio(TokenBatch(mask=torch.ones(1, 1), logps=logps))
    tensor([[0.5000]])
    """

    against: str = "old"

    @property
    def requires(self) -> frozenset[Requirement]:
        """Policy and denominator."""
        return super().requires | {LogProbs("policy"), LogProbs(self.against)}

    @property
    def sequence_level(self) -> bool:
        """Whether a sequence has one ratio."""
        return False

    @abstractmethod
    def log_ratio(self, batch: TokenBatch) -> Float[Tensor, "B #T"]:
        """The log-ratio per token, or `[B, 1]` where a sequence has one."""

    def token_log_ratio(self, batch: TokenBatch) -> Float[Tensor, "B T"]:
        """The log-ratio of each token, from which other ratios are made."""
        return leave_out(batch.logp("policy") - batch.logp(self.against), batch, self.against)

    def bounded(self, batch: TokenBatch) -> Float[Tensor, "B #T"]:
        """The finite logarithm of the ratio's value, without gradient."""
        return bounded_log(self.log_ratio(batch).detach())

    def largest(self, ratio: Float[Tensor, "B #T"], batch: TokenBatch) -> Max:
        """`ratio_max` of its own values, which carry no gradient."""
        return ratio_max(ratio, batch)

    def attached(self, estimate: Estimate, batch: TokenBatch) -> Float[Tensor, "B #T"]:
        """A loss with this value and, within the bounds of `ratio_of`, this slope in the log-ratio."""
        return attached(estimate, bounded_log(self.log_ratio(batch)))


@dataclass(frozen=True, kw_only=True)
class TokenRatio(Ratio):
    r"""$\log r_t = \log\pi(y_t) - \log\pi_\text{old}(y_t)$.

    >>> import torch
    >>> logps = {"policy": torch.tensor([[-1.0, -2.0]]), "old": torch.tensor([[-1.5, -2.0]])}
    >>> TokenRatio().log_ratio(TokenBatch(mask=torch.ones(1, 2), logps=logps))
    tensor([[0.5000, 0.0000]])
    """

    def log_ratio(self, batch: TokenBatch) -> Float[Tensor, "B T"]:
        """One log-ratio per token."""
        return self.token_log_ratio(batch)

    def bounded(self, batch: TokenBatch) -> Float[Tensor, "B T"]:
        """As it is, where no bound can bind."""
        return batch.apart("policy", self.against) if batch.close("policy", self.against) else super().bounded(batch)

    def largest(self, ratio: Float[Tensor, "B T"], batch: TokenBatch) -> Max:
        """Positions outside the loss, whose ratio is 1, need no mask where a larger one is known."""
        highest = batch.extremes("policy", self.against)[1]
        return Max(ratio.amax()) if 0 < highest < math.inf else ratio_max(ratio, batch)

    def attached(self, estimate: Estimate, batch: TokenBatch) -> Float[Tensor, "B T"]:
        """A slope in the log-ratio is one in the policy's log-prob."""
        if batch.close("policy", self.against):
            return with_slope(estimate, batch)
        return super().attached(estimate, batch)


@dataclass(frozen=True, kw_only=True)
class SequenceRatio(Ratio):
    r"""$\log r = \sum_t m_t (\log\pi(y_t) - \log\pi_\text{old}(y_t))$: the ratio of whole sequences.

    Unbiased where all of a sequence's tokens share one advantage; its variance grows exponentially with the length.

    >>> import torch
    >>> logps = {"policy": torch.tensor([[-1.0, -2.0]]), "old": torch.tensor([[-1.5, -1.0]])}
    >>> SequenceRatio().log_ratio(TokenBatch(mask=torch.ones(1, 2), logps=logps))
    tensor([[-0.5000]])
    """

    @property
    def sequence_level(self) -> bool:
        """One ratio per sequence."""
        return True

    def log_ratio(self, batch: TokenBatch) -> Float[Tensor, "B 1"]:
        """The sum over the tokens of each row."""
        return (self.token_log_ratio(batch) * batch.token_weight).sum(-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class GeometricRatio(Ratio):
    r"""$\log s = \frac{1}{|o|} \sum_t m_t (\log\pi(y_t) - \log\pi_\text{old}(y_t))$: the sequence ratio of GSPO.

    Reference: Group Sequence Policy Optimization, https://arxiv.org/abs/2507.18071

    >>> import torch
    >>> logps = {"policy": torch.tensor([[-1.0, -2.0]]), "old": torch.tensor([[-1.5, -1.0]])}
    >>> GeometricRatio().log_ratio(TokenBatch(mask=torch.ones(1, 2), logps=logps))
    tensor([[-0.2500]])
    """

    @property
    def sequence_level(self) -> bool:
        """One ratio per sequence."""
        return True

    def log_ratio(self, batch: TokenBatch) -> Float[Tensor, "B 1"]:
        """The mean over the tokens of each row."""
        return masked_row_mean(self.token_log_ratio(batch), batch.token_weight)


@dataclass(frozen=True, kw_only=True)
class GSPOTokenRatio(Ratio):
    r"""$\log s_t = \operatorname{sg}(\log s) + \log\pi(y_t) - \operatorname{sg}(\log\pi(y_t))$ with GSPO's $s$.

    The value of `GeometricRatio` at every token, with the gradient of the token's own log-prob: for advantages per
    token. Equal to `GeometricRatio` in value and gradient where all tokens of a sequence share one advantage.

    Reference: Group Sequence Policy Optimization (section on GSPO-token), https://arxiv.org/abs/2507.18071

    >>> import torch
    >>> logps = {"policy": torch.tensor([[-1.0, -2.0]]), "old": torch.tensor([[-1.5, -1.0]])}
    >>> GSPOTokenRatio().log_ratio(TokenBatch(mask=torch.ones(1, 2), logps=logps))
    tensor([[-0.2500, -0.2500]])
    """

    def log_ratio(self, batch: TokenBatch) -> Float[Tensor, "B T"]:
        """The sequence's value at each of its tokens."""
        sequence = masked_row_mean(self.token_log_ratio(batch), batch.token_weight).detach()  # sg(s): value only
        logp = scored_logp(batch, "policy")
        return sequence + logp - logp.detach()  # the token's gradient with value 0


@dataclass(frozen=True, kw_only=True)
class PreClippedRatio(Ratio):
    r"""Another ratio, clipped in log space: $\operatorname{clip}(\log r, \ln\min, \ln\max)$, as in StableReinforce.

    Outside the bounds the gradient is 0. Bounds the loss of a negative advantage; the gradient just inside stays $r A$.

    Args:
        ratio: the ratio to clip.
        min: lower bound of the ratio.
        max: upper bound of the ratio.

    Raises:
        ConfigError: unless 0 < min < 1 < max.

    Reference: R1-Reward (StableReinforce), https://arxiv.org/abs/2505.02835

    >>> import torch
    >>> logps = {"policy": torch.tensor([[-1.0, -1.0]]), "old": torch.tensor([[-20.0, -2.0]])}
    >>> PreClippedRatio().log_ratio(TokenBatch(mask=torch.ones(1, 2), logps=logps))
    tensor([[6.9078, 1.0000]])
    """

    against: str = field(init=False, default="old")  # that of `ratio`
    ratio: Ratio = field(default_factory=TokenRatio)
    min: float = 1e-3
    max: float = 1e3

    def __post_init__(self) -> None:
        check_part("PreClippedRatio.ratio", self.ratio, Ratio, "TokenRatio()")
        check_positive("PreClippedRatio.min", self.min)
        check_range("PreClippedRatio.min", self.min, 0, 1)
        check_range("PreClippedRatio.max", self.max, 1)
        object.__setattr__(self, "against", self.ratio.against)

    @property
    def sequence_level(self) -> bool:
        """As the ratio that is clipped."""
        return self.ratio.sequence_level

    @property
    def inert_on_policy(self) -> tuple[str, ...]:
        """The bounds, around a ratio of 1."""
        own = ("the bounds of PreClippedRatio",) if self.against == "old" else ()
        return super().inert_on_policy + own

    def log_ratio(self, batch: TokenBatch) -> Float[Tensor, "B #T"]:
        """The clipped log-ratio."""
        return self.ratio.log_ratio(batch).clamp(math.log(self.min), math.log(self.max))
