"""Paths that begin with a base's id: every route of tenants, for that base alone."""

import pytest

from deployments.ingress.api_route import ApiRoute
from deployments.ingress.base_paths import BasePaths, name_within
from tests.deployments.support.fakes import Server, in_server

ID = "org/model:8b"  # as ids may be


def test_the_longest_base_that_a_path_begins_with_is_meant() -> None:
    bases = BasePaths(["a", "a/b", "a/b:c"])
    assert bases.split("/a/v1/models") == ("a", "/v1/models")
    assert bases.split("/a/b/v1/models/a/v1/x") == ("a/b", "/v1/models/a/v1/x")
    assert bases.split("/a/b:c/tokenize") == ("a/b:c", "/tokenize")
    assert bases.split("/ab/v1/models") is None
    assert bases.split("/a") == ("a", "/")


def test_a_name_below_a_base_is_one_of_that_base() -> None:
    assert name_within(None, "red") == "red"
    assert name_within(ID, "") == ID == name_within(ID, ID)
    assert name_within(ID, "red@2") == f"{ID}:red@2" == name_within(ID, f"{ID}:red@2")
    assert name_within("b", "other:red") == "b:other:red"  # which nothing is called


@pytest.mark.parametrize("model", [None, "", ID, "red", f"{ID}:red", "red@1"])
@pytest.mark.parametrize("prefix", ["", f"/{ID}"])
def test_the_model_of_a_body_may_be_missing_or_an_adapter_of_the_base(
    model: str | None, prefix: str
) -> None:
    async def test(server: Server) -> None:
        body = {"prompt": "x"} if model is None else {"prompt": "x", "model": model}
        answer = await server.call("POST", f"{prefix}/v1/completions", body)
        if not prefix and not model:
            assert answer.status in (400, 404)
            return
        assert answer.status == 200, answer.body
        is_adapter = "red" in (model or "")
        assert answer.json["choices"][0]["text"] == ("red:X" if is_adapter else "X")

    in_server(test, base_id=ID)


@pytest.mark.parametrize("model", ["nobody", "base", "other:red", "org/red", "a b", 7])
def test_no_other_base_is_meant(model: object) -> None:
    async def test(server: Server) -> None:
        answer = await server.call("POST", f"/{ID}/v1/completions", {"prompt": "x", "model": model})
        assert answer.status == (404 if isinstance(model, str) else 400), answer.body
        assert answer.error["param"] == "model" and server.engine.requests == []

    in_server(test, base_id=ID)


def test_a_base_that_is_not_served_is_404_by_name() -> None:
    async def test(server: Server) -> None:
        for path in ("/org/model/v1/completions", "/org/v1/v1/completions", "/red/v1/completions"):
            answer = await server.call("POST", path, {"prompt": "x"})
            assert (answer.status, answer.error["code"]) == (404, "model_not_found")
            assert repr(path.partition("/v1/")[0][1:]) in answer.error["message"]
        for path in ("/org/tokenize", f"/{ID}/v1/nothing"):
            answer = await server.call("POST", path, {"prompt": "x"})
            assert answer.status == 404 and f"POST {path}" in answer.error["message"]

    in_server(test, base_id=ID)


def test_every_route_of_tenants_is_there_below_a_base_and_no_other() -> None:
    async def test(server: Server) -> None:
        for route in server.api.routes:
            assert isinstance(route, ApiRoute)
            path = route.path.replace("{model_id:path}", "red")
            answer = await server.call(route.method, f"/{ID}{path}", {})
            is_there = answer.status != 404
            assert is_there == route.needs_key, (route.path, answer.body)
            if is_there:
                wrong = await server.call("DELETE", f"/{ID}{path}")
                assert wrong.status == 405 and route.method in wrong.headers["allow"]

    in_server(test, base_id=ID)


def test_models_below_a_base_are_the_base_and_its_adapters() -> None:
    async def test(server: Server) -> None:
        answer = await server.call("GET", f"/{ID}/v1/models")
        assert [card["id"] for card in answer.json["data"]] == [ID, "blue", "red"]
        assert (await server.call("GET", f"/{ID}/v1/models/red")).json["parent"] == ID
        assert (await server.call("GET", f"/{ID}/v1/models/{ID}")).json["parent"] is None
        page = await server.call("GET", f"/{ID}/v1/models?limit=1")
        assert page.json["has_more"] is True

    in_server(test, base_id=ID)
