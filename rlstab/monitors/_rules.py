"""Rules: which detector looks at which signal, how bad it is, and what is done. Rules are data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from rlstab.monitors._actions import Action, Note, RollBack, Scale, SkipStep
from rlstab.monitors._checks import check
from rlstab.monitors._detectors import Detector, Level, NonFinite
from rlstab.monitors._fall import Fall
from rlstab.monitors._relative import Drift, Spike
from rlstab.schema import signal

Severity = Literal["note", "warning", "critical"]
"""How bad an alarm is: worth knowing, worth looking, worth acting."""

SEVERITIES: tuple[Severity, ...] = ("note", "warning", "critical")


class Cause(NamedTuple):
    """What alarms of one cause mean.

    Args:
        title: the cause in a few words.
        remedy: what to change.
    """

    title: str
    remedy: str


CAUSES: dict[str, Cause] = {
    "numerics": Cause(
        "a number that is not finite", "lower the learning rate, look at the module named; bf16 instead of fp16"
    ),
    "mismatch": Cause(
        "trainer and sampler have come apart",
        "sync the sampler's weights more often, give it the trainer's dtype, or weigh by TruncatedIS(max=2.0)",
    ),
    "drift": Cause(
        "the policy is far from where it started",
        "lower the learning rate, or hold it by a divergence from `initial`; compare held-out scores with the start's",
    ),
    "optimisation": Cause("the gradient leaves its usual size", "lower the learning rate or max_grad_norm"),
    "exploration": Cause(
        "the policy's entropy leaves its usual range", "add an entropy target or KLCov, or raise the upper clip"
    ),
    "saturation": Cause("most groups teach nothing", "use harder prompts, or filter those that are always solved"),
    "reward": Cause("the reward falls", "go back to a checkpoint before the fall and lower the learning rate"),
    "held_out": Cause(
        "the held-out score falls, or stays behind the reward",
        "look at completions with much reward: where it is won without doing the task, mend the reward; where prompts "
        "are learned by heart, use more of them; else stop here",
    ),
    "length": Cause(
        "the completions change their length", "look at completions that are cut; bound or penalise length"
    ),
    "representation": Cause(
        "activations or attention degenerate", "lower the learning rate; add a z-loss, or normalise queries and keys"
    ),
}
"""The causes of the default rules, by name; a rule may name one of its own."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One signal under one detector.

    Args:
        signal: key of the signal (`rlstab.schema` lists them).
        detector: when it is out of order.
        severity: "note", "warning" or "critical".
        action: what is done, beside the alarm.
        cause: alarms of one cause are one alarm; default: the first segment of the signal's key.
        agreement: families of signals (first segments of keys) of this cause that must be raised before the action is
            taken; the alarm does not wait for it.

    Raises:
        SchemaError: the signal is not in the schema.
        ConfigError: a field is out of its range.

    >>> Rule(signal="mismatch/k3", detector=Level(above=0.5)).cause
    'mismatch'
    """

    signal: str
    detector: Detector
    severity: Severity = "warning"
    action: Action = Note()  # noqa: RUF009  # frozen
    cause: str = ""
    agreement: int = 1

    def __post_init__(self) -> None:
        signal(self.signal)
        check(self.severity in SEVERITIES, "Rule.severity", f"one of {SEVERITIES}", self.severity)
        check(
            isinstance(self.detector, Detector), "Rule.detector", "a detector such as Level(above=0.5)", self.detector
        )
        check(isinstance(self.action, Action), "Rule.action", "an action such as Note()", self.action)
        check(self.agreement >= 1, "Rule.agreement", "at least 1", self.agreement)
        if not self.cause:
            object.__setattr__(self, "cause", self.family)

    @property
    def family(self) -> str:
        """First segment of the signal's key: signals of one family share their noise."""
        return self.signal.partition("/")[0]

    @property
    def title(self) -> str:
        """The cause in words."""
        return CAUSES[self.cause].title if self.cause in CAUSES else self.cause


def default_rules(*, act: bool = False, skips: bool = True) -> tuple[Rule, ...]:
    """The rules of a run about which nothing is known.

    Args:
        act: skip steps that are not finite or far out, halve the learning rate where the policy runs away, go back
            where a collapse has begun, and stop at the best policy where the held-out score falls: what is rewarded
            then is something else; without, every rule notes.
        skips: whether steps can be left out, which DeepSpeed does not allow; without, a run goes back after a loss or a
            gradient that is not finite, and a gradient far out is noted.

    Returns:
        Rules by rising severity within each cause.

    >>> {rule.action for rule in default_rules()}
    {Note()}
    """
    slow: Action = Scale() if act else Note()
    back: Action = RollBack() if act else Note()
    skip: Action = SkipStep() if act and skips else Note()
    return (
        *_of_numbers(skip if skips else back, skip, back),
        *_of_mismatch(back),
        *_of_drift(slow, back),
        *_of_policy(back),
        *_of_held_out(RollBack(remedy=None, stop=True) if act else Note()),
        *_of_completions(),
        *_of_model(),
    )


