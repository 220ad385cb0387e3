"""Thoughts left out, prompts by their influence, the temperature, weights of tasks, restarts and repeated attempts."""

import inspect
import math
import random
from collections import Counter
from typing import Any

import pytest
from datasets import Dataset
from transformers.utils.chat_template_utils import get_json_schema

from rlstab.errors import ConfigError, RewardError
from rlstab.tasks import (
    ConvergenceBalance,
    MatchesPattern,
    RestartBonus,
    SortDigits,
    TagFormat,
    TryAgain,
    UnaryFeedback,
    choose_temperature,
    draw_prompts,
    drop_thoughts,
    prompt_influence,
    restart_row,
    reward_pass_at,
)

THOUGHT = "<think>first\nthis</think><answer>4</answer>"


def test_thought_dropout() -> None:
    shown = drop_thoughts([THOUGHT] * 1000, seed=1)
    counts = Counter(shown)
    assert set(counts) == {THOUGHT, "<think>\n\n</think><answer>4</answer>"}
    assert abs(counts[THOUGHT] - 500) < 4 * 16
    assert shown == drop_thoughts([THOUGHT] * 1000, seed=1) != drop_thoughts([THOUGHT] * 1000, seed=2)
    assert set(TagFormat(around="space")(["?"] * 1000, shown)) == {1.0}


@pytest.mark.parametrize(("probability", "kept"), [(0.0, 3), (1.0, 0)])
def test_all_thoughts_or_none(probability: float, kept: int) -> None:
    assert drop_thoughts([THOUGHT] * 3, probability=probability).count(THOUGHT) == kept


def test_a_completion_without_a_thought_is_kept() -> None:
    assert drop_thoughts(["<answer>4</answer>"], probability=1.0) == ["<answer>4</answer>"]
    with pytest.raises(ConfigError, match=r"drop_thoughts: probability 2\.0; expected between 0 and 1"):
        drop_thoughts([], probability=2.0)


def test_influence_of_a_prompt() -> None:
    influences = [prompt_influence(accuracy) for accuracy in (0.0, 0.25, 0.5, 1.0)]
    assert influences == pytest.approx([0.0, 0.4330127018922193, 0.5, 0.0])
    with pytest.raises(ConfigError, match=r"prompt_influence: accuracy 1\.5; expected a share"):
        prompt_influence(1.5)


def test_prompts_are_drawn_in_proportion() -> None:
    prompts = Dataset.from_dict({"prompt": ["a", "b", "c"]})
    drawn = Counter(draw_prompts(prompts, [1.0, 0.0, 3.0], 4000, seed=2)["prompt"])
    assert drawn.keys() == {"a", "c"}
    assert abs(drawn["a"] - 1000) < 4 * 28


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_weights_that_cannot_be_drawn_from(weights: list[float]) -> None:
    with pytest.raises(
        ConfigError, match="draw_prompts: expected a weight of at least 0 for each of 2 rows, not all 0"
    ):
        draw_prompts(Dataset.from_dict({"prompt": ["a", "b"]}), weights, 1)


def test_reward_pass_at() -> None:
    scores = [[0.1, 0.9, 0.5], [0.3, 0.2, 0.1], [0.1, 0.2, 0.3]]
    correct = [[True, False, False], [False, True, False], [False, False, False]]
    assert [reward_pass_at(scores, correct, k=k) for k in (1, 2, 3)] == pytest.approx([0.0, 1 / 3, 2 / 3])


@pytest.mark.parametrize(
    ("scores", "correct", "k"),
    [([], [], 1), ([[0.1]], [[True]], 2), ([[0.1]], [[True]], 0), ([[0.1, 0.2]], [[True]], 1), ([[0.1]], [], 1)],
)
def test_reward_pass_at_refuses(scores: list[list[float]], correct: list[list[bool]], k: int) -> None:
    with pytest.raises(ConfigError, match="reward_pass_at: expected a score and a verdict for each response"):
        reward_pass_at(scores, correct, k=k)


