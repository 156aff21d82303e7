"""Bodies that are valid, or nearly, and ask for as much as the limits allow."""

import json
from typing import Any

from tests.chaos.case import JSON, Case, complete
from tests.chaos.world import MODEL

CHAT = b"/v1/chat/completions"
COMPLETIONS = b"/v1/completions"
MIB = 2**20


def hostile_cases() -> list[Case]:
    """Make them once: to write a large body takes the time of whoever measures."""
    documents: list[tuple[bytes, dict[str, Any]]] = [
        (CHAT, {"messages": [0] * (MIB // 3)}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}] * 2048, "max_tokens": 1}),
        (CHAT, {"messages": [{"role": "user", "content": "word " * (MIB // 5)}]}),
        (CHAT, {"messages": _user("x"), "chat_template_kwargs": {"a": list(range(10_000))}}),
        (COMPLETIONS, {"prompt": "word " * (7 * MIB // 5)}),
        (COMPLETIONS, {"prompt": ["word " * 1200] * 128, "max_tokens": 1}),
        (COMPLETIONS, {"prompt": ["x"] * 128, "n": 2, "max_tokens": 16}),
        (COMPLETIONS, {"prompt": ["x"] * 128, "n": 128, "max_tokens": 8000}),
        (COMPLETIONS, {"prompt": [5] * (MIB // 2), "max_tokens": 1}),
        (COMPLETIONS, {"prompt": [5] * 7000, "max_tokens": 1}),
        (COMPLETIONS, {"prompt": "x", "stop_token_ids": [5] * 500_000}),
        (COMPLETIONS, {"prompt": "x", "n": 64, "max_tokens": 32, "stop_token_ids": [5] * 128}),
        (COMPLETIONS, {"prompt": "x", "n": 32, "max_tokens": 32, "logit_bias": _biases()}),
        (COMPLETIONS, {"prompt": "x", "n": 64, "max_tokens": 16, "logprobs": 20}),
        (COMPLETIONS, {"prompt": "x", "metadata": {str(n): [n] for n in range(40_000)}}),
        (COMPLETIONS, {"prompt": "x", "user": [[]] * (MIB // 3)}),
        (COMPLETIONS, {"model": "nobody", "prompt": "x"}),
        (COMPLETIONS, {"model": "nobody@77", "prompt": "x"}),
    ]
    return [
        _case(number, path, {"model": MODEL, **document})
        for number, (path, document) in enumerate(documents)
    ]


def _case(number: int, path: bytes, document: dict[str, Any]) -> Case:
    name = ", ".join(sorted(document))
    return complete(Case(number, "POST", path, (JSON,), json.dumps(document).encode(), (name,)), [])


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _biases() -> dict[str, int]:
    return {str(token_id): -1 for token_id in range(200)}