def _of_numbers(undo: Action, skip: Action, back: Action) -> Sequence[Rule]:
    norm = Spike(scale="log", floor=1e-6, least_spread=0.1, limit=8.0)
    broken = Rule(
        signal="step/bad_gradients",
        detector=Level(above=0.0, steps=1),
        severity="critical",
        action=undo,
        cause="numerics",
    )
    return (
        Rule(signal="step/loss", detector=NonFinite(), severity="critical", action=undo, cause="numerics"),
        broken,
        replace(broken, detector=Level(above=0.0, steps=5), action=back),
        Rule(signal="train/grad_norm", detector=NonFinite(), severity="critical", cause="numerics"),
        Rule(signal="train/grad_norm", detector=norm, action=skip, cause="optimisation"),
    )


def _of_mismatch(back: Action) -> Sequence[Rule]:
    """Between a trainer and its own engine F(2) is nearly 0; only a mismatch that grows is a reason to go back."""
    return (
        Rule(signal="mismatch/k3", detector=Level(above=0.2, clear=0.1, growth=3.0, start=3)),
        Rule(signal="mismatch/f2", detector=Level(above=0.05, clear=0.03)),
        Rule(signal="mismatch/k3", detector=Level(above=0.5, clear=0.3)),
        Rule(
            signal="mismatch/k3",
            detector=Level(above=0.5, clear=0.3, growth=3.0, start=3),
            severity="critical",
            action=back,
        ),
        Rule(signal="mismatch/k3", detector=Level(above=1.0, clear=0.5), severity="critical"),
    )


def _of_drift(slow: Action, back: Action) -> Sequence[Rule]:
    """Sharpening goes far, too: early it is not distance that counts but whether the start would have written it."""
    far = Level(above=1.0, clear=0.5, steps=2)
    return (
        Rule(signal="drift/initial/surprise", detector=Level(above=0.04, clear=0.02, steps=5)),
        Rule(signal="drift/initial/kl", detector=Level(above=0.5, clear=0.3, steps=1), action=slow),
        Rule(signal="drift/initial/kl", detector=far, severity="critical", action=back),
    )


def _of_policy(back: Action) -> Sequence[Rule]:
    """Every run that learns spends entropy; what counts is whether it will be gone soon, or comes back."""
    sinking = Drift(side="low", window=40, renew=True, least_spread=0.05)
    nearing = Level(below=65.0, steps=2)
    return (
        Rule(signal="forecast/policy/entropy", detector=nearing, cause="exploration"),
        Rule(signal="policy/entropy", detector=Level(below=0.05, clear=0.08, growth=5.0, steps=5), cause="exploration"),
        Rule(signal="policy/entropy", detector=Level(above=0.1, growth=1.1, start=5, steps=2), cause="exploration"),
        Rule(signal="train/frac_reward_zero_std", detector=Level(above=0.8, clear=0.7, steps=10), cause="saturation"),
        Rule(signal="train/reward", detector=sinking, cause="reward"),
        Rule(
            signal="train/reward",
            detector=Fall(share=0.85, window=10, noise=5.0),
            severity="critical",
            action=back,
            cause="reward",
        ),
    )


def _of_held_out(back: Action) -> Sequence[Rule]:
    """What training gains alone shows at an evaluation at the earliest, and a fall of the score itself later.

    A gap of a whole spread of the first rewards is no longer a matter of prompts that were learned by heart.
    """
    fallen = Fall(share=0.85, window=2, noise=4.0)
    scores = ("eval/pass@1", "eval/reward")
    return (
        Rule(signal="eval/reward_gap", detector=Level(above=0.25, clear=0.15, steps=1), cause="held_out"),
        Rule(
            signal="eval/reward_gap",
            detector=Level(above=1.0, steps=1),
            severity="critical",
            action=back,
            cause="held_out",
        ),
        *(Rule(signal=key, detector=fallen, severity="critical", action=back, cause="held_out") for key in scores),
    )


def _of_completions() -> Sequence[Rule]:
    shift = Drift(window=40, scale="log", floor=1.0, renew=True, least_spread=0.05)
    detectors = (shift, replace(shift, side="low"))
    cut = Level(above=0.5, clear=0.4, growth=2.0, steps=5)
    return (
        *(Rule(signal="completions/mean_length", detector=detector, cause="length") for detector in detectors),
        Rule(signal="completions/clipped_ratio", detector=cut, cause="length"),
    )


def _of_model() -> Sequence[Rule]:
    return (
        Rule(signal="attention/entropy_min", detector=Level(below=0.05, growth=3.0), cause="representation"),
        Rule(signal="attention/logit_max", detector=Level(above=1e3, growth=3.0), cause="representation"),
        Rule(signal="spectral/one_sided", detector=Level(above=0.2, clear=0.1), cause="representation"),
    )
