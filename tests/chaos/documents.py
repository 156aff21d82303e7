"""Writes valid bodies of chats and completions, and values that no field expects.

Everything is drawn from the given generator: the same state gives the same body.
"""

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

Document = dict[str, Any]

WORDS = ("reef", "coral", "Überfisch", "海", "🐟", "a\tb", "line\nline", "<eos>", "</s>", " ")
VOCAB_SIZE = 256
TOOL = {
    "description": "Finds a fish.",
    "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
}
MANY = 2_000


def valid(rng: Random, models: list[str]) -> tuple[str, Document]:
    """Draw a route and a body that it accepts."""
    document: Document = {"model": rng.choice(models), "max_tokens": rng.randint(1, 8)}
    if rng.random() < 0.5:
        document["messages"] = _messages(rng)
        path = "/v1/chat/completions"
    else:
        document["prompt"] = _prompt(rng)
        path = "/v1/completions"
    for name in rng.sample(sorted(OPTIONS), rng.randint(0, 5)):
        document[name] = OPTIONS[name](rng)
    if "n" in document and document["n"] > 4:
        document["max_tokens"] = 1
    if rng.random() < 0.4:
        document["stream"] = True
        if rng.random() < 0.5:
            document["stream_options"] = {"include_usage": rng.random() < 0.8}
    if path.endswith("chat/completions"):
        _chat_options(rng, document)
    elif rng.random() < 0.3:
        document |= {"echo": rng.random() < 0.5, "logprobs": rng.randint(0, 20)}
    return path, document


OPTIONS: dict[str, Callable[[Random], Any]] = {
    "n": lambda rng: rng.choice((1, 2, 3, 4, 128)),
    "temperature": lambda rng: rng.choice((0, 0.0, 1, 1.5, 1e-30, 100)),
    "top_p": lambda rng: rng.choice((0, 1, 0.5, 1e-30)),
    "top_k": lambda rng: rng.choice((-1, 0, 1, 5, 2**31 - 1)),
    "min_p": lambda rng: rng.choice((0, 0.5, 1)),
    "seed": lambda rng: rng.choice((-1, 0, 1, 2**63 - 1, -(2**63))),
    "stop": lambda rng: rng.choice(("a", ["a", "\n"], ["é", "🐟"], None)),
    "presence_penalty": lambda rng: rng.uniform(-2, 2),
    "frequency_penalty": lambda rng: rng.choice((-2, 0, 2)),
    "repetition_penalty": lambda rng: rng.choice((1, 1.2, 0.5, 100.0, 0.01)),
    "logit_bias": lambda rng: {str(rng.randrange(VOCAB_SIZE)): rng.choice((-100, 100, 0.5))},
    "min_tokens": lambda rng: rng.randint(0, 8),
    "stop_token_ids": lambda rng: [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, 4))],
    "ignore_eos": lambda rng: rng.random() < 0.5,
    "include_stop_str_in_output": lambda rng: rng.random() < 0.5,
    "skip_special_tokens": lambda rng: rng.random() < 0.5,
    "return_token_ids": lambda rng: rng.random() < 0.5,
    "cache_salt": lambda rng: rng.choice(WORDS),
    "user": lambda rng: rng.choice((None, "me", {"id": [1]})),
    "metadata": lambda rng: {"a": [1, None]},
}


def _chat_options(rng: Random, document: Document) -> None:
    kind = rng.randrange(6)
    if kind == 0:
        document |= {"logprobs": True, "top_logprobs": rng.randint(0, 20)}
    elif kind == 1:
        document["chat_template_kwargs"] = {"enable_thinking": False, "note": rng.choice(WORDS)}
    elif kind == 2:
        document["continue_final_message"] = True
    elif kind == 3:
        document["max_completion_tokens"] = document.pop("max_tokens")
    elif kind == 4:
        document["tools"] = [{"type": "function", "function": {**TOOL, "name": rng.choice("fgh")}}]
        document["tool_choice"] = rng.choice(("auto", "none", "required"))


def _messages(rng: Random) -> list[Any]:
    roles = ("system", "user", "assistant", "developer")
    return [{"role": rng.choice(roles), "content": _content(rng)} for _ in range(rng.randint(1, 5))]


def _content(rng: Random) -> Any:
    if rng.random() < 0.7:
        return _text(rng)
    return [{"type": "text", "text": _text(rng)} for _ in range(rng.randint(1, 3))]


def _text(rng: Random) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(0, 20)))


def _prompt(rng: Random) -> Any:
    def ids() -> list[int]:
        return [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 30))]

    kind = rng.randrange(4)
    if kind == 0:
        return _text(rng)
    if kind == 1:
        return [_text(rng) for _ in range(rng.randint(1, 4))]
    return ids() if kind == 2 else [ids() for _ in range(rng.randint(1, 4))]


# ==== values that are wrong nearly everywhere ====


def odd(rng: Random) -> Any:
    return rng.choice(ODD)(rng)


ODD: tuple[Callable[[Random], Any], ...] = (
    lambda rng: None,
    lambda rng: rng.choice((True, False)),
    lambda rng: rng.choice((0, -1, 1, 2, 2**31, 2**63, 2**64, -(2**63) - 1)),
    lambda rng: rng.choice((0.5, -0.0, 1e308, -1e308, 5e-324)),
    lambda rng: rng.choice((10**400, "#number 1e999", "#number -1e-999", "#digits 5000")),
    lambda rng: rng.choice((float("inf"), float("-inf"), float("nan"))),
    lambda rng: rng.choice(("", " ", "0", "null", "\0", "\x7f\x1b[2J", "../../etc/passwd")),
    lambda rng: rng.choice(("\ud83d", "\udc1f", "a\ud83d b", "\udc1f\ud83d")),
    lambda rng: rng.choice(WORDS) * rng.choice((1, 100, 20_000)),
    lambda rng: rng.choice(([], {}, [[]], [{}], [None], [0], ["a"], [[0]], [["a", 0]])),
    lambda rng: {rng.choice(WORDS): 0, "": None, "a" * 300: [1]},
    lambda rng: f"#{rng.choice(('lists', 'objects'))} {rng.choice((3, 100, 900, 1100, 5000))}",
    lambda rng: [rng.choice((0, "a", None, {}, [], 1.5, True))] * rng.choice((17, 129, 1025, 3000)),
    lambda rng: list(range(rng.choice((128, 129, 1024, 8192, 100_000)))),
    lambda rng: {str(number): 1 for number in range(rng.choice((255, 257, 1024, 1025)))},
    lambda rng: {"role": "user", "content": "x"},
    lambda rng: {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}},
)

# What `json` cannot write: texts that stand for it, and what they stand for.
_MARK = re.compile(rb'"#(number|digits|lists|objects) ([^" ]+)"')
_HALF = re.compile("[\ud800-\udfff]")


def as_json(rng: Random, document: Document) -> bytes:
    """Write a document, sometimes with all characters as they are."""
    text = json.dumps(document, ensure_ascii=False)
    if rng.random() < 0.8 or _HALF.search(text):
        text = json.dumps(document)
    return _MARK.sub(_unmarked, text.encode())


def _unmarked(found: re.Match[bytes]) -> bytes:
    kind, value = found[1], found[2]
    if kind == b"number":
        return value
    depth = int(value)
    if kind == b"digits":
        return b"1" + b"0" * depth
    opening, end = (b"[", b"]") if kind == b"lists" else (b'{"a":', b"}")
    return opening * depth + b"0" + end * depth
