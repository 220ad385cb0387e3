"""What every embedded task must hold to."""

import random
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlstab.errors import ConfigError
from rlstab.models import tiny_tokenizer
from rlstab.tasks import (
    Arithmetic,
    Countdown,
    EmbeddedTask,
    HackableSort,
    KnightsAndKnaves,
    RunningSum,
    SortDigits,
    Split,
    TwoSkills,
    split_of,
)

TASKS: list[EmbeddedTask] = [
    SortDigits(digits=2),
    SortDigits(),
    SortDigits(digits=12),
    Countdown(numbers=2),
    Countdown(),
    Countdown(numbers=9),
    Arithmetic(),
    Arithmetic(digits=1, operands=3, operators="-", reverse=True),
    Arithmetic(digits=6, operands=4, operators="+-*"),
    RunningSum(digits=12),
    HackableSort(),
    KnightsAndKnaves(),
    KnightsAndKnaves(people=4),
    KnightsAndKnaves(language="english"),
    TwoSkills(),
    TwoSkills(trained=RunningSum(), kept=KnightsAndKnaves(), share=0.2, tested="both"),
]
SPLITS: tuple[Split, ...] = ("train", "test")

every_task = pytest.mark.parametrize("task", TASKS, ids=repr)


def rewards(task: EmbeddedTask, rows: dict[str, list[Any]], completions: list[str]) -> list[float | None]:
    columns = {column: values for column, values in rows.items() if column != "prompt"}
    return task.reward(rows["prompt"], completions, **columns)


def identity(task: EmbeddedTask, prompt: str) -> object:
    """A prompt without what makes no difference to the problem: what must not be shared between the splits."""
    match task:
        case SortDigits() | HackableSort() | Countdown():
            digits, _, rest = prompt.removesuffix("=").partition(":")
            return "".join(sorted(digits)), rest
        case Arithmetic(operators="+"):
            return tuple(sorted(prompt.removesuffix("=").split("+")))
        case KnightsAndKnaves():
            return puzzle(task, prompt)
        case TwoSkills():
            return prompt[0], identity(task.trained if prompt[0] == "A" else task.kept, prompt[1:])
    return prompt


def puzzle(task: KnightsAndKnaves, prompt: str) -> list[str]:
    """What is said in a puzzle, under the renaming of its people that comes first."""
    english = task.language == "english"
    people = ["Ada", "Ben", "Cleo", "Dan", "Eve"] if english else list("ABCDE")
    names, said = people[: task.people], prompt.split("\n")[1:-2] if english else prompt.removesuffix("?").split(";")
    assert len(said) == task.people
    name = "|".join(names)

    def renamed(new: dict[str, str]) -> list[str]:
        lines = [re.sub(name, lambda found: new[found[0]], line) for line in said]
        pair = re.compile(rf"({name})( and |=|/)({name})")
        return sorted(pair.sub(lambda m: m[2].join(sorted((m[1], m[3]))), line) for line in lines)

    return min(renamed(dict(zip(names, order, strict=True))) for order in permutations(names))


@given(key=st.text())
def test_every_key_has_one_split(key: str) -> None:
    assert split_of(key) in SPLITS
    assert split_of(key) == split_of(key)


def test_about_one_key_in_five_is_held_out() -> None:
    held_out = sum(split_of(str(key)) == "test" for key in range(10_000))
    assert abs(held_out - 2_000) < 4 * 40


def test_splits_and_draws_do_not_depend_on_the_process() -> None:
    program = (
        "from rlstab.tasks import SortDigits, split_of; "
        "print([split_of(str(key)) for key in range(50)], SortDigits().prompts(5, seed=3)['prompt'][:])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env={"PYTHONHASHSEED": "7"}
    )
    here = [split_of(str(key)) for key in range(50)], SortDigits().prompts(5, seed=3)["prompt"][:]
    assert printed.stdout.strip() == f"{here[0]} {here[1]}"


@every_task
def test_splits_are_disjoint_up_to_the_order_of_digits(task: EmbeddedTask) -> None:
    train = {str(identity(task, prompt)) for prompt in task.prompts(200, split="train", seed=1)["prompt"]}
    test = {str(identity(task, prompt)) for prompt in task.prompts(200, split="test", seed=2)["prompt"]}
    assert train
    assert test
    assert not train & test


