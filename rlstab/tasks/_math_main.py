"""The comparison of mathematical expressions, for a worker process: imported by its path, without rlstab."""

import logging

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # says that its timeouts are off; the worker has its own


def compare(completion: str, answer: str) -> bool | None:
    """Whether a completion's final expression equals the answer, None if the answer is no expression."""
    from math_verify import parse, verify

    right = parse(answer if "boxed" in answer else rf"\boxed{{{answer.strip().strip('$')}}}", parsing_timeout=None)
    if not right:
        return None
    return bool(verify(right, parse(completion, parsing_timeout=None), timeout_seconds=None))
