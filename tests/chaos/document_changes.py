"""Changes of a body: of its document, and of the bytes that it is written in."""

from collections.abc import Callable
from random import Random
from typing import Any

from tests.chaos.documents import MANY, VOCAB_SIZE, Document, odd


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a document; of long lists the first few."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        container = waiting.pop()
        keys = container if isinstance(container, dict) else range(min(len(container), 8))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                waiting.append(container[key])
    return found


def _replace(rng: Random, document: Document) -> None:
    if document:
        container, key = rng.choice(_places(document)[:200])
        container[key] = odd(rng)


def _set_known(rng: Random, document: Document) -> None:
    document[rng.choice(FIELDS)] = odd(rng)


def _drop(rng: Random, document: Document) -> None:
    if document:
        del document[rng.choice(sorted(document))]


def _set_unknown(rng: Random, document: Document) -> None:
    name = rng.choice(("", "Model", "prompts", "guided_json", "\ud83d", "__class__", "x" * 5000))
    document[name] = odd(rng)


def _set_many_unknown(rng: Random, document: Document) -> None:
    document |= {f"field{number}": odd(rng) for number in range(rng.choice((100, 300)))}


def _enlarge(rng: Random, document: Document) -> None:
    """Take a list, or a text, to a limit or just beyond."""
    document.pop("n", None)
    document["max_tokens"] = 1
    name, make = rng.choice(LARGE)
    document[name] = make(rng)


FIELDS = (
    *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "n", "stream", "stop"),
    *(
        "stream_options",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "logit_bias",
        "min_tokens",
    ),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "stop_token_ids", "logprobs"),
    *("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "return_token_ids"),
    *("cache_salt", "add_special_tokens", "top_logprobs", "chat_template_kwargs", "echo", "suffix"),
    *("add_generation_prompt", "continue_final_message", "best_of", "tools", "tool_choice", "user"),
    *("functions", "function_call", "response_format", "reasoning_effort", "modalities", "audio"),
    *("prediction", "parallel_tool_calls", "web_search_options", "metadata", "store", "verbosity"),
)
LARGE: tuple[tuple[str, Callable[[Random], Any]], ...] = (
    ("messages", lambda rng: [{"role": "user", "content": "x"}] * rng.choice((2048, 2049))),
    ("messages", lambda rng: [0] * rng.choice((2048, 100_000, 400_000))),
    ("messages", lambda rng: [{"role": "user", "content": [{"type": "text", "text": "a"}] * 1025}]),
    ("messages", lambda rng: [{"role": "user", "content": "word " * rng.choice((MANY, 200_000))}]),
    ("prompt", lambda rng: ["x"] * rng.choice((64, 128, 129))),
    ("prompt", lambda rng: [[rng.randrange(VOCAB_SIZE)] * 3] * rng.choice((64, 128, 129))),
    ("prompt", lambda rng: [5] * rng.choice((100, 255, 256, 400_000))),
    ("prompt", lambda rng: [rng.choice((-1, VOCAB_SIZE + 9, 2**40, 2**70))] * 3),
    ("prompt", lambda rng: "word " * rng.choice((MANY, 200_000))),
    ("prompt", lambda rng: [[]] * rng.choice((1, 128, 40_000))),
    ("stop", lambda rng: ["a" * rng.choice((1, 5000))] * rng.choice((16, 17))),
    ("stop_token_ids", lambda rng: [7] * rng.choice((128, 129, 400_000))),
    ("logit_bias", lambda rng: {str(n % VOCAB_SIZE): -1 for n in range(rng.choice((255, 1024)))}),
    ("logit_bias", lambda rng: {str(n): 1 for n in range(rng.choice((1024, 1025, 40_000)))}),
    ("chat_template_kwargs", lambda rng: {"a": [0] * rng.choice((9_999, 10_001, 100_000))}),
    ("metadata", lambda rng: {str(n): "x" for n in range(rng.choice((30_000, 60_000)))}),
    ("n", lambda rng: rng.choice((128, 129, 0, -1))),
)
DOCUMENTS: tuple[tuple[str, Callable[[Random, Document], None]], ...] = (
    ("a value is replaced", _replace),
    ("a value is replaced", _replace),
    ("a field is set", _set_known),
    ("a field is set", _set_known),
    ("a field is missing", _drop),
    ("a field is unknown", _set_unknown),
    ("many fields are unknown", _set_many_unknown),
    ("a list or text is large", _enlarge),
)


# ==== the bytes ====


def _damage(rng: Random, body: bytes) -> bytes:
    raw = bytearray(body)
    for _ in range(rng.choice((1, 3, 20))):
        if raw:
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


def _insert(rng: Random, body: bytes) -> bytes:
    at = rng.randrange(len(body) + 1)
    piece = rng.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\0", b"//"))
    return body[:at] + piece + body[at:]


def _repeat(rng: Random, body: bytes) -> bytes:
    start = rng.randrange(len(body) + 1)
    end = rng.randrange(start, len(body) + 1)
    return body[:end] + body[start:end] + body[end:]


BYTES: tuple[tuple[str, Callable[[Random, bytes], bytes]], ...] = (
    ("bytes are damaged", _damage),
    ("bytes are no UTF-8", _insert),
    ("a piece is repeated", _repeat),
    ("the JSON is cut", lambda rng, body: body[: rng.randrange(len(body) + 1)]),
    ("the JSON goes on", lambda rng, body: body + rng.choice((b"}", b"{}", b"\0", b" null"))),
    ("a field comes twice", lambda rng, body: b'{"model":"tiny","n":2,' + body[1:]),
    ("a byte order mark", lambda rng, body: rng.choice((b"\xef\xbb\xbf", b"\xff\xfe")) + body),
    ("UTF-16", lambda rng, body: body.decode().encode("utf-16")),
    ("much white space", lambda rng, body: b" " * rng.choice((10, 300_000)) + body),
    ("no object", lambda rng, body: rng.choice((b"", b"[]", b"0", b'"x"', b"null", b"[" * 5000))),
    ("too large", lambda rng, body: body[:-1] + b" " * (8 * 2**20) + b"}"),
)
