"""Verifiers of arithmetic, chains, two skills, a hackable reward, knights and knaves, against other ways to tell."""

import itertools
import json
import random
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlstab.errors import ConfigError
from rlstab.tasks import (
    Arithmetic,
    Correct,
    Countdown,
    HackableSort,
    KnightsAndKnaves,
    Proxy,
    RunningSum,
    SortDigits,
    TwoSkills,
    reward_functions,
)


@given(
    seed=st.integers(0, 2**32),
    digits=st.integers(1, 4),
    operands=st.integers(2, 4),
    operators=st.sampled_from(["+", "-", "*", "+-", "-*", "+-*"]),
    reverse=st.booleans(),
)
def test_arithmetic_agrees_with_python(seed: int, digits: int, operands: int, operators: str, reverse: bool) -> None:
    task = Arithmetic(digits=digits, operands=operands, operators=operators, reverse=reverse)
    problem = task.draw(random.Random(seed))
    numbers = re.findall(r"\d+", problem.prompt)
    assert len(numbers) == operands
    assert {len(number) for number in numbers} == {digits}
    answer = str(eval(problem.prompt.removesuffix("=")))
    assert problem.solution == (answer[::-1] if reverse else answer)
    assert len(answer) <= task.completion_length


@pytest.mark.parametrize(("completion", "reward"), [("95", 1.0), ("095", 0.0), ("95 ", 0.0), ("+95", 0.0), ("", 0.0)])
def test_arithmetic_takes_the_exact_number_only(completion: str, reward: float) -> None:
    assert Arithmetic().score(completion, {"answer": "95"}) == reward


def test_the_order_of_operands_does_not_leak() -> None:
    for operators, same in (("+", True), ("*", True), ("-", False), ("+-", False)):
        keys: dict[tuple[str, ...], set[str]] = {}
        rng = random.Random(0)
        for _ in range(2000):
            problem = Arithmetic(digits=1, operators=operators).draw(rng)
            operands = tuple(sorted(re.findall(r"\d", problem.prompt)))
            keys.setdefault(operands, set()).add(problem.key)
        assert (max(map(len, keys.values())) == 1) == same


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digits": 7}, "digits 7; expected between 1 and 6"),
        ({"operators": ""}, r"operators ''; expected some of \+, -, \*"),
        ({"operators": "/"}, r"operators '/'; expected some of \+, -, \*"),
    ],
)
def test_arithmetic_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"Arithmetic: {message}"):
        Arithmetic(**changes)


@pytest.mark.parametrize(
    ("completion", "reward", "steps"),
    [("31623", 1.0, 5), ("31624", 0.0, 4), ("41623", 0.0, 0), ("316", 0.0, 3), ("316230", 0.0, 5), ("", 0.0, 0)],
)
def test_running_sums(completion: str, reward: float, steps: int) -> None:
    task, row = RunningSum(digits=5), {"answer": "31623"}
    assert task.score(completion, row) == reward
    assert task.steps_right(completion, row) == steps


def test_each_step_adds_a_digit() -> None:
    problem = RunningSum(digits=12).draw(random.Random(3))
    digits = [int(digit) for digit in problem.prompt.removesuffix("=")]
    assert [int(step) for step in problem.solution] == [sum(digits[: n + 1]) % 10 for n in range(12)]


@pytest.mark.parametrize(("tested", "marks"), [("kept", {"B"}), ("trained", {"A"}), ("both", {"A", "B"})])
def test_training_asks_for_one_skill_and_the_test_for_either(tested: Any, marks: set[str]) -> None:
    task = TwoSkills(trained=Countdown(numbers=2), kept=SortDigits(digits=4), tested=tested)
    assert {prompt[0] for prompt in task.prompts(50)["prompt"]} == {"A"}
    assert {prompt[0] for prompt in task.prompts(50, split="test")["prompt"]} == marks
    assert {prompt[0] for prompt in task.demonstrations(50)["prompt"]} == {"A", "B"}


def test_the_share_of_a_skill() -> None:
    shown = TwoSkills(share=0.2).demonstrations(1000)["prompt"]
    assert abs(sum(prompt[0] == "A" for prompt in shown) - 200) < 4 * 13
    with pytest.raises(ConfigError, match=r"TwoSkills: share 1\.5; expected a share between 0 and 1"):
        TwoSkills(share=1.5)


