import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from rlstab.tasks import Countdown, SortDigits, Task


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("012359", 1.0),
        ("012395", 0.0),
        ("01235", 0.0),
        ("0123599", 0.0),
        ("", 0.0),
        (" 012359", 0.0),
        ("012359\n", 0.0),
    ],
)
def test_sort_digits_takes_the_exact_answer_only(completion: str, reward: float) -> None:
    assert SortDigits().reward(["503912="], [completion], answer=["012359"]) == [reward]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("+3+5-2", 1.0),
        ("-2+5+3", 1.0),
        ("+6", 0.0),  # not one of the digits
        ("+3+3", 0.0),  # a digit used twice
        ("+5+2", 0.0),  # another total
        ("3+5-2", 0.0),  # no sign
        ("+3+5-2=", 0.0),
        ("+3+5-2\n", 0.0),
        ("++35-2", 0.0),
        ("+٣+5-2", 0.0),  # a digit, but not an ASCII one
        ("+", 0.0),
        ("", 0.0),
    ],
)
def test_countdown_takes_every_affordable_sum_that_hits_the_target(completion: str, reward: float) -> None:
    assert Countdown().reward(["352:+06="], [completion], numbers=["352"], target=[6]) == [reward]


def test_countdown_lets_a_repeated_digit_be_used_as_often_as_it_is_given() -> None:
    task = Countdown()
    assert task.reward(["332:+06="] * 2, ["+3+3", "+3+3+3"], numbers=["332"] * 2, target=[6, 9]) == [1.0, 0.0]


@given(numbers=st.text("0123456789", min_size=2, max_size=3), target=st.integers(-27, 27))
def test_countdown_agrees_with_the_enumeration_of_all_answers(numbers: str, target: int) -> None:
    answers = {
        "".join(sign + digit for sign, digit in zip(signs, digits, strict=True))
        for size in range(1, len(numbers) + 1)
        for digits in itertools.permutations(numbers, size)
        for signs in itertools.product("+-", repeat=size)
        if sum(int(sign + digit) for sign, digit in zip(signs, digits, strict=True)) == target
    }
    two_terms = {"".join(parts) for parts in itertools.product("+-", "0259", "+-", "0259")} | answers
    task = Countdown(numbers=len(numbers))
    row = {"numbers": numbers, "target": target}
    assert {text for text in two_terms if task.score(text, row)} == {text for text in two_terms if text in answers}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    task: Task


@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [("SortDigits", "digits", SortDigits(digits=4)), ("Countdown", "numbers", Countdown(numbers=4))],
)
def test_a_recipe_names_a_task_by_its_class(name: str, key: str, expected: Task, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"recipe:\n  task: {{class_path: {name}, init_args: {{{key}: 3}}}}\n")
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Recipe, "recipe")
    parsed = parser.parse_args([f"--config={recipe}", f"--recipe.task.{key}=4"])
    assert parser.instantiate(parsed).recipe == Recipe(task=expected)
