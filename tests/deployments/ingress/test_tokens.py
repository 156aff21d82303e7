"""/tokenize and /detokenize against the prompts that the engine gets, and the tokenizer itself."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.deployments.support.fakes import (
    EOS,
    INFO,
    Server,
    byte_tokenizer,
    encode,
    in_server,
)

MESSAGES = [{"role": "user", "content": "Grüße!"}]


@pytest.mark.parametrize(
    "body",
    [
        {"messages": MESSAGES},
        {"messages": MESSAGES, "add_generation_prompt": False},
        {
            "messages": [*MESSAGES, {"role": "assistant", "content": "H"}],
            "continue_final_message": True,
        },
        {"messages": MESSAGES, "add_special_tokens": True},
        {"prompt": "Grüße!<eos>"},
        {"prompt": "a", "add_special_tokens": False},
    ],
)
@pytest.mark.parametrize("model", ["base", "red", "base:red"])
def test_tokens_are_those_of_the_prompt_that_the_engine_gets(
    body: dict[str, Any], model: str
) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(
            "/tokenize", **{**body, "model": model, "return_token_strs": True}
        )
        assert answer.status == 200, answer.body
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        assert (await server.post(path, **{**body, "model": model})).status == 200
        [request] = server.engine.requests
        found = answer.json
        assert found["tokens"] == request.prompt_token_ids
        assert found["count"] == len(found["tokens"]) and found["max_model_len"] == 128
        tokenizer = byte_tokenizer()
        assert found["token_strs"] == [tokenizer.id_to_token(i) for i in found["tokens"]]

    in_server(test)


def test_the_model_may_be_left_out_and_texts_are_given_only_where_asked_for() -> None:
    async def test(server: Server) -> None:
        answer = await server.call("POST", "/tokenize", {"prompt": "abc"})
        assert answer.json == {
            "count": 3,
            "max_model_len": 128,
            "tokens": [97, 98, 99],
            "token_strs": None,
        }
        answer = await server.call("POST", "/detokenize", {"tokens": [97, 98, 99, EOS]})
        assert answer.json == {"prompt": "abc<eos>"}
        assert server.engine.requests == []

    in_server(test)


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_a_text_comes_back(text: str) -> None:
    async def test(server: Server) -> None:
        tokens = (await server.post("/tokenize", prompt=text)).json["tokens"]
        assert (await server.post("/detokenize", tokens=tokens)).json == {"prompt": text}

    in_server(test)


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "says"),
    [
        ("/tokenize", {}, 400, "prompt", "prompt is required"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt", "valid string"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "prompt", "Unknown field"),
        ("/tokenize", {"prompt": "a", "model": "nobody"}, 404, "model", "nobody"),
        ("/tokenize", {"prompt": "a" * 129}, 400, "prompt", "129 tokens"),
        ("/tokenize", {"messages": []}, 400, "messages", "at least 1"),
        ("/tokenize", {"messages": MESSAGES * 15}, 400, "messages", "context of 128"),
        ("/detokenize", {}, 400, "tokens", "tokens is required"),
        ("/detokenize", {"tokens": [INFO.vocab_size]}, 400, "tokens", "258 is outside 0..257"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens", "-1 is outside 0..257"),
        ("/detokenize", {"tokens": [97] * 129}, 400, "tokens", "at most 128 token ids, not 129"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens[0]", "valid integer"),
    ],
)
def test_what_is_wrong_is_refused_by_its_field(
    path: str, body: dict[str, Any], status: int, param: str, says: str
) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(path, **body)
        assert (answer.status, answer.error["param"]) == (status, param), answer.body
        assert says in answer.error["message"]

    in_server(test)


def test_a_text_that_fits_is_taken_up_to_the_last_token() -> None:
    async def test(server: Server) -> None:
        answer = await server.post("/tokenize", prompt="a" * 128)
        assert answer.json["count"] == 128
        assert (await server.post("/detokenize", tokens=encode("a" * 128))).status == 200

    in_server(test)
