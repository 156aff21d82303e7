"""Weighted sets of adapters: how they are named, found, isolated and refused."""

from pathlib import Path
from typing import Any

import pytest

from adapter_store.chat_template import AdapterTemplate
from adapter_store.recipes import make_recipe
from deployments.ingress.model_names import AdapterSet, parse_adapter_set, parse_model_name
from deployments.policy.admission import NO_LIMITS
from deployments.tenants.tenants import Keyring
from tests.deployments.support.fakes import (
    BASE,
    Answered,
    FakeStore,
    Server,
    byte_vocabulary,
    in_server,
)
from tests.deployments.support.keys import ACME, keys_file

COMPLETIONS = "/v1/completions"
RED, BLUE = "red-digest", "blue-digest"


def digest(weights: dict[str, float], **how: Any) -> str:
    return make_recipe(list(weights), list(weights.values()), **how).digest(BASE)


async def ask(server: Server, model: str, **fields: Any) -> Answered:
    return await server.post(COMPLETIONS, model=model, prompt="hi", max_tokens=9, **fields)


# ---- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "base", "members"),
    [
        ("a:0.7+b:0.3", None, [("a", 0.7), ("b", 0.3)]),
        ("a:1", None, [("a", 1.0)]),
        ("a@2:-1.5+t/b@x:100", None, [("a@2", -1.5), ("t/b@x", 100.0)]),
        ("large:a:0.7+b:0.3", "large", [("a", 0.7), ("b", 0.3)]),
        ("x/y:z:a:0.5+b:0.5", "x/y:z", [("a", 0.5), ("b", 0.5)]),
        ("t/large:0.5+a:0.5", None, [("t/large", 0.5), ("a", 0.5)]),
    ],
)
def test_a_set_is_names_with_weights(
    text: str, base: str | None, members: list[tuple[str, float]]
) -> None:
    bases = ["large", "x/y:z"]
    assert parse_model_name(text, bases) is None
    assert parse_adapter_set(text, bases) == AdapterSet(members, base)


@pytest.mark.parametrize(
    "text",
    [
        *("a+b", "a:0.7+b", "a:0.7+", "+a:0.7", "a:x", "a:1e3", "a:.5", "a:1000", "a:nan", "a:+1"),
        *("a:0.7 +b:0.3", "a:b:0.7", "large:0.7+b:0.3", "a:0.7+large:b:0.3", "", "a:0.1234567890"),
    ],
)
def test_what_is_no_set_is_none(text: str) -> None:
    assert parse_adapter_set(text, ["large"]) is None


def test_a_name_with_one_weight_is_an_adapter_of_a_base_if_there_is_such_a_base() -> None:
    name = parse_model_name("a:0.7", ["a"])
    assert name is not None and (name.base, name.adapter_name) == ("a", "0.7")
    assert parse_model_name("a:0.7", ["large"]) is None


# ---- requests --------------------------------------------------------------------------------


def test_every_spelling_of_a_set_is_one_adapter_of_its_own() -> None:
    async def test(server: Server) -> None:
        listed = [{"model": "blue", "weight": 0.3}, {"model": "base:red@1", "weight": 0.7}]
        for answer in (
            await ask(server, "red:0.7+blue:0.3"),
            await ask(server, "blue:0.30+red@1:0.7"),
            await ask(server, "base:red:0.7+blue:0.3"),
            await ask(server, "base", adapters=listed),
            await server.post("/base/v1/completions", model="red:0.7+blue:0.3", prompt="hi"),
        ):
            assert answer.status == 200, answer.body
        folders = {r.adapter_folder for r in server.engine.requests}
        [folder] = folders
        assert folder is not None and folder.digest == digest({RED: 0.7, BLUE: 0.3})
        await ask(server, "red:0.7+blue:0.4")
        assert server.engine.requests[-1].adapter_folder.digest == digest({RED: 0.7, BLUE: 0.4})
        assert set(server.store.pins.values()) == {0}

    in_server(test)


def test_a_set_shares_no_cache_with_another_version_of_a_member() -> None:
    async def test(server: Server) -> None:
        await ask(server, "red:0.7+blue:0.3")
        ref = server.store.refs["red"]
        server.store.refs["red"] = type(ref)("public", "red", 2, "newer-digest", ref.base)
        await ask(server, "red:0.7+blue:0.3")
        first, second = (r.adapter_folder.digest for r in server.engine.requests)
        assert first != second == digest({"newer-digest": 0.7, BLUE: 0.3})

    in_server(test)


