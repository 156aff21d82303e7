"""Repeat in an answer of OpenAI's Responses API what the request has asked for."""

from collections.abc import Mapping
from typing import Any, cast

from deployments.ingress.api.responses import ResponsesRequest

_DEFAULTS: Mapping[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "temperature": None,
    "top_logprobs": 0,
    "top_p": None,
    "truncation": "disabled",
    "user": None,
}
_TEXT = {"format": {"type": "text"}, "verbosity": "medium"}
_FIXED = {"store": False, "background": False, "previous_response_id": None}


def echoed(request: ResponsesRequest, document: Mapping[str, Any]) -> dict[str, Any]:
    """List what was sent, and for what was not what holds without it."""
    same = {name: _or(document.get(name), default) for name, default in _DEFAULTS.items()}
    return {
        **same,
        "reasoning": _reasoning(document.get("reasoning")),
        "text": {**_TEXT, **_given(document.get("text"))},
        "tool_choice": _choice(document.get("tool_choice")),
        "tools": [_tool(tool["function"]) for tool in request.tools],
        **_FIXED,
    }


def _or(value: object, default: object) -> object:
    return default if value is None else value


def _given(value: object) -> dict[str, Any]:
    fields = cast(dict[str, Any], value or {})
    return {name: each for name, each in fields.items() if each is not None}


def _reasoning(value: object) -> dict[str, Any]:
    return {"effort": None, "summary": None, **_given(value)}


def _choice(value: Any) -> object:
    if isinstance(value, dict):
        fields = cast(dict[str, Any], value)
        return {"mode": "auto", **fields} if fields["type"] == "allowed_tools" else fields
    return _or(value, "auto")


def _tool(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "parameters": None, "strict": None, **function}
