"""Writes valid bodies of the other APIs: embeddings, responses, messages, LoRAX's, tokens."""

from collections.abc import Callable
from random import Random
from typing import Any

from tests.chaos.documents import TOOL, VOCAB_SIZE, WORDS, Document

Writer = Callable[[Random, str], Document]


def surface_document(rng: Random, model: str) -> tuple[str, Document]:
    """Draw a route and a body that it accepts."""
    path = rng.choice(sorted(SURFACES))
    return path, SURFACES[path](rng, model)


def _words(rng: Random) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12)))


def _some(rng: Random, options: Document) -> Document:
    """Take about a third of the fields."""
    return {name: value for name, value in options.items() if rng.random() < 0.3}


def _embeddings(rng: Random, model: str) -> Document:
    texts = [_words(rng) for _ in range(rng.randint(1, 4))]
    ids = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))] for _ in texts]
    options = {
        "encoding_format": rng.choice(("float", "base64")),
        "dimensions": rng.choice((1, 4, 10**6)),
        "truncate_prompt_tokens": rng.choice((-1, 1, 3)),
        "normalize": rng.random() < 0.5,
    }
    return {"model": model, "input": rng.choice((texts[0], texts, ids)), **_some(rng, options)}


def _messages(rng: Random, model: str) -> Document:
    call = {"type": "tool_use", "id": "a", "name": "f", "input": {"name": [1, {"b": _words(rng)}]}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": _words(rng)}
    thought = {"type": "thinking", "thinking": _words(rng), "signature": ""}
    options = {
        "system": [{"type": "text", "text": _words(rng)}],
        "stop_sequences": [rng.choice("abc")],
        "temperature": rng.choice((0, 0.5, 1)),
        "top_k": rng.randint(1, 9),
        "stream": True,
        "tool_choice": {"type": rng.choice(("auto", "any", "none", "tool")), "name": "f"},
        "thinking": {"type": "disabled"},
    }
    return {
        "model": model,
        "max_tokens": rng.randint(1, 8),
        "messages": [
            {"role": "user", "content": _words(rng)},
            {"role": "assistant", "content": [thought, {"type": "text", "text": "y"}, call]},
            {"role": "user", "content": [result, {"type": "text", "text": _words(rng)}]},
        ],
        "tools": [{"name": "f", "input_schema": TOOL["parameters"]}],
        **_some(rng, options),
    }


def _counted(rng: Random, model: str) -> Document:
    document = _messages(rng, model)
    kept = ("model", "messages", "system", "tools", "tool_choice", "thinking")
    return {name: value for name, value in document.items() if name in kept}


def _responses(rng: Random, model: str) -> Document:
    items = [
        {"role": "user", "content": _words(rng)},
        {"role": "assistant", "content": [{"type": "output_text", "text": _words(rng)}]},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"name": "x"}'},
        {"type": "function_call_output", "call_id": "a", "output": _words(rng)},
        {"role": "user", "content": [{"type": "input_text", "text": _words(rng)}]},
    ]
    schema = {"type": "json_schema", "name": "s", "schema": TOOL["parameters"]}
    options = {
        "instructions": _words(rng),
        "stream": True,
        "temperature": rng.choice((0, 1, 1.5)),
        "text": {"format": rng.choice(({"type": "text"}, schema))},
        "tools": [{"type": "function", "name": "f", "parameters": TOOL["parameters"]}],
        "metadata": {"a": "b"},
        "store": rng.random() < 0.5,
        "parallel_tool_calls": rng.random() < 0.5,
    }
    given = rng.choice((_words(rng), items))
    limit = {"max_output_tokens": rng.randint(1, 8)}
    return {"model": model, "input": given, **limit, **_some(rng, options)}


def _generate(rng: Random, model: str) -> Document:
    options = {
        "do_sample": rng.random() < 0.5,
        "temperature": rng.choice((0.5, 1.0)),
        "top_k": rng.randint(1, 9),
        "seed": rng.choice((0, 2**64 - 1)),
        "stop": [rng.choice("abc")],
        "details": True,
        "decoder_input_details": True,
        "best_of": rng.randint(1, 3),
        "return_k_alternatives": rng.randint(1, 5),
        "return_full_text": rng.random() < 0.5,
        "truncate": rng.randint(1, 20),
    }
    length = {"max_new_tokens": rng.randint(1, 8)}
    parameters: Document = {"adapter_id": model, **length, **_some(rng, options)}
    if rng.random() < 0.2:
        del parameters["adapter_id"]
        weights = [rng.choice((0.5, 1, -1)), 0.25]
        parameters["merged_adapters"] = {"ids": ["red", model], "weights": weights}
    return {"inputs": _words(rng), "parameters": parameters}


def _compat(rng: Random, model: str) -> Document:
    return {**_generate(rng, model), "stream": rng.random() < 0.5}


def _tokenize(rng: Random, model: str) -> Document:
    asked: Any = {"messages": [{"role": "user", "content": _words(rng)}]}
    if rng.random() < 0.5:
        asked = {"prompt": _words(rng)}
    return {"model": model, **asked, **_some(rng, {"return_token_strs": True})}


def _detokenize(rng: Random, model: str) -> Document:
    return {"model": model, "tokens": [rng.randrange(VOCAB_SIZE) for _ in range(20)]}


SURFACES: dict[str, Writer] = {
    "/": _compat,
    "/detokenize": _detokenize,
    "/generate": _generate,
    "/generate_stream": _generate,
    "/tokenize": _tokenize,
    "/v1/embeddings": _embeddings,
    "/v1/messages": _messages,
    "/v1/messages/count_tokens": _counted,
    "/v1/responses": _responses,
}
