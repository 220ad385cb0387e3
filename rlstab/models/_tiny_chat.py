"""A character tokenizer for conversations with tools, built locally."""

from __future__ import annotations

import string
from typing import Any

from transformers import PreTrainedTokenizerFast

from rlstab.models._tiny import tiny_tokenizer

__all__ = ["tiny_chat_tokenizer"]

CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"

TEMPLATE = """\
{%- for message in messages -%}
{{- message['role'][0] + ':' + message['content'] -}}
{%- for call in message['tool_calls'] or [] -%}
{{- call['function']['name'] + '(' -}}
{%- for key, value in call['function']['arguments'].items() -%}
{{- (', ' if not loop.first else '') + key + '=' + value -}}
{%- endfor -%}
{{- ')' -}}
{%- endfor -%}
{{- eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'a:' -}}{%- endif -%}
"""

#: How transformers reads a message back, calls among it.
RESPONSE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<eos>a:",
    "fields": {
        "tool_calls": {
            "open_pattern": r"(?P<name>\w+)\(",
            "close": ")",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"(?P<key>\w+)=(?P<value>[^,)]*)"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": "<eos>", "content": "text"},
    },
}


def tiny_chat_tokenizer(alphabet: str = "") -> PreTrainedTokenizerFast:
    """A `tiny_tokenizer` of the printable characters, whose chat template knows calls of tools.

    A message is the first letter of its role, a colon, its text and the end of sequence; a call is the tool's name with
    its arguments in brackets, whose values hold no comma or bracket. The tools themselves are not described: a tiny
    model learns them from demonstrations.

    Args:
        alphabet: further characters.

    Returns:
        The tokenizer, with a chat template, and a response template that reads calls back.

    Example:
        >>> tokenizer = tiny_chat_tokenizer()
        >>> call = {"type": "function", "function": {"name": "submit", "arguments": {"answer": "035"}}}
        >>> messages = [{"role": "user", "content": "503="}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        >>> tokenizer.apply_chat_template(messages, tokenize=False)
        'u:503=<eos>a:submit(answer=035)<eos>'
        >>> tokenizer.parse_response("submit(answer=035)<eos>", prefix="u:503=<eos>a:")["tool_calls"] == [call]
        True
    """
    characters = "".join(dict.fromkeys(CHARACTERS + alphabet))
    tokenizer = tiny_tokenizer(characters, chat_template=TEMPLATE)
    tokenizer.response_template = RESPONSE
    return tokenizer
