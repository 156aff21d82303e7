"""What the OpenAI interfaces accept, ignore and refuse, before any model is asked."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from deployments.ingress.api.openai import ChatCompletionRequest, CompletionRequest
from deployments.ingress.api.openai_fields import parse_request
from deployments.ingress.http_errors import ApiError

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse_request(ChatCompletionRequest, {**CHAT, **fields})


def completion(**fields: Any) -> CompletionRequest:
    return parse_request(CompletionRequest, {**COMPLETION, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"tools": None, "response_format": {"type": "text"}, "modalities": ["text"]},
        {"tool_choice": "none", "parallel_tool_calls": False},
        {"tool_choice": "auto", "function_call": "none", "reasoning_effort": None},
        {"messages": [{"role": "tool", "content": "x", "tool_call_id": "call_1"}]},
        {"temperature": 0, "top_k": -1, "logit_bias": {"5": -100}},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"tools": [], "functions": [], "prediction": None, "audio": []},
        {"unheard_of": None, "guided_json": "", "documents": [], "provider": {}},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [], "refusal": ""}]},
        {"messages": [{"role": "user", "content": "x", "thinking": None, "id": "msg_1"}]},
        {"messages": [{"role": "assistant", "content": "x", "reasoning_content": "hm"}]},
    ],
)
def test_fields_that_change_nothing_are_accepted(fields: dict[str, Any]) -> None:
    chat(**fields).sampling(5, 1)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities[1]"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"nonsense": 1}, "nonsense"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"nonsense": True}}, "stream_options.nonsense"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": "2"}, "n"),
        ({"n": 2.5}, "n"),
        ({"stream": 1}, "stream"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop_token_ids": [5] * 129}, "stop_token_ids"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": "2"}}, "logit_bias"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": float("inf")}, "top_p"),
        ({"model": None}, "model"),
    ],
)
def test_a_bad_chat_field_is_refused_with_its_path(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, path)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"top_k": -2}, "top_k"),
        ({"min_tokens": 6}, "min_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields).sampling(5, 1)
    assert (caught.value.status, caught.value.param) == (400, path)
    assert "must be in" in caught.value.message


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], ["a"]]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_a_bad_completion_field_is_refused_with_its_path(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(ApiError) as caught:
        completion(**fields)
    assert (caught.value.status, caught.value.param) == (400, path)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_a_prompt_may_be_text_or_tokens_one_or_many(prompt: object, wanted: object) -> None:
    assert completion(prompt=prompt).prompt == wanted


def test_sampling_is_what_was_asked_for() -> None:
    sampling = completion(
        temperature=0.5, top_k=3, seed=-7, logprobs=2, echo=True, stop_token_ids=[4], min_p=0.1
    ).sampling(9, seed=1)
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 3, -7)
    assert (sampling.max_tokens, sampling.logprobs, sampling.prompt_logprobs) == (9, 2, 2)
    assert (sampling.stop_token_ids, sampling.min_p, sampling.top_p) == ((4,), 0.1, 1.0)


def test_a_missing_seed_is_the_one_that_was_drawn() -> None:
    assert chat().sampling(5, seed=11).seed == 11


@pytest.mark.parametrize("seed", [None, -1])
def test_a_seed_may_be_drawn(seed: int | None) -> None:
    assert chat(seed=seed).sampling(5, seed=11).seed == 11


def test_a_top_p_of_zero_is_the_likeliest_token() -> None:
    sampling = chat(top_p=0, temperature=1.0).sampling(5, 1)
    assert (sampling.top_p, sampling.top_k) == (1.0, 1)


def test_parts_may_have_cache_hints_and_nothing_else() -> None:
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "prompt": None}
    assert chat(messages=[{"role": "user", "content": [part]}]).messages[0].content == "a"
    for bad in ({**part, "mood": 1}, {"type": "text"}, {"type": "text", "text": 5}, "a"):
        with pytest.raises(ApiError) as caught:
            chat(messages=[{"role": "user", "content": [bad]}])
        assert caught.value.param == "messages[0].content"


def test_reasoning_is_given_to_the_template() -> None:
    message = {"role": "assistant", "content": "x", "reasoning_content": "hm"}
    # Two names, as transformers gives them to templates.
    wanted = {**message, "thinking": "hm"}
    assert chat(messages=[message]).messages[0].document() == wanted
    message["reasoning"] = message.pop("reasoning_content")  # as vLLM names it
    assert chat(messages=[message]).messages[0].document() == wanted


# ---- size ----------------------------------------------------------------------------------

USER = {"role": "user", "content": "x"}
MANY = 1_000_000
TOO_LONG: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": [USER] * 2049}),
    ("messages", {"messages": [USER] * MANY}),
    ("messages[0]", {"messages": [0] * MANY}),
    ("messages[0].content", {"messages": [{"role": "user", "content": [0] * MANY}]}),
    ("stop", {"stop": ["a"] * MANY}),
    ("stop_token_ids", {"stop_token_ids": [5] * 129}),
    ("stop_token_ids", {"stop_token_ids": [5] * MANY}),
    ("stop_token_ids[0]", {"stop_token_ids": [""] * MANY}),
    ("logit_bias", {"logit_bias": {str(token): 1 for token in range(1025)}}),
    ("modalities[0]", {"modalities": ["x"] * MANY}),
    ("modalities", {"modalities": ["text"] * MANY}),
    ("bad_words", {"bad_words": ["a"] * MANY}),
    ("allowed_token_ids", {"allowed_token_ids": [5] * MANY}),
    ("documents", {"documents": [{"a": 1}] * MANY}),
    ("chat_template_kwargs", {"chat_template_kwargs": {"a": {"b": [1] * MANY}}}),
    ("field 0", {f"field {number}": 1 for number in range(200)}),
    ("messages[0].0", {"messages": [{**USER, **{str(number): 1 for number in range(200)}}] * 99}),
    ("n", {"n": [1] * MANY}),
    ("tools", {"tools": [1] * MANY}),
]


@contextmanager
def at_once(seconds: float) -> Iterator[None]:
    """Hold the block to so much time of the processor, without the collector of all other tests."""
    gc.disable()
    try:
        began = time.thread_time()
        yield
        used = time.thread_time() - began
    finally:
        gc.enable()
    assert used < seconds


@pytest.mark.parametrize("number", range(len(TOO_LONG)))
def test_the_longest_lists_are_refused_at_once(number: int) -> None:
    path, fields = TOO_LONG[number]
    chat()  # what is built once
    with at_once(0.1), pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.param == path
    assert len(caught.value.message) < 500


def test_the_longest_prompts_are_refused_at_once() -> None:
    ids = [5] * (2**20 + 1)
    for prompt in (["a"] * 129, ["a"] * MANY, ids, [[5] * 2**14] * 65, [[5], [""] * MANY]):
        with at_once(0.2), pytest.raises(ApiError) as caught:
            completion(prompt=prompt)
        assert caught.value.param == "prompt"


def test_numbers_of_any_size_are_the_clients_fault() -> None:
    for name, value in (("logit_bias", {"5": 10**400}), ("temperature", 10**400), ("n", 10**400)):
        with pytest.raises(ApiError) as caught:
            chat(**{name: value})
        assert (caught.value.status, caught.value.param) == (400, name)


def test_parts_of_a_message_are_lines_of_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = chat(messages=[{"role": "developer", "content": parts}]).messages[0]
    assert message.document() == {"role": "system", "content": "a\nb"}


@pytest.mark.parametrize("document", [[], "text", None, 5])
def test_a_body_that_is_no_object_is_refused(document: object) -> None:
    with pytest.raises(ApiError, match="JSON object"):
        parse_request(ChatCompletionRequest, document)


# ---- tools ---------------------------------------------------------------------------------

FUNCTION: dict[str, Any] = {"name": "f", "parameters": {"type": "object"}}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {**FUNCTION, **function}}


def calling(arguments: Any, **call: Any) -> dict[str, Any]:
    called = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [{"role": "assistant", "tool_calls": [{**called, **call}]}]}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [tool()] * 129}, "tools"),
        ({"tools": [tool(description="x" * 2**18)]}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{**tool(), "type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{**tool(), "mood": 1}]}, "tools[0].mood"),
        ({"tools": [tool(mood=1)]}, "tools[0].function.mood"),
        ({"tools": [tool(name="a b")]}, "tools[0].function.name"),
        ({"tools": [tool(name="a" * 65)]}, "tools[0].function.name"),
        ({"tools": [tool(name="f\n")]}, "tools[0].function.name"),
        ({"tools": [tool(name=None)]}, "tools[0].function.name"),
        ({"tools": [tool(), tool()]}, "tools[1].function.name"),
        ({"tools": [tool(description=5)]}, "tools[0].function.description"),
        ({"tools": [tool(strict=1)]}, "tools[0].function.strict"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"type": "array"})]}, "tools[0].function.parameters"),
        (
            {"tools": [tool(parameters={"properties": {"a": {"type": "text"}}})]},
            "tools[0].function.parameters.properties.a.type",
        ),
        ({"tools": [tool()], "tool_choice": "some"}, "tool_choice"),
        (
            {"tools": [tool()], "tool_choice": {"type": "allowed_tools"}},
            "tool_choice.allowed_tools",
        ),
        ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        (
            {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        (calling("{"), "messages[0].tool_calls[0].function.arguments"),
        (calling("[1]"), "messages[0].tool_calls[0].function.arguments"),
        (calling({}), "messages[0].tool_calls[0].function.arguments"),
        (calling("[" * 10_000), "messages[0].tool_calls[0].function.arguments"),
        (calling('{"a": [' + "1," * 60_000 + "1]}"), "messages"),
        (calling("{}", type="custom"), "messages[0].tool_calls[0].type"),
        (calling("{}", mood=1), "messages[0].tool_calls[0].mood"),
        (calling("{}", function={"name": "a b"}), "messages[0].tool_calls[0].function.name"),
        ({"messages": [{**USER, "tool_calls": [{"function": {"name": "f"}}]}]}, "messages[0]"),
        ({"messages": [{**USER, "tool_call_id": "1"}]}, "messages[0]"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [1] * MANY}]},
            "messages[0].tool_calls[0]",
        ),
    ],
)
def test_a_bad_tool_or_call_is_refused_with_its_place(fields: dict[str, Any], path: str) -> None:
    with at_once(0.1), pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, path)
    assert path.split("[")[0] in caught.value.message and len(caught.value.message) < 700


def test_legacy_functions_are_told_their_successors() -> None:
    for field, value, successor in (
        ("functions", [FUNCTION], "tools"),
        ("function_call", {"name": "f"}, "tool_choice"),
    ):
        with pytest.raises(ApiError, match=f"{field} is not supported: use {successor}"):
            chat(**{field: value})


def test_a_tool_is_given_to_the_template_without_what_is_empty() -> None:
    given = {"name": "f", "description": None, "parameters": None, "strict": True}
    [read] = chat(tools=[{"type": "function", "function": given, "cache_control": {}}]).tools or []
    parameters = {"type": "object", "properties": {}}
    assert read.document() == {
        "type": "function",
        "function": {"name": "f", "parameters": parameters},
    }


def test_arguments_are_objects_for_the_template() -> None:
    [message] = chat(**calling('{"a": [1, {"b": null}]}', index=0)).messages
    [call] = message.document(fills_content=False)["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {"a": [1, {"b": None}]}}
    assert set(message.document(fills_content=False)) == {"role", "tool_calls"}
    assert message.document()["content"] == ""
    assert (
        chat(**calling("")).messages[0].document()["tool_calls"][0]["function"]["arguments"] == {}
    )