def test_the_best_temperature() -> None:
    measured: list[float] = []

    def flat(temperature: float) -> float:
        measured.append(temperature)
        return 1.0

    assert choose_temperature(flat) == 0.3
    assert measured == [round(0.1 * tenths, 1) for tenths in range(3, 17)]
    assert choose_temperature(lambda temperature: temperature, temperatures=(1.0, 0.5)) == 1.0
    for refused in ((), (0.0, 1.0)):
        with pytest.raises(ConfigError, match="choose_temperature: temperatures"):
            choose_temperature(flat, temperatures=refused)


def test_a_restart_keeps_some_steps() -> None:
    rows = [restart_row("p ", ["a ", "b ", "c "], right=True, rng=random.Random(seed)) for seed in range(100)]
    assert {row["prompt"] for row in rows} == {f"p {kept}<|reflect|>" for kept in ("a ", "a b ", "a b c ")}
    assert {row["restart"] for row in rows} == {1}
    with pytest.raises(ConfigError, match="restart_row: steps is empty; expected an attempt of at least one step"):
        restart_row("p", [], right=True, rng=random.Random(0))


@pytest.mark.parametrize(
    ("restart", "completion", "bonus"),
    [
        (-1, "right", 0.25),
        (-1, "wrong", 0.0),
        (1, "right", 0.0),
        (1, "wrong", -0.25),
        (0, "right", 0.0),
        (0, "wrong", 0.0),
    ],
)
def test_the_bonus_of_a_restart(restart: int, completion: str, bonus: float) -> None:
    part = RestartBonus(scale=0.25, correct=MatchesPattern(pattern="right"))
    assert part(["?"], [completion], restart=[restart]) == [bonus]
    with pytest.raises(ConfigError, match=r"RestartBonus: scale -1; expected at least 0"):
        RestartBonus(scale=-1)


def attempt(*answers: str, attempts: int = 5) -> TryAgain:
    environment = TryAgain(SortDigits(digits=3), attempts=attempts)
    environment.reset(prompt="503=", answer="035", other=1)
    for answer in answers:
        environment.submit(answer)
    return environment


@pytest.mark.parametrize(
    ("answers", "reward"),
    [
        (("035",), 1.0),
        (("503", "035"), 0.5),
        (("503", "503", "035"), 0.25 - 0.5 / 3),
        (("503", " 50 3", "", "5 0 3"), -0.5 * (1 - 1 / 3)),
        (("503", "530"), 0.0),
        (("", " "), 0.0),
        ((), 0.0),
    ],
)
def test_the_reward_of_repeated_attempts(answers: tuple[str, ...], reward: float) -> None:
    assert UnaryFeedback()(["?"], ["..."], environments=[attempt(*answers)]) == [pytest.approx(reward)]


def test_feedback_says_no_more_than_wrong() -> None:
    environment = attempt(attempts=2)
    said = [environment.submit(answer) for answer in ("503", "305", "035")]
    assert said == ["Incorrect. Please think again."] * 2 + ["No attempt is left."]
    assert (environment.answers, environment.solved) == (["503", "305"], False)
    environment.reset(answer="035")
    assert [environment.submit(answer) for answer in ("035", "503")] == ["Correct!"] * 2
    assert (environment.answers, environment.solved) == (["035"], True)


def test_the_host_can_offer_it_as_a_tool() -> None:
    tools = {name for name, _ in inspect.getmembers(TryAgain, inspect.isfunction) if not name.startswith("_")}
    assert tools == {"reset", "submit"}
    schema = get_json_schema(attempt().submit)["function"]
    assert schema["name"] == "submit"
    assert schema["parameters"]["required"] == ["answer"]


