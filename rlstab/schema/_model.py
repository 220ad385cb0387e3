"""Signals of the model's insides, of the routes of experts, and of held-out evaluations."""

from rlstab.schema._signal import Signal, with_se

_FORWARD_HOOK = "on the watched forward every 10 steps"

MODEL = (
    Signal(
        "attention/entropy",
        "how widely attention spreads, mean over sampled layers, heads and rows; 1 is uniform",
        formula="mean −Σ_j A_ij log A_ij / log(visible keys)",
        unit="fraction",
        cadence=_FORWARD_HOOK,
        cost="logits of ≤ 16 rows and ≤ 2 heads per layer",
    ),
    Signal(
        "attention/entropy_min",
        "the same for the head with the narrowest attention",
        formula="min over layers and heads of the mean over rows",
        unit="fraction",
        direction="higher",
        reduction="min",
        cadence=_FORWARD_HOOK,
        cost="with attention/entropy",
    ),
    Signal(
        "attention/logit_max",
        "largest attention logit at sampled heads and rows",
        formula="max scaling · ⟨q_i, k_j⟩ over visible keys",
        direction="lower",
        reduction="max",
        cadence=_FORWARD_HOOK,
        cost="with attention/entropy",
    ),
    Signal(
        "activation/kurtosis",
        "how far single channels stand out of the residual stream; 3 for a normal distribution",
        formula="mean_tokens mean_j x_j⁴ / (mean_j x_j²)², largest over layers",
        direction="lower",
        reduction="max",
        cadence=_FORWARD_HOOK,
        cost="one pass over the sampled layers' activations at ≤ 64 positions",
    ),
    Signal(
        "activation/rms",
        "size of the residual stream, largest over layers",
        formula="√mean x²",
        direction="none",
        reduction="max",
        cadence=_FORWARD_HOOK,
        cost="with activation/kurtosis",
    ),
    Signal(
        "activation/massive",
        "largest activation in units of the median size of its layer; massive activations reach 10³",
        formula="max |x| / median |x|, largest over layers",
        direction="lower",
        reduction="max",
        cadence=_FORWARD_HOOK,
        cost="with activation/kurtosis",
    ),
    Signal(
        "spectral/one_sided",
        "share of the sampled layers whose inputs have come to lie on one side of their leading singular vector",
        formula="share of layers with max(p₊, 1 − p₊) > 0.95 and 0.2 above its start, p₊ = share of cos(h, v₁) > 0",
        unit="fraction",
        direction="lower",
        cadence=_FORWARD_HOOK,
        cost="two products of a weight with a vector per layer",
    ),
    Signal(
        "spectral/sign_collapse",
        "how one-sided the inputs of linear layers are along their leading singular vector, mean over sampled layers",
        formula="mean max(p₊, 1 − p₊)",
        unit="fraction",
        direction="lower",
        cadence=_FORWARD_HOOK,
        cost="with spectral/one_sided",
    ),
    Signal(
        "spectral/alignment",
        "mean alignment of inputs with the leading singular vector of their weight, mean over sampled layers",
        formula="mean |mean cos(h, v₁)|",
        direction="lower",
        cadence=_FORWARD_HOOK,
        cost="with spectral/one_sided",
    ),
)

_ROUTED = "every step of a mixture of experts whose routes are recorded or replayed"
_BROUGHT = "every step whose completions brought routes along"
_SHIFTED = "every step whose objective reads the router shift"

