"""Engines that a recipe names."""

from pathlib import Path

import pytest
import yaml
from odd_servers import OddServer, good_answer

from rlstab.errors import ConfigError, RecipeError
from rlstab.models import tiny_causal_lm, tiny_tokenizer
from rlstab.recipes import VLLM, Overlapped, RayPool, Transformers, VLLMServer, read_recipe
from rlstab.rollouts import OverlappedRollouts, Request, Sampling

ROOT = Path(__file__).resolve().parents[2]


def read(tmp_path: Path, engine: object) -> object:
    recipe = yaml.safe_load((ROOT / "configs/methods/grpo.yaml").read_text())
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"engine": engine, "output": str(tmp_path / "run")}))
    return read_recipe(str(path), []).recipe.engine


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"class_path": "Transformers", "init_args": {"slots": 8}}, Transformers(slots=8)),
        (
            {"class_path": "VLLM", "init_args": {"in_process": False, "arguments": {"max_model_len": 512}}},
            VLLM(in_process=False, arguments={"max_model_len": 512}),
        ),
        ({"class_path": "VLLMServer", "init_args": {"url": "http://a:1"}}, VLLMServer(url="http://a:1")),
        (
            {"class_path": "VLLMServer", "init_args": {"url": ["http://a:1", "http://b:2"], "key_file": "key"}},
            VLLMServer(url=["http://a:1", "http://b:2"], key_file="key"),
        ),
        (
            {"class_path": "RayPool", "init_args": {"size": 8, "options": {"num_gpus": 1}, "engine": "VLLM"}},
            RayPool(size=8, options={"num_gpus": 1}, engine=VLLM()),
        ),
        (
            {"class_path": "Overlapped", "init_args": {"engine": "RayPool", "staleness": 2}},
            Overlapped(engine=RayPool(), staleness=2),
        ),
    ],
)
def test_recipes_name_engines(tmp_path: Path, written: object, expected: object) -> None:
    assert read(tmp_path, written) == expected


@pytest.mark.parametrize(
    ("outer", "inner", "complaint"),
    [
        ("RayPool", "Transformers", "RayPool: engine Transformers .*own weights in an actor; expected copy: true"),
        ("RayPool", "RayPool", "RayPool: engine RayPool; expected Transformers or VLLM"),
        ("Overlapped", "Transformers", "Overlapped: engine Transformers .*while it is trained; expected copy: true"),
        ("Overlapped", "VLLM", "Overlapped: engine VLLM in the trainer's process; expected in_process: false"),
        (
            "Overlapped",
            {"class_path": "Overlapped", "init_args": {"engine": "RayPool"}},
            "Overlapped: engine Overlapped; expected what",
        ),
    ],
)
def test_engines_that_do_not_go_together(tmp_path: Path, outer: str, inner: object, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        read(tmp_path, {"class_path": outer, "init_args": {"engine": inner}})


def test_a_key_has_no_place_in_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        read(tmp_path, {"class_path": "VLLMServer", "init_args": {"url": "http://a:1", "key": "0123456789abcdef"}})


def test_a_source_builds_its_engine() -> None:
    tokenizer = tiny_tokenizer("0123456789=")
    model = tiny_causal_lm(tokenizer)
    with OddServer(lambda document: [good_answer()]) as server, VLLMServer(url=server.url)(model, tokenizer) as engine:
        (rollout,) = engine.generate([Request(prompt_ids=[5])], Sampling(max_new_tokens=3))
        assert rollout.token_ids.tolist() == [5, 5, 5]
        with Overlapped(engine=Transformers(copy=True), staleness=2)(model, tokenizer) as overlapped:
            assert isinstance(overlapped, OverlappedRollouts)
            assert (overlapped.staleness, overlapped.works_beside) == (2, True)
    with pytest.raises(ConfigError, match=r"VLLMEngine: (vLLM is not installed|patience 0)"):
        VLLM(patience=0)(model, tokenizer)
