"""RPG: policy gradients of a reward minus a KL to the policy that sampled, in all eight forms."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlstab.batch import TokenBatch
from rlstab.losses._checks import check_choice, check_number, check_range
from rlstab.losses._clipped import clipped_surrogate
from rlstab.losses._metrics import Metric, token_mean
from rlstab.losses._ratio import bounded_log, ratio_max, scored_logp
from rlstab.losses._surrogate import RatioSurrogate, clip_share

Direction = Literal["forward", "reverse"]


def rpg_penalty(
    log_ratio: Float[Tensor, "B #T"], *, divergence: Direction, normalised: bool
) -> tuple[Float[Tensor, "B #T"], Float[Tensor, "B #T"]]:
    r"""An estimate $k$ of the KL from samples of the reference, with $w = \pi/\text{ref}$, and $-dk/d\log w$.

    | | $k$ | $-dk/d\log w$ |
    |---|---|---|
    | forward, normalised | $-\log w$ | $1$ |
    | forward | $w - \log w - 1$ | $1 - w$ |
    | reverse, normalised | $w \log w$ | $-w (\log w + 1)$ |
    | reverse | $w \log w - w + 1$ | $-w \log w$ |

    All four are unbiased for the KL of two normalised distributions, and so are their gradients.

    >>> rpg_penalty(torch.zeros(1, 1), divergence="reverse", normalised=True)
    (tensor([[0.]]), tensor([[-1.]]))
    """
    ratio = log_ratio.exp()
    if divergence == "forward":
        value, slope = -log_ratio, torch.ones_like(ratio)
    else:
        value, slope = ratio * log_ratio, -ratio * (log_ratio + 1)
    if normalised:
        return value, slope
    change = torch.expm1(log_ratio)
    return (value + change, -change) if divergence == "forward" else (value - change, slope + ratio)


def rpg_stopped(
    ratio: Float[Tensor, "B #T"], advantages: Float[Tensor, "B #T"], *, low: float, high: float, dual: float
) -> Bool[Tensor, "B #T"]:
    """Where RPG's clip takes the gradient away, by the sign of reward and penalty together.

    >>> rpg_stopped(torch.tensor([[0.7, 1.3]]), torch.tensor([[1.0, 1.0]]), low=0.2, high=0.28, dual=10.0)
    tensor([[False,  True]])
    """
    return torch.where(advantages >= 0, ratio >= 1 + high, (ratio <= 1 - low) | (ratio >= dual))


def _check_bounds(low: float, high: float, dual: float) -> None:
    check_range("RPG.low", low, 0, 1)
    check_range("RPG.high", high, 0)
    check_range("RPG.dual", dual, 1)


@dataclass(frozen=True, kw_only=True)
class RPG(RatioSurrogate):
    r"""Regularised policy gradient: $E_\pi[A] - \beta\,\mathrm{KL}$ between the policy and the one that sampled.

    With $w = \pi/\pi_\text{old}$, the estimate $k$ of the KL and $C = -\beta\,dk/d\log w$ (table in `rpg_penalty`):

    | form | loss per token |
    |---|---|
    | `differentiable` | $-w A + \beta k(w)$ |
    | `reinforce` | $-\operatorname{sg}(w A + C) \log\pi$ |

    Both have the gradient of the objective, exactly, for either direction of the KL, normalised or not: the
    unnormalised forms vary less near $w = 1$. The reference is the policy that sampled (`ratio.against`), so nothing is
    kept for it; moving it every so many steps means sampling from it for so long. For another reference compose a
    surrogate with a divergence, as in `ClippedSurrogate() + 1e-4 * ReverseKL(reference="moving")`.

    With `clip`, PPO's clip with a ceiling of `dual` at negative advantages. `differentiable`: on $w \hat A$, where
    $\hat A = A + C/w$ for the reverse KL, and $\hat A = A$ with the penalty unclipped beside it for the forward KL,
    which has no such factor. `reinforce`: the whole coefficient is dropped where $A + C/w \ge 0$ and $w \ge 1 +$`high`,
    or $A + C/w < 0$ and $w \notin (1 - $`low`$, $`dual`$)$.

    The released code clips the reward alone (that is `ClippedSurrogate(dual=10.0)` and
    `ReverseKL(reference="old", samples="reference")` side by side), and its REINFORCE recipes never call the loss.

    Args:
        divergence: `forward`, $\mathrm{KL}(\pi_\text{old} \Vert \pi)$, or `reverse`, $\mathrm{KL}(\pi \Vert
            \pi_\text{old})$.
        normalised: whether $k$ leaves out the terms that make it non-negative.
        form: see the table.
        beta: $\beta$.
        clip: whether there is a clip.
        low: how far below 1 the ratio counts.
        high: how far above 1 the ratio counts.
        dual: largest ratio at negative advantages. The paper gives none; its scripts take 10.
        ratio: the importance ratio; with `SequenceRatio` everything is that of whole sequences.
        weights: detached factors.

    Metrics: `kl`, the mean of $k$; `clipped`, the share that the clip stops; `ratio_max`; `impossible`, the number of
    tokens without a ratio.

    Raises:
        ConfigError: for another word, or bounds out of range.

    Reference: On the Design of KL-Regularized Policy Gradient Algorithms for LLM Reasoning,
    https://arxiv.org/abs/2505.17508

    >>> logp = torch.tensor([[-1.0]], requires_grad=True)
    >>> batch = TokenBatch(mask=torch.ones(1, 1), advantages=torch.tensor([3.0]), logps={"policy": logp})
    >>> RPG(beta=0.5, normalised=True).loss(batch).values.sum().backward(); logp.grad  # -(3 - 0.5)
    tensor([[-2.5000]])
    """

    divergence: Direction = "reverse"
    normalised: bool = False
    form: Literal["differentiable", "reinforce"] = "differentiable"
    beta: float = 1e-4
    clip: bool = True
    low: float = 0.2
    high: float = 0.28
    dual: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("RPG.divergence", self.divergence, ("forward", "reverse"))
        check_choice("RPG.form", self.form, ("differentiable", "reinforce"))
        check_number("RPG.beta", self.beta)
        _check_bounds(self.low, self.high, self.dual)

    @property
    def inert_at_ratio_one(self) -> tuple[str, ...]:
        """The clip."""
        return ("the clip of RPG",) if self.clip else ()

    @property
    def scored_by(self) -> tuple[str, ...]:
        """The denominator, and the policy where its log-prob is the loss."""
        return (self.ratio.against,) if self.form == "differentiable" else ("policy", self.ratio.against)

    def surrogate(self, batch: TokenBatch) -> tuple[Float[Tensor, "B #T"], dict[str, Metric]]:
        """The loss of the chosen form."""
        log_ratio, advantages = bounded_log(self.ratio.log_ratio(batch)), batch.token_advantages()
        penalty, pull = rpg_penalty(log_ratio, divergence=self.divergence, normalised=self.normalised)
        ratio = log_ratio.exp()
        found: dict[str, Metric] = {"kl": token_mean(penalty, batch.token_weight), "ratio_max": ratio_max(ratio, batch)}
        coefficient = (ratio * advantages + self.beta * pull).detach()  # sg(wA + C): multiplies the score
        bounds = {"low": self.low, "high": self.high, "dual": self.dual}
        joint = self.form == "reinforce" or self.divergence == "reverse"
        if self.clip:
            stopped = rpg_stopped(ratio.detach(), coefficient if joint else advantages, **bounds)
            found["clipped"] = clip_share(stopped, batch)
            coefficient = torch.where(stopped, 0.0, coefficient)
        if self.form == "reinforce":
            return -coefficient * scored_logp(batch, "policy"), found
        if pulled := self.clip and joint:
            advantages = advantages - self.beta * (log_ratio.detach() + self.normalised)  # A + C/w, as if it were given
        loss = clipped_surrogate(ratio, advantages, **bounds) if self.clip else -ratio * advantages
        return loss if pulled else loss + self.beta * penalty, found
