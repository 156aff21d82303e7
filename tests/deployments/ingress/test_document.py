"""/openapi.json against the routes, the models and the answers themselves; /docs."""

import json
from html.parser import HTMLParser
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema import ValidationError as JsonSchemaError

from deployments.ingress.api.openapi import bodies_of, documented_path
from deployments.ingress.api_route import ApiRoute
from deployments.ingress.http_errors import ApiError
from tests.deployments.support.fakes import Answered, Server, in_server

PROMPT = {"model": "base", "prompt": "abc"}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
# A request that is answered, by route; further surfaces need none to be checked for the rest.
REQUESTS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/chat/completions", {**CHAT, "n": 2, "logprobs": True, "return_token_ids": True}),
    ("POST", "/v1/completions", PROMPT),
    ("POST", "/v1/completions", {**PROMPT, "logprobs": 2, "echo": True, "stop": "B"}),
    ("POST", "/v1/embeddings", {"model": "base", "input": ["a", "b"]}),
    ("POST", "/tokenize", PROMPT),
    ("POST", "/tokenize", {**CHAT, "return_token_strs": True}),
    ("POST", "/tokenize", {"inputs": "abc"}),
    ("POST", "/detokenize", {"tokens": [97]}),
    ("POST", "/generate", {"inputs": "abc", "parameters": {"details": True}}),
    ("POST", "/", {"inputs": "abc"}),
    ("GET", "/", None),
    ("POST", "/generate", {"inputs": ""}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/red", None),
    ("GET", "/v1/models/nobody", None),
    ("GET", "/health", None),
    ("GET", "/health/base", None),
    ("GET", "/health/nobody", None),
    ("POST", "/v1/chat/completions", {}),
    ("POST", "/detokenize", {"tokens": [-1]}),
]


async def document_of(server: Server) -> dict[str, Any]:
    answer = await server.call("GET", "/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    return answer.json


def test_every_route_is_in_the_document_and_nothing_else() -> None:
    async def test(server: Server) -> None:
        document = await document_of(server)
        there = {(m, p) for p, methods in document["paths"].items() for m in methods}
        routes = [route for route in server.api.routes if isinstance(route, ApiRoute)]
        assert len(routes) == len(server.api.routes), "all are registered with Ingress.route"
        assert there == {(route.method.lower(), documented_path(route)) for route in routes}
        for route in routes:
            operation = document["paths"][documented_path(route)][route.method.lower()]
            assert operation["summary"] == route.doc.summary != "", route.path
            assert ("servers" in operation) == route.needs_key
            assert bool(bodies_of(route)) == (route.method == "POST"), f"{route.path}: its body"

    in_server(test)


def test_every_reference_leads_somewhere_and_every_schema_is_one() -> None:
    async def test(server: Server) -> None:
        document = await document_of(server)
        schemas = document["components"]["schemas"]
        for reference in references(document):
            _, _, kind, name = reference.split("/")
            assert name in document["components"][kind], reference
        for schema in schemas.values():
            Draft202012Validator.check_schema(schema)

    in_server(test)


def references(value: object) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [each for inner in value.values() for each in references(inner)]
    return (
        [each for inner in value for each in references(inner)] if isinstance(value, list) else []
    )


def test_answers_and_errors_are_as_the_document_says() -> None:
    async def test(server: Server) -> None:
        document = await document_of(server)
        for method, path, body in REQUESTS:
            answer = await server.call(method, path, body)
            assert_documented(document, answer, method, path)
            if body is not None and answer.status == 200:
                schema = operation_of(document, method, path)["requestBody"]["content"]
                assert_valid(document, schema["application/json"]["schema"], body)

    in_server(test)


def operation_of(document: dict[str, Any], method: str, path: str) -> dict[str, Any]:
    for known in (path, f"{path.rpartition('/')[0]}/{{model_id}}"):
        if known in document["paths"]:
            return document["paths"][known][method.lower()]
    raise AssertionError(path)


def assert_documented(document: dict[str, Any], answer: Answered, method: str, path: str) -> None:
    responses = operation_of(document, method, path)["responses"]
    assert str(answer.status) in responses, (method, path, answer.body)
    kind = answer.headers["content-type"].partition(";")[0]
    assert_valid(document, responses[str(answer.status)]["content"][kind]["schema"], answer.json)


def assert_valid(document: dict[str, Any], schema: object, value: object) -> None:
    whole = {"components": document["components"], "allOf": [schema]}
    Draft202012Validator(whole).validate(value)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 429, 500, 503])
def test_the_errors_of_every_surface_are_as_the_document_says(status: int) -> None:
    async def test(server: Server) -> None:
        schemas = (await document_of(server))["components"]["schemas"]
        for route in server.api.routes:
            assert isinstance(route, ApiRoute)
            body = json.loads(route.errors.body(ApiError(status, "No.", code="some_code")))
            Draft202012Validator(schemas[route.errors.name]).validate(body)

    in_server(test)


def test_fields_that_are_read_in_several_shapes_are_described_so() -> None:
    async def test(server: Server) -> None:
        document = await document_of(server)
        request = {"$ref": "#/components/schemas/CompletionRequest"}
        good: list[dict[str, Any]] = [
            {"prompt": "a"},
            {"prompt": ["a", "b"]},
            {"prompt": [97]},
            {"prompt": [[97], [98]]},
            {"prompt": "a", "stop": "x"},
            {"prompt": "a", "stop": ["x", "y"]},
            {"prompt": "a", "logit_bias": {"97": 1}},
        ]
        for fields in good:
            body = {"model": "base", **fields}
            assert (await server.call("POST", "/v1/completions", body)).status == 200
            assert_valid(document, request, body)
        for fields in ({"prompt": 1}, {"prompt": []}, {"stop": 1}, {"unknown": 1}, {"n": 0}):
            body = {"model": "base", "prompt": "a", **fields}
            assert (await server.call("POST", "/v1/completions", body)).status == 400
            with pytest.raises(JsonSchemaError):
                assert_valid(document, request, body)

    in_server(test)


class Tags(HTMLParser):
    """Finds what a page would load, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_shows_every_route_and_loads_nothing() -> None:
    async def test(server: Server) -> None:
        answer = await server.call("GET", "/docs")
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        page = Tags()
        page.feed(answer.body.decode())
        assert page.open == [] and page.loaded == ["openapi.json"]
        for route in server.api.routes:
            assert isinstance(route, ApiRoute)
            assert f"{route.method} {documented_path(route)}" in page.words
        assert "max_completion_tokens" in page.words

    in_server(test)
