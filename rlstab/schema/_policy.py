"""Signals of the policy: against its sampler, against its references, and what its loss does to it."""

from rlstab.schema._signal import Signal, with_se

_SAMPLER_SCORES = "every step at which the sampler returned log-probs"
_POSITIONS = "every 10 steps"
_DRIFT_COST = "one forward of policy and reference, without gradient, at ≤ 64 sampled positions"

MISMATCH = (
    *with_se(
        Signal(
            "mismatch/k1",
            "distance of trainer and sampler on the sampled tokens: unbiased, may be negative",
            formula="mean(−Δ), estimates KL(sampler‖trainer)",
            unit="nats/token",
            direction="lower",
            cadence=_SAMPLER_SCORES,
        )
    ),
    *with_se(
        Signal(
            "mismatch/k3",
            "distance of trainer and sampler on the sampled tokens: unbiased, never negative",
            formula="mean(ρ − 1 − Δ), estimates KL(sampler‖trainer)",
            unit="nats/token",
            direction="lower",
            cadence=_SAMPLER_SCORES,
        )
    ),
    Signal(
        "mismatch/max_abs",
        "largest disagreement of trainer and sampler on one token",
        formula="max |Δ|",
        unit="nats",
        direction="lower",
        reduction="max",
        cadence=_SAMPLER_SCORES,
    ),
    Signal(
        "mismatch/ess_token",
        "share of the tokens that importance weighting by ρ would leave effective",
        formula="(Σ ρ)² / (N · Σ ρ²) over tokens, with no bound on ρ",
        unit="fraction",
        direction="higher",
        reduction="min",
        cadence=_SAMPLER_SCORES,
    ),
    Signal(
        "mismatch/ess_sequence",
        "share of the completions that importance weighting of whole sequences would leave effective",
        formula="(Σ w)² / (n · Σ w²) over n sequences, w = exp(Σ_t Δ_t), with no bound on w",
        unit="fraction",
        direction="higher",
        reduction="min",
        cadence=_SAMPLER_SCORES,
    ),
    *with_se(
        Signal(
            "mismatch/f2",
            "share of the tokens whose ratio of trainer to sampler is outside [1/2, 2]",
            formula="F(2) = mean[max(ρ, 1/ρ) > 2]",
            unit="fraction",
            direction="lower",
            cadence=_SAMPLER_SCORES,
        )
    ),
    Signal(
        "mismatch/chi2_token",
        "χ² divergence of trainer from sampler on the sampled tokens: the variance of ρ where its mean is 1",
        formula="mean(ρ²) − 1 over tokens",
        direction="lower",
        cadence=_SAMPLER_SCORES,
    ),
    Signal(
        "mismatch/chi2_sequence",
        "the same over whole completions; large where a few completions would carry all weight",
        formula="mean(w²) − 1 over sequences, w = exp(Σ_t Δ_t)",
        direction="lower",
        cadence=_SAMPLER_SCORES,
    ),
    Signal(
        "mismatch/pearson",
        "correlation of the probabilities that trainer and sampler give the sampled tokens",
        formula="Pearson's r of π_trainer and π_sampler over tokens",
        direction="higher",
        reduction="min",
        cadence=_SAMPLER_SCORES,
    ),
    Signal(
        "mismatch/bucket/<bucket>/share",
        "share of the tokens to which the sampler gave a probability in <bucket>",
        unit="fraction",
        cadence=_SAMPLER_SCORES,
    ),
    Signal(
        "mismatch/bucket/<bucket>/mean_abs",
        "disagreement of trainer and sampler on the tokens to which the sampler gave a probability in <bucket>, if any",
        formula="mean |Δ| over these tokens",
        unit="nats/token",
        direction="lower",
        cadence=_SAMPLER_SCORES,
    ),
    Signal(
        "mismatch/bucket/<bucket>/k3",
        "distance of trainer and sampler on the tokens to which the sampler gave a probability in <bucket>, if any",
        formula="mean(ρ − 1 − Δ) over these tokens",
        unit="nats/token",
        direction="lower",
        cadence=_SAMPLER_SCORES,
    ),
    Signal(
        "mismatch/lag",
        "updates that the policy has made since the weights that sampled the tokens",
        formula="mean over tokens of (policy's version − sampler's version)",
        unit="updates",
        direction="lower",
        cadence=_SAMPLER_SCORES,
    ),
    Signal(
        "mismatch/engine_k3",
        "part of mismatch/k3 that is the engine's, not staleness; NaN while all lags are equal and not 0",
        formula="intercept of k3 = e + s · lag over the completions of the last steps (half-life 50), by tokens",
        unit="nats/token",
        direction="lower",
        reduction="last",
        cadence=_SAMPLER_SCORES,
    ),
    Signal(
        "mismatch/lag_k3",
        "what an update of lag adds to mismatch/k3: staleness; NaN while all lags are equal and not 0",
        formula="slope s of the same line",
        unit="nats/token per update",
        direction="lower",
        reduction="last",
        cadence=_SAMPLER_SCORES,
    ),
    Signal(
        "mismatch/unscored",
        "tokens without a sampler log-prob (NaN or −inf); they are left out of every mismatch signal",
        unit="tokens",
        direction="lower",
        reduction="sum",
        cadence=_SAMPLER_SCORES,
    ),
)