ROUTES = (
    Signal(
        "routes/agreement/<layer>",
        "share of the tokens for which the trainer's router of this decoder layer would choose the experts brought",
        formula="mean[trainer's choice = experts brought, as sets], given the layers below",
        unit="fraction",
        direction="higher",
        cadence=_BROUGHT,
    ),
    Signal(
        "routes/flip_share",
        "share of the (token, layer) pairs that ran other experts than the route that came with the token: 0 under "
        "replay",
        formula="mean[experts run ≠ experts brought, as sets]",
        unit="fraction",
        direction="lower",
        cadence=_BROUGHT,
    ),
    Signal(
        "routes/own_flip_share",
        "share of the (token, layer) pairs at which the trainer's routers would choose otherwise",
        formula="mean[trainer's choice ≠ experts brought, as sets], given the layers below",
        unit="fraction",
        direction="lower",
        cadence=_BROUGHT,
    ),
    Signal(
        "routes/flipped_layers",
        "layers per token at which the trainer's routers would choose otherwise",
        unit="layers",
        direction="lower",
        cadence=_BROUGHT,
    ),
    Signal(
        "routes/flipped_tokens",
        "share of the tokens with such a layer",
        unit="fraction",
        direction="lower",
        cadence=_BROUGHT,
    ),
    Signal(
        "routes/k3_agreeing",
        "distance of trainer and sampler on tokens whose routes agree in all layers",
        formula="mean(ρ − 1 − Δ), estimates KL(sampler‖trainer)",
        unit="nats/token",
        direction="lower",
        cadence=_BROUGHT,
    ),
    Signal(
        "routes/k3_flipped",
        "distance of trainer and sampler on the other tokens",
        formula="mean(ρ − 1 − Δ), estimates KL(sampler‖trainer)",
        unit="nats/token",
        direction="lower",
        cadence=_BROUGHT,
    ),
    Signal(
        "routes/load_entropy",
        "how evenly the experts are used, mean over the layers: 1 if all get as many tokens, 0 if one gets all",
        formula="H(load of the layer) / ln E",
        direction="higher",
        cadence=_ROUTED,
    ),
    Signal(
        "routes/load_entropy_min",
        "the same in the layer that uses its experts least evenly",
        direction="higher",
        reduction="min",
        cadence=_ROUTED,
    ),
    Signal(
        "routes/dead_experts",
        "experts, over all layers, that got no token of the step",
        unit="experts",
        direction="lower",
        reduction="max",
        cadence=_ROUTED,
    ),
    Signal(
        "routes/shift",
        "router-shift ratio: how little the routers have moved since the old policy, before any floor",
        formula="mean exp(−mean_{l,k} |log r − log r_old|) at the old policy's experts",
        direction="higher",
        cadence=_SHIFTED,
    ),
    Signal("routes/shift_p10", "10 % quantile of the router-shift ratio", direction="higher", cadence=_SHIFTED),
    Signal("routes/shift_p50", "median of the router-shift ratio", direction="higher", cadence=_SHIFTED),
    Signal(
        "routes/shift_min",
        "smallest router-shift ratio of a token",
        direction="higher",
        reduction="min",
        cadence=_SHIFTED,
    ),
    Signal(
        "routes/shift_floored",
        "share of the tokens whose router-shift ratio is below 0.8, the floor of the paper",
        unit="fraction",
        direction="lower",
        cadence=_SHIFTED,
    ),
)

_EVALUATIONS = "at evaluations"
_EVALUATION_COST = "sampling on the held-out prompts"

EVALUATION = (
    *with_se(
        Signal(
            "eval/pass@<k>",
            "chance that at least one of <k> completions of a held-out prompt is right",
            formula="mean_prompts 1 − C(n − c, <k>) / C(n, <k>), c of n completions right",
            unit="fraction",
            direction="higher",
            cadence=_EVALUATIONS,
            cost=_EVALUATION_COST,
        )
    ),
    *with_se(
        Signal(
            "eval/reward",
            "mean reward on held-out prompts",
            unit="reward",
            direction="higher",
            cadence=_EVALUATIONS,
            cost=_EVALUATION_COST,
        )
    ),
    Signal(
        "eval/reward_gap",
        "how much more the training reward has gained than the held-out one",
        formula="((R_t − R_0) − (E_t − E_0)) / σ_0, E eval/reward, R and σ 10-step means of train/reward and its std",
        unit="σ_0",
        direction="lower",
        cadence=_EVALUATIONS,
    ),
    *with_se(
        Signal(
            "eval/entropy",
            "entropy of the policy on held-out prompts",
            formula="mean_t H(π(·|prefix_t))",
            unit="nats/token",
            cadence=_EVALUATIONS,
            cost=_EVALUATION_COST,
        )
    ),
    *with_se(
        Signal(
            "eval/length",
            "mean length of the completions of held-out prompts",
            unit="tokens",
            cadence=_EVALUATIONS,
            cost=_EVALUATION_COST,
        )
    ),
    *with_se(
        Signal(
            "eval/kl",
            "how far the policy has moved from its start on held-out prompts",
            formula="mean_t KL(π(·|prefix_t) ‖ π_initial(·|prefix_t)), exact over the vocabulary",
            unit="nats/token",
            direction="lower",
            cadence=_EVALUATIONS,
            cost=_EVALUATION_COST,
        )
    ),
)