def test_repeated_attempts_need_their_environment() -> None:
    with pytest.raises(RewardError, match=r"^UnaryFeedback: column 'environments' is missing"):
        UnaryFeedback()(["?"], ["..."])
    with pytest.raises(RewardError, match=r"environment 3; expected TryAgain, by the trainer's environment_factory"):
        UnaryFeedback()(["?"], ["..."], environments=[3])
    with pytest.raises(ConfigError, match=r"UnaryFeedback: decay 2\.0; expected between 0 and 1"):
        UnaryFeedback(decay=2.0)


def losses(step: int) -> dict[str, float]:
    """One task converges fast, one slowly, one turns upwards after a while."""
    return {"a": 2 * math.exp(-0.3 * step), "b": 1 - 0.02 * step, "c": 0.5 * (1 - 0.1 * step + 0.012 * step**2)}


AUTHORS = {  # observations: weights that the authors' code gives for the same losses
    4: [0.134716, 0.565106, 0.300178],
    7: [0.134575, 0.471877, 0.393548],
    8: [0.195595, 0.434930, 0.369475],
    12: [0.322416, 0.549709, 0.127876],
}


def test_convergence_balance_agrees_with_the_authors_code() -> None:
    balance = ConvergenceBalance("abc", warmup=4)
    for count in range(1, 13):
        balance.observe(losses(count - 1))
        weights = list(balance.weights().values())
        assert sum(weights) == pytest.approx(1.0)
        if count < 4:
            assert weights == [1 / 3] * 3
        if count in AUTHORS:
            assert weights == pytest.approx(AUTHORS[count], abs=1e-6)


def test_a_window_forgets() -> None:
    early, late = ConvergenceBalance("ab", warmup=2, window=3), ConvergenceBalance("ab", warmup=2, window=3)
    for first, balance in ((5.0, early), (3.0, late)):
        for a, b in ((1.0, 1.0), (first, 0.9), (0.8, 0.8), (0.7, 0.75), (0.6, 0.7)):
            balance.observe({"a": a, "b": b})
    assert early._slopes[-1] == pytest.approx(late._slopes[-1])
    assert early._slopes[-1] == pytest.approx([-0.1, -0.05])


def test_no_task_is_dropped_and_standstill_is_no_fault() -> None:
    steep = ConvergenceBalance("abcdefgh", warmup=2)
    for step in range(5):
        steep.observe({name: 1.0 + (0.2 if name == "a" else -0.05) * step for name in "abcdefgh"})
    assert min(steep.weights().values()) >= 0.1 / 8
    still = ConvergenceBalance("ab", warmup=2)
    for _ in range(4):
        still.observe({"a": 1.0, "b": 2.0})
    assert list(still.weights().values()) == pytest.approx([0.5, 0.5])


def test_a_balance_goes_on_from_its_state() -> None:
    whole, resumed = ConvergenceBalance("abc", warmup=3), ConvergenceBalance("abc", warmup=3)
    for step in range(5):
        whole.observe(losses(step))
    resumed.load_state_dict(whole.state_dict())
    for balance in (whole, resumed):
        balance.observe(losses(5))
    assert resumed.weights() == whole.weights()
    whole.observe(losses(6))
    assert resumed.state_dict() != whole.state_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["a"]}, r"tasks \['a'\]; expected two different names or more"),
        ({"tasks": ["a", "a"]}, r"tasks \['a', 'a'\]; expected two different names"),
        ({"warmup": 1}, "warmup 1; expected at least 2"),
        ({"window": 1}, "window 1; expected at least 2"),
        ({"tau": 0}, "tau 0; expected a number above 0"),
    ],
)
def test_a_balance_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"ConvergenceBalance: {message}"):
        ConvergenceBalance(**{"tasks": ["a", "b"], **changes})


@pytest.mark.parametrize(
    "observed", [{"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0, "b": math.nan}]
)
def test_losses_that_cannot_be_observed(observed: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="ConvergenceBalance: losses"):
        ConvergenceBalance("ab").observe(observed)