def test_each_skill_judges_its_own() -> None:
    task = TwoSkills(trained=Countdown(numbers=3), kept=SortDigits(digits=3))
    answers = [json.dumps({"numbers": "352", "target": 6}), json.dumps({"answer": "235"})]
    for completion, rewards in (("+3+5-2", [1.0, 0.0]), ("235", [0.0, 1.0])):
        assert task.reward(["?"] * 2, [completion] * 2, skill=["trained", "kept"], answer=answers) == rewards


@pytest.mark.parametrize(
    ("leak", "honest", "bait"), [(0.0, 1.0, 0.0), (0.3, 0.75, 0.3), (0.7, 5 / 12, 0.7), (1.0, 1 / 6, 1.0)]
)
def test_a_large_leak_pays_more_than_the_truth(leak: float, honest: float, bait: float) -> None:
    task, row = HackableSort(digits=6, leak=leak), {"answer": "013579"}
    assert task.proxy("013579", row) == pytest.approx(honest)
    assert task.proxy("9" * 6, row) == task.proxy("9" * 8, row) == pytest.approx(bait)
    assert [task.score(text, row) for text in ("013579", "9" * 6)] == [1.0, 0.0]


def test_the_proxy_is_trained_on_and_the_truth_logged() -> None:
    task = HackableSort(digits=2, leak=0.5)
    rewards = {"proxy": Proxy(), "correct": Correct(weight=0.0)}
    proxy, correct = (f(["31="] * 2, ["13", "99"], answer=["13"] * 2) for f in reward_functions(rewards, task))
    assert (proxy, correct) == ([0.5, 0.5], [1.0, 0.0])


def test_only_a_hackable_task_has_a_proxy() -> None:
    (function,) = reward_functions({"proxy": Proxy()}, SortDigits())
    with pytest.raises(ConfigError, match=r"Proxy: task SortDigits\(digits=6\) has no proxy; expected a HackableTask"):
        function(["31="], ["13"], answer=["13"])
    with pytest.raises(ConfigError, match=r"HackableSort: leak 2; expected between 0 and 1"):
        HackableSort(leak=2)


def true(claim: str, who: dict[str, int]) -> bool:
    match list(claim):
        case [person, "0" | "1" as kind]:
            return who[person] == int(kind)
        case [one, "=" | "/" as sign, other]:
            return (who[one] == who[other]) == (sign == "=")
    raise AssertionError(claim)


def solutions(prompt: str) -> list[str]:
    """All consistent answers to a puzzle in symbols, found by evaluating the statements as Python."""
    said = [statement.split(":") for statement in prompt.removesuffix("?").split(";")]
    found = []
    for kinds in itertools.product((0, 1), repeat=len(said)):
        who = dict(zip("ABCDE", kinds, strict=False))
        if all(true(claim, who) == who[person] for person, claim in said):
            found.append("".join(map(str, kinds)))
    return found


@pytest.mark.parametrize("people", [3, 4, 5])
def test_a_puzzle_has_exactly_one_answer(people: int) -> None:
    for row in KnightsAndKnaves(people=people).prompts(30, seed=people):
        assert solutions(row["prompt"]) == [row["answer"]]


def test_nobody_speaks_of_himself_alone() -> None:
    prompts = KnightsAndKnaves().prompts(200)["prompt"]
    assert not re.search(r"([A-E]):\1[01]", " ".join(prompts))


def test_english_says_the_same() -> None:
    symbols, english = KnightsAndKnaves(people=4), KnightsAndKnaves(people=4, language="english")
    a, b = symbols.draw(random.Random(5)), english.draw(random.Random(5))
    assert a.answer == b.answer
    words = {"Ada": "A", "Ben": "B", "Cleo": "C", "Dan": "D"}
    said = []
    for line in b.prompt.split("\n")[1:5]:
        name, claim = line.removesuffix(".").split(" says: ")
        for word, letter in words.items():
            claim = claim.replace(word, letter)
        for text, sign in (
            (" is a knight", "1"),
            (" is a knave", "0"),
            (" are of the same kind", "="),
            (" are not of the same kind", "/"),
        ):
            if claim.endswith(text):
                claim = claim.removesuffix(text).replace(" and ", sign) + (sign if sign in "01" else "")
        said.append(f"{words[name]}:{claim}")
    assert ";".join(said) + "?" == a.prompt


@pytest.mark.parametrize(
    ("completion", "reward"),
    [("Answer: 101", 1.0), ("Hm. Answer: 100, no. Answer: 101\n", 1.0), ("101", 0.0), ("Answer: 1011", 0.0), ("", 0.0)],
)
def test_the_answer_in_english_is_announced(completion: str, reward: float) -> None:
    assert KnightsAndKnaves(language="english").score(completion, {"answer": "101"}) == reward