@every_task
def test_demonstrations_never_show_a_held_out_problem(task: EmbeddedTask) -> None:
    shown = {str(identity(task, prompt)) for prompt in task.demonstrations(200, seed=1)["prompt"]}
    held_out = {str(identity(task, prompt)) for prompt in task.prompts(200, split="test", seed=1)["prompt"]}
    assert not shown & held_out


@every_task
@given(seed=st.integers(0, 2**32))
def test_a_drawn_solution_is_correct_and_fits(task: EmbeddedTask, seed: int) -> None:
    problem = task.draw(random.Random(seed))
    assert task.score(problem.solution, problem.answer) == 1.0
    assert 1 <= len(problem.solution) <= task.completion_length
    assert set(problem.prompt + problem.solution) <= set(task.alphabet)
    assert set(problem.answer) == set(task.answer_columns)


@every_task
@pytest.mark.parametrize("split", SPLITS)
def test_prompts_have_the_answer_columns_and_follow_the_seed(task: EmbeddedTask, split: Split) -> None:
    rows = task.prompts(20, split=split, seed=5)
    assert rows.column_names == ["prompt", *task.answer_columns]
    assert rows.num_rows == 20
    assert rows[:] == task.prompts(20, split=split, seed=5)[:]
    assert rows["prompt"][:] != task.prompts(20, split=split, seed=6)["prompt"][:]


@every_task
def test_the_alphabet_makes_a_tokenizer_that_covers_the_task(task: EmbeddedTask) -> None:
    tokenizer = tiny_tokenizer(task.alphabet)
    for row in task.demonstrations(20):
        text = row["prompt"] + row["completion"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@every_task
def test_noise_is_the_share_of_demonstrations_with_one_wrong_digit(task: EmbeddedTask) -> None:
    clean = task.demonstrations(500, seed=4)
    for noise, n in ((0.0, 100), (0.7, 500), (1.0, 100)):
        noisy = task.demonstrations(n, seed=4, noise=noise)
        assert noisy["prompt"][:] == clean["prompt"][:n]

        changed = 0
        for prompt, right, shown in zip(noisy["prompt"], clean["completion"][:n], noisy["completion"], strict=True):
            differing = [index for index, (a, b) in enumerate(zip(right, shown, strict=True)) if a != b]
            assert len(differing) <= 1, prompt
            assert all(shown[index].isdigit() for index in differing), prompt
            changed += len(differing)
        spread = (noise * (1 - noise) / n) ** 0.5
        assert abs(changed / n - noise) <= 4 * spread


@every_task
def test_every_changed_demonstration_is_incorrect(task: EmbeddedTask) -> None:
    rng = random.Random(0)
    problems = [task.draw(rng) for _ in range(100)]
    rows = {"prompt": [problem.prompt for problem in problems]} | {
        column: [problem.answer[column] for problem in problems] for column in task.answer_columns
    }
    assert rewards(task, rows, [problem.solution for problem in problems]) == [1.0] * 100
    wrong = []
    for problem in problems:
        position = rng.choice([index for index, char in enumerate(problem.solution) if char.isdigit()])
        digit = (int(problem.solution[position]) + rng.randint(1, 9)) % 10
        wrong.append(f"{problem.solution[:position]}{digit}{problem.solution[position + 1 :]}")
    assert rewards(task, rows, wrong) == [0.0] * 100


@every_task
def test_impossible_requests_are_refused(task: EmbeddedTask) -> None:
    with pytest.raises(ConfigError, match="n 0; expected at least 1"):
        task.prompts(0)
    with pytest.raises(ConfigError, match=r"noise 1\.5; expected a probability"):
        task.demonstrations(1, noise=1.5)


def test_an_unknown_split_is_refused(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--shapes"):
        pytest.skip("the type check refuses it first")
    with pytest.raises(ConfigError, match=r"split 'dev'; expected one of \('train', 'test'\)"):
        SortDigits().prompts(1, split="dev")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (SortDigits, "digits"),
        (HackableSort, "digits"),
        (RunningSum, "digits"),
        (Countdown, "numbers"),
        (KnightsAndKnaves, "people"),
        (Arithmetic, "operands"),
    ],
)
@pytest.mark.parametrize("value", [1, 13])
def test_difficulty_outside_its_range_is_refused(make: type[EmbeddedTask], key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{key} {value}; expected between [23] and"):
        make(**{key: value})


def test_tasks_are_frozen_values() -> None:
    task = SortDigits()
    assert task == SortDigits(digits=6)
    with pytest.raises(FrozenInstanceError):
        task.digits = 4  # type: ignore[misc]
