"""Keeps secrets out of the run folder.

A value is replaced where its key names a secret, and within a string where the string has the form of one: credentials
in a URL, or a token with a known prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from rlstab.errors import ConfigError
from rlstab.record._lines import Json

REDACTED = "<redacted>"

_SECRET_WORDS = (
    "password|passwd|passphrase|secrets?|credentials?|authorization|bearer|cookie"
    "|(api|access|private|ssh|encryption|wandb|signing)_?keys?"
)
_SECRET_KEY = re.compile(rf"(^|_)({_SECRET_WORDS})(_|$)")
_TOKEN_KEY = re.compile(r"(^|_)token$|(^|_)(access|api|auth|hub|refresh)_tokens$")
_TOKEN_OF_TEXT = re.compile(
    r"(^|_)(bos|eos|pad|unk|sep|cls|mask|image|video|audio|boi|eoi|stop|start|end|think|max|min|num|per)_token$"
)
_KNOWN_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abposr]-[\w-]{10,}|AKIA[0-9A-Z]{16})"
)
_URL_CREDENTIALS = re.compile(r"(?<=://)[^\s/?#]+(?=@)")
_URL_ARGUMENT = re.compile(r"(?i)(?<=[?&])(\w*(?:token|key|password|secret|signature))=[^\s&#]+")


def _words(key: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-. ]", "_", key).lower()


def _names_secrets(key: str) -> bool:
    """Return whether everything below a key is secret. Words count, not substrings: `tokenizer` is no token."""
    return bool(_SECRET_KEY.search(_words(key)))


def _names_token(key: str) -> bool:
    """Return whether the value of a key is an access token; `max_token` and `pad_token` are not."""
    return bool(_TOKEN_KEY.search(_words(key))) and not _TOKEN_OF_TEXT.search(_words(key))


def redact_text(text: str) -> str:
    """Return `text` without URL credentials and without tokens of a known form.

    Example:
        >>> redact_text("redis://me:pw@host/0")
        'redis://<redacted>@host/0'
    """
    text = _URL_CREDENTIALS.sub(REDACTED, text)
    text = _URL_ARGUMENT.sub(rf"\1={REDACTED}", text)
    return _KNOWN_FORMS.sub(REDACTED, text)


def redact(value: Json, key: str = "", *, secret: bool = False) -> Json:
    """Return JSON data with every secret replaced; None, switches and empty strings tell nothing and stay.

    Args:
        value: The data.
        key: Key under which `value` stands; items of a list stand under the key of the list.
        secret: Whether `value` lies below a key that names secrets.
    """
    secret = secret or _names_secrets(key)
    match value:
        case None | bool() | "":
            return value
        case dict():
            return {name: redact(item, name, secret=secret) for name, item in value.items()}
        case list():
            return [redact(item, key, secret=secret) for item in value]
    if secret or _names_token(key):
        return REDACTED
    return redact_text(value) if isinstance(value, str) else value


def redact_yaml(text: str) -> str:
    """Return a YAML document with every secret replaced; one that holds none comes back as it is.

    Raises:
        ConfigError: `text` is not one YAML document.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"config_text is not YAML: {' '.join(str(error).split())}") from error
    if root is None:
        return text
    changes = list(_changes(root, "", False, set()))
    if not changes:
        return text
    for scalar, clean in changes:
        scalar.value, scalar.tag = clean, "tag:yaml.org,2002:str"
    return str(yaml.serialize(root, Dumper=yaml.SafeDumper, allow_unicode=True, width=2**16))


def _changes(
    node: yaml.Node, key: str, secret: bool, seen: set[tuple[int, str, bool]]
) -> Iterator[tuple[yaml.ScalarNode, str]]:
    """Yield the scalars at and below a YAML node that hold a secret, and what to put there, as `redact` does."""
    secret = secret or _names_secrets(key)
    if (id(node), key, secret) in seen:
        return
    seen.add((id(node), key, secret))
    match node:
        case yaml.MappingNode():
            for name, item in node.value:
                yield from _changes(item, str(name.value), secret, seen)
        case yaml.SequenceNode():
            for item in node.value:
                yield from _changes(item, key, secret, seen)
        case yaml.ScalarNode() if node.value and node.tag.rsplit(":", 1)[-1] not in ("null", "bool"):
            clean = REDACTED if secret or _names_token(key) else redact_text(node.value)
            if clean != node.value:
                yield node, clean
