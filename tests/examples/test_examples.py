"""Every example runs, and prints what it promises."""

import pytest
from running import output_of


def test_compose_a_loss() -> None:
    text = output_of("examples/compose_a_loss.py")
    assert "LogProbs(source='sampler')" in text
    assert all(f"  {name} " in text for name in ("policy", "drift", "floor"))
    assert "gradient of each token" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grpo_in_a_trl_script.py", ("reward ", "objective/drift/loss", "mismatch/k3")),
        ("watch_kl_drift.py", ("step   1", "KL to the start 0.0000 ± 0.0000", "trainer vs sampler k3", "kl_drift.png")),
    ],
)
def test_training_examples(name: str, expected: tuple[str, ...]) -> None:
    text = output_of(f"examples/{name}", "2")
    assert all(part in text for part in expected), text


def test_watch_any_trainer() -> None:
    text = output_of("examples/watch_any_trainer.py")
    lines = [line for line in text.splitlines() if line.startswith(("step ", "loss "))]
    assert lines[:3] == [f"step 21: {kind}" for kind in ("alarm", "step_skipped", "rolled_back")]
    start, end = (float(part.split()[0]) for part in lines[-1].removeprefix("loss ").split(", "))
    assert end < start / 2
