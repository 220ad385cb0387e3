"""Secrets are found by the name of their key and by their form; what only looks like one stays."""

import pytest
import yaml

from rlstab.record._redact import REDACTED, redact, redact_text, redact_yaml


@pytest.mark.parametrize(
    "key",
    [
        *("hub_token", "hubToken", "HF_TOKEN", "token", "push_to_hub_token", "auth-token", "api_tokens"),
        *("password", "DB_PASSWORD", "passphrase", "client_secret", "secretKey", "AWS_SECRET_ACCESS_KEY"),
        *("WANDB_API_KEY", "apiKey", "api.key", "private_key", "credentials", "Authorization", "session_cookie"),
    ],
)
def test_values_under_secret_keys_go(key: str) -> None:
    assert redact({key: "s3cr3t"}) == {key: REDACTED}
    assert redact({"deep": [{key: ["s3cr3t", 12345, None, True, ""]}]}) == {
        "deep": [{key: [REDACTED, REDACTED, None, True, ""]}]
    }
    assert yaml.safe_load(redact_yaml(f"outer: {{{key!r}: s3cr3t, other: kept}}")) == {
        "outer": {key: REDACTED, "other": "kept"}
    }


@pytest.mark.parametrize(
    "key",
    [
        "tokenizer",
        "max_tokens",
        "max_token",
        "pad_token",
        "eos_token",
        "num_tokens",
        "token_mean",
        "tokens",
        "keys",
        "key",
    ],
)
def test_keys_that_only_look_secret_stay(key: str) -> None:
    assert redact({key: "text"}) == {key: "text"}
    assert redact_yaml(f"{key}: text") == f"{key}: text"


def test_everything_below_a_key_that_names_secrets_goes() -> None:
    document = "secrets: {a: one, b: [two, {c: three}], none: null}"
    assert yaml.safe_load(redact_yaml(document)) == {
        "secrets": {"a": REDACTED, "b": [REDACTED, {"c": REDACTED}], "none": None}
    }
    assert redact(yaml.safe_load(document)) == yaml.safe_load(redact_yaml(document))


def test_a_term_that_is_called_token_keeps_its_arguments() -> None:
    assert redact({"terms": {"token": {"coef": 0.1}}}) == {"terms": {"token": {"coef": 0.1}}}


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("redis://me:pw@host:1/0", "redis://<redacted>@host:1/0"),
        ("see https://u:p@ss@h/x and http://h2/y?a=1", "see https://<redacted>@h/x and http://h2/y?a=1"),
        ("http://h/x?token=abc&b=1&api_key=d#e", "http://h/x?token=<redacted>&b=1&api_key=<redacted>#e"),
        ("key hf_" + "a1" * 16, "key <redacted>"),
        ("Bearer ghp_" + "a1" * 16 + ".", "Bearer <redacted>."),
        ("me@example.org wrote https://example.org/@me", "me@example.org wrote https://example.org/@me"),
    ],
)
def test_secrets_by_form(text: str, clean: str) -> None:
    assert redact_text(text) == clean
    assert redact({"note": [text]}) == {"note": [clean]}
    assert yaml.safe_load(redact_yaml(yaml.safe_dump({"note": text}))) == {"note": clean}


def test_yaml_without_secrets_comes_back_letter_by_letter() -> None:
    document = "# comment\nlr: 1e-5   # spaced\nname: 'x'\nempty:\n"
    assert redact_yaml(document) == document
    assert redact_yaml("") == ""


def test_yaml_with_anchors_and_cycles() -> None:
    document = "shown: &pw hunter2\npassword: *pw\nloop: &l [1, *l]\nlr: '1e-5'\nfast: 1e-5\n"
    clean = redact_yaml(document)
    assert "hunter2" not in clean
    assert "lr: '1e-5'" in clean
    assert "fast: 1e-5" in clean
    assert yaml.safe_load(clean)["password"] == REDACTED