@pytest.mark.parametrize(
    ("model", "adapters", "status", "named"),
    [
        ("red:0.7+nobody:0.3", None, 404, "'nobody'"),
        ("nobody:1", None, 404, "'nobody'"),
        ("red:0.7+other/blue:0.3", None, 404, "'other/blue'"),
        ("+".join(["red:0.1"] * 9), None, 400, "at most 8 adapters, not 9"),
        ("red:100.5", None, 400, "100.5"),
        ("base", [{"model": "nobody", "weight": 1}], 404, "'nobody'"),
        ("base", [{"model": "base", "weight": 1}], 400, "'base' is not one adapter"),
        ("base", [{"model": "red:0.5", "weight": 1}], 400, "'red:0.5' is not one adapter"),
        ("red", [{"model": "red", "weight": 1}], 400, "must be a base model"),
        ("nobody", [{"model": "red", "weight": 1}], 400, "must be a base model"),
        ("base", [], 400, "adapters"),
        ("base", [{"model": "red"}], 400, "adapters[0].weight"),
        ("base", [{"model": "red", "weight": 101}], 400, "adapters[0].weight"),
        ("base", [{"model": "red", "weight": 0.1}] * 9, 400, "adapters"),
        ("base", [{"model": "red", "weight": 1, "x": 1}], 400, "adapters[0].x"),
    ],
)
def test_what_is_wrong_with_a_set_is_named(
    model: str, adapters: Any, status: int, named: str
) -> None:
    async def test(server: Server) -> None:
        answer = await ask(server, model, adapters=adapters)
        assert answer.status == status and named in answer.error["message"]
        assert server.engine.requests == []

    in_server(test)


def test_members_are_found_as_the_tenants_own(tmp_path: Path) -> None:
    class Owned(FakeStore):
        def resolve_first(self, places: Any, full_name: str) -> Any:
            owners = {"red": "umbrella", "blue": "public"}
            for tenant, _ in places:
                if owners.get(full_name) == tenant:
                    return self.resolve(tenant, full_name)
            return self.resolve("", "nobody")

    async def test(server: Server) -> None:
        fields = {"prompt": "hi", "max_tokens": 9}
        own = await server.post(COMPLETIONS, ACME, model="blue:0.5", **fields)
        assert own.status == 200 and server.engine.requests[-1].tenant == "acme"
        answer = await server.post(COMPLETIONS, ACME, model="blue:0.5+red:0.5", **fields)
        assert answer.status == 404 and "'red'" in answer.error["message"]

    store, tenants = Owned("red", "blue"), Keyring(keys_file(tmp_path), NO_LIMITS)
    in_server(test, store=store, tenants=tenants)


def test_all_sets_share_one_label_in_the_metrics() -> None:
    async def test(server: Server) -> None:
        for weight in ("0.1", "0.2", "0.3"):
            await ask(server, f"red:{weight}")
        metrics = (await server.call("GET", "/metrics")).body.decode()
        assert 'reef_generation_tokens_total{adapter="base:combined"}' in metrics
        assert "red" not in metrics

    in_server(test)


def test_a_set_has_a_card_with_its_digest() -> None:
    async def test(server: Server) -> None:
        card = (await server.call("GET", "/v1/models/red:0.7+blue:0.3")).json
        assert card["parent"] == "base" and card["root"] == digest({RED: 0.7, BLUE: 0.3})

    in_server(test)


@pytest.mark.parametrize(("other", "status"), [("<{{ messages[0].content }}>", 200), ("x", 400)])
def test_a_set_has_the_chat_template_that_its_members_have(other: str, status: int) -> None:
    async def test(server: Server) -> None:
        server.store.templates |= {
            RED: AdapterTemplate("<{{ messages[0].content }}>", {}),
            BLUE: AdapterTemplate(other, {}),
        }
        answer = await server.post(
            "/v1/chat/completions",
            model="red:0.7+blue:0.3",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=20,
        )
        assert answer.status == status, answer.body
        if status == 200:
            assert answer.json["choices"][0]["message"]["content"].endswith(":<HI>")
        else:
            assert "different chat templates" in answer.error["message"]

    in_server(test, vocabulary=byte_vocabulary(None))
