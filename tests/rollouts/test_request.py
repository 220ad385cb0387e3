"""What an engine can be asked: ranges, and truncation that is refused unless it is chosen."""

import re

import pytest

from rlstab.errors import ConfigError
from rlstab.rollouts import Request, Sampling


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("truncation", "ignore"),
    ],
)
def test_values_outside_their_range_are_named(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"Sampling: {key} {value!r}; expected")):
        Sampling(**{"max_new_tokens": 4, key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", [{"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}])
def test_truncation_is_refused_unless_it_is_chosen(setting: dict[str, float]) -> None:
    (key,) = setting
    with pytest.raises(ConfigError, match=rf"{key} .* truncates .*'renormalise' .*'ignore_tail'"):
        Sampling(max_new_tokens=4, **setting)  # type: ignore[arg-type]
    for truncation in ("renormalise", "ignore_tail"):
        assert Sampling(max_new_tokens=4, truncation=truncation, **setting).truncated  # type: ignore[arg-type]


def test_plain_sampling_is_not_truncated() -> None:
    assert not Sampling(max_new_tokens=4, temperature=0.3).truncated


def test_a_request_needs_a_prompt_and_a_positive_limit() -> None:
    with pytest.raises(ConfigError, match="prompt_ids is empty"):
        Request(prompt_ids=[])
    with pytest.raises(ConfigError, match="max_new_tokens 0; expected at least 1"):
        Request(prompt_ids=[1], max_new_tokens=0)