POLICY = (
    Signal(
        "policy/entropy",
        "entropy of the policy at the sampled tokens",
        formula="mean_t H(π(·|prefix_t))",
        unit="nats/token",
    ),
    Signal(
        "policy/clip_fraction_low",
        "share of the tokens whose gradient the lower clip stops",
        formula="mean[A < 0 and ratio < 1 − ε_low]",
        unit="fraction",
    ),
    Signal(
        "policy/clip_fraction_high",
        "share of the tokens whose gradient the upper clip stops",
        formula="mean[A > 0 and ratio > 1 + ε_high]",
        unit="fraction",
    ),
    Signal(
        "policy/ratio_max",
        "largest ratio of the policy to the one that took the batch",
        formula="max π/π_old",
        direction="lower",
        reduction="max",
    ),
)

_SAMPLED = "on the first loss call every 10 steps"

POLICY_HEAD = (
    Signal(
        "policy/log_z",
        "log of the softmax's denominator at sampled tokens; drifts away from where it was before logits diverge",
        formula="mean_t log Σ_v exp z_v",
        unit="nats",
        cadence=_SAMPLED,
        cost="the head at ≤ 64 tokens, without gradient",
    ),
    Signal(
        "policy/log_z_max",
        "largest size of it",
        formula="max_t |log Σ_v exp z_v|",
        unit="nats",
        direction="lower",
        reduction="max",
        cadence=_SAMPLED,
        cost="with policy/log_z",
    ),
)

_SPECTRA = "every 50 steps"

GRADIENT = (
    Signal(
        "gradient/outlier",
        "how far the completion with the largest gradient at the output layer stands out of the sampled ones",
        formula="max_i ‖r_i‖ / median_i ‖r_i‖, r_i = Σ_t A_t (onehot − π_t) h_tᵀ / n, ≤ 64 tokens of ≤ 8 completions",
        direction="lower",
        reduction="max",
        cadence=_SAMPLED,
        cost="the head at ≤ 64 tokens, without gradient",
    ),
    Signal(
        "gradient/cancellation",
        "what is left of the gradients of single completions when they are added; small where they oppose each other",
        formula="‖Σ r_i‖ / Σ ‖r_i‖",
        unit="fraction",
        direction="higher",
        cadence=_SAMPLED,
        cost="with gradient/outlier",
    ),
    Signal(
        "gradient/entanglement",
        "how far what raises the good completions also raises the bad ones; 1 is altogether",
        formula="cos(g₊, g₋), g₊ = Σ_{A>0} r_i, g₋ = −Σ_{A<0} r_i",
        direction="lower",
        cadence=_SAMPLED,
        cost="with gradient/outlier",
    ),
    Signal(
        "gradient/rank",
        "directions that share the energy of the gradient of an attention projection, mean over ≤ 4 layers",
        formula="(Σ_j s_j²)² / Σ_j s_j⁴, singular values s_j",
        unit="directions",
        direction="higher",
        cadence=_SPECTRA,
        cost="one product GᵀG and a power iteration per matrix",
    ),
    Signal(
        "gradient/leading",
        "share of its energy in the first direction",
        formula="s_1² / Σ_j s_j²",
        unit="fraction",
        direction="lower",
        cadence=_SPECTRA,
        cost="with gradient/rank",
    ),
    Signal(
        "gradient/roughness",
        "how much the size of these gradients changes from a layer to the next one that is looked at",
        formula="mean_l |‖G_{l+1}‖ − ‖G_l‖| / mean_l ‖G_l‖, Frobenius norms",
        direction="lower",
        cadence=_SPECTRA,
        cost="with gradient/rank",
    ),
)

