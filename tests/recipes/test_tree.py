import re
from pathlib import Path
from typing import Any

import pytest

from rlstab.errors import RecipeError
from rlstab.recipes._tree import changed_keys, hint, load_tree, set_value


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("3", 3), ("true", True), ("null", None), ("", None), ("[1, 8]", [1, 8]), ("fast", "fast")],
)
def test_values_are_yaml(text: str, value: object) -> None:
    tree: dict[str, Any] = {}
    set_value(tree, "trainer.key", text)
    assert tree == {"trainer": {"key": value}}
    assert type(tree["trainer"]["key"]) is type(value)


def test_a_key_below_a_class_is_its_argument() -> None:
    tree: dict[str, Any] = {"coef": {"class_path": "Linear"}}
    set_value(tree, "coef.start", "2.0")
    set_value(tree, "coef.class_path", "Other")
    assert tree == {"coef": {"class_path": "Other", "init_args": {"start": 2.0}}}


def test_a_number_counts_through_a_list() -> None:
    tree: dict[str, Any] = {"weights": ["TruncatedIS", {"class_path": "Veto"}]}
    set_value(tree, "weights.0.max", "3")
    set_value(tree, "weights.1.threshold", "0.1")
    assert tree["weights"] == [
        {"class_path": "TruncatedIS", "init_args": {"max": 3}},
        {"class_path": "Veto", "init_args": {"threshold": 0.1}},
    ]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("seed.more", r"--seed.more: seed is 5 and has no key 'more'"),
        ("seed.more.still", r"--seed.more.still: seed is 5 and has no key 'more'"),
        ("list.2", r"--list.2: list is a list of 2, expected a position from 0 on, got '2'"),
        ("list.first", r"--list.first: list is a list of 2, .* got 'first'"),
    ],
)
def test_a_key_that_leads_nowhere(key: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        set_value({"seed": 5, "list": [1, 2]}, key, "1")


def test_a_value_that_is_not_yaml() -> None:
    with pytest.raises(RecipeError, match=r"^--seed: the value '\[1' is not YAML: .*expected"):
        set_value({}, "seed", "[1")


def test_reading_a_file(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("trainer: {learning_rate: 1e-5}\nseed: 3\n")
    assert load_tree(file) == {"trainer": {"learning_rate": 1e-5}, "seed": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"r.yaml is not YAML: .*line 1"),
        ("a: {b: 1}\nc: 2\na: 3\n", r"r.yaml, line 3: the key 'a' stands twice"),
        ("a:\n- b: 1\n  b: 2\n", r"r.yaml, line 3: the key 'b' stands twice"),
        ("- 1\n- 2\n", r"r.yaml: expected a mapping of settings, got \[1, 2\]"),
        ("", r"r.yaml: expected a mapping of settings"),
    ],
)
def test_files_that_hold_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_tree(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    neighbour = tmp_path / "quickstart.yaml"
    neighbour.touch()
    message = f"quikstart.yaml: no such file; did you mean {str(neighbour)!r}? In {tmp_path} and "
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_tree(tmp_path / "quikstart.yaml")


def test_a_missing_file_names_the_recipes_of_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=f"there is no recipe .* in {tmp_path} and {tmp_path / 'configs'}$"):
        load_tree(Path("nope.yaml"))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/math.yaml").touch()
    with pytest.raises(RecipeError, match=r"no such file; In .* there are: configs/math.yaml$"):
        load_tree(Path("nope.yaml"))
    with pytest.raises(RecipeError, match=r"no such file; did you mean 'configs/math.yaml'\?"):
        load_tree(Path("mth.yaml"))


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"recipe {tmp_path}: cannot be read")):
        load_tree(tmp_path)


def test_a_long_list_is_cut_to_the_nearest() -> None:
    text = hint("learnin_rate", [f"key_{index}" for index in range(200)] + ["learning_rate"])
    assert text.startswith("did you mean 'learning_rate'? Nearest of 201: learning_rate, key_")
    assert text.count(", ") == 2
    assert "lists them" not in text


def test_a_long_list_is_shown_by_a_command() -> None:
    known = [f"key_{index}" for index in range(200)]
    assert hint("x", known, listed_by="rlstab train --list-keys").endswith("; `rlstab train --list-keys` lists them")


def test_a_name_in_another_case_is_near() -> None:
    assert hint("LORA", ["kl", "LoRA"]).startswith("did you mean 'LoRA'?")


def test_a_name_may_be_a_number() -> None:
    assert hint(5, ["seed"]) == "There are: seed"


def test_changes_are_told_by_dotted_key() -> None:
    old = {"a": {"b": 1, "c": {}}, "d": [1]}
    assert changed_keys(old, {"a": {"b": 2, "c": {}}, "e": 1}) == {"a.b": (1, 2), "d": ([1], None), "e": (None, 1)}