LAWS = (
    Signal(
        "law/ceiling",
        "reward that the entropy law expects where no entropy is left",
        formula="b − a of R = −a e^H + b, least squares over the steps so far (at least 20)",
        unit="reward",
        reduction="last",
    ),
    Signal(
        "law/headroom",
        "what the entropy law still promises beyond the reward of the step",
        formula="law/ceiling − train/reward",
        unit="reward",
        direction="higher",
        reduction="last",
    ),
    Signal(
        "law/explained",
        "share of the reward's variance that the entropy law explains; near 0 it says nothing",
        formula="R² of the fit",
        unit="fraction",
        reduction="last",
    ),
    Signal(
        "law/residual",
        "how far the reward of the step lies above the entropy law",
        formula="train/reward − (b − a e^H)",
        unit="reward",
        direction="higher",
        reduction="last",
    ),
    Signal(
        "law/reward_per_sqrt_kl",
        "reward that a unit of √KL to the start still buys; falls to 0 and below where the reward is over-optimised",
        formula="slope of mean reward on √drift/initial/kl over the last 10 measurements",
        unit="reward per √nat",
        direction="higher",
        reduction="last",
        cadence=_POSITIONS,
    ),
    Signal(
        "forecast/<metric>",
        "optimizer steps until the trend of <metric> crosses its bound; absent while none does, infinite when it ends",
        formula="(ln bound − line now) / slope, of a line through 20 (entropy 40) ln <metric>; slope > 4 of its errors",
        unit="steps",
        direction="higher",
        reduction="last",
        cadence=_POSITIONS,
    ),
)

DRIFT = (
    *with_se(
        Signal(
            "drift/initial/kl",
            "how far the policy has moved from the weights it started with",
            formula="mean_t KL(π(·|prefix_t) ‖ π_initial(·|prefix_t)), exact over the vocabulary",
            unit="nats/token",
            direction="lower",
            cadence=_POSITIONS,
            cost=_DRIFT_COST,
        )
    ),
    *with_se(
        Signal(
            "drift/previous/kl",
            "how far the update before this step moved the policy",
            formula="mean_t KL(π(·|prefix_t) ‖ π_before(·|prefix_t)), exact; π_before is one update older",
            unit="nats/token",
            cadence=_POSITIONS,
            cost="one forward of the policy, without gradient, at the positions of drift/initial/kl",
        )
    ),
    Signal(
        "drift/initial/surprise",
        "how much less probable what the policy writes is to its start than what the start wrote; sharpening lowers it",
        formula="KL + H − H_0: drift/initial/kl (mean of 2), policy/entropy (mean of 5 steps, H_0 of the first 10)",
        unit="nats/token",
        direction="lower",
        reduction="last",
    ),
    Signal(
        "drift/<source>/reward_correlation",
        "whether completions that the policy has moved towards are those with reward; lost where something else pays",
        formula="Pearson's r over completions of Σ_t log π − log π_<source> (the implicit reward) and the reward",
        direction="higher",
        cadence="every 10 steps; every step where the host's loss reads its reference",
        cost="with drift/<source>/kl: the sum is over the sampled positions",
    ),
    *with_se(
        Signal(
            "drift/moving/kl",
            "how far the policy is ahead of the moving reference",
            formula="mean_t KL(π(·|prefix_t) ‖ π_moving(·|prefix_t)), exact over the vocabulary",
            unit="nats/token",
            direction="lower",
            cadence=_POSITIONS,
            cost=_DRIFT_COST,
        )
    ),
)
