"""Every route, asked for what is another tenant's, and for what never existed: the same answer.

The routes come from the ingress itself, so a new one fails here until it is listed: with requests
that name something, or with the reason why it names nothing of anybody.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from deployments.config_sections import AdminSection
from deployments.ingress.admin import Admin
from deployments.ingress.runtime_adapters import RuntimeAdapters
from deployments.text.embedding_use import EmbeddingUse
from tests.deployments.support.admin import ADAPTERS, PUBLISH, Place, made_place
from tests.deployments.support.fakes import HANG_S, Answered, Client, FakeStore, Server, serving
from tests.deployments.support.keys import ACME, UMBRELLA

# What is umbrella's, and what nobody has, of the same length
NAMES = {
    "a name": ("secret", "absent"),
    "a version": ("secret@1", "absent@1"),
    "an alias": ("secret@stable", "absent@stable"),
    "with its tenant": ("umbrella/secret", "nobodyyy/secret"),
    "with its tenant, another name": ("umbrella/secret", "umbrella/absent"),
    "with the base": ("base:secret", "base:absent"),
    "in a set": ("secret:0.5+mine:0.5", "absent:0.5+mine:0.5"),
    "a digest": ("", "0" * 64),  # its own, once it is known
}
CHAT = {"messages": [{"role": "user", "content": "x"}]}
Ask = Callable[[str], tuple[str, dict[str, Any] | None]]


def _posting(path: str, field: str = "model", **body: Any) -> Ask:
    return lambda name: (path, {field: name, **body})


# By method and path: what is asked for a name. Keys of the admin API are acme's publish key.
ASKED: dict[tuple[str, str], Ask] = {
    ("POST", "/v1/chat/completions"): _posting("/v1/chat/completions", **CHAT),
    ("POST", "/v1/completions"): _posting("/v1/completions", prompt="x"),
    ("POST", "/v1/embeddings"): _posting("/v1/embeddings", input="x"),
    ("POST", "/v1/responses"): _posting("/v1/responses", input="x"),
    ("POST", "/v1/messages"): _posting("/v1/messages", max_tokens=4, **CHAT),
    ("POST", "/v1/messages/count_tokens"): _posting("/v1/messages/count_tokens", **CHAT),
    ("POST", "/tokenize"): _posting("/tokenize", prompt="x"),
    ("POST", "/detokenize"): _posting("/detokenize", tokens=[65]),
    ("GET", "/v1/models/{model_id:path}"): lambda name: (f"/v1/models/{name}", None),
    ("POST", "/v1/unload_lora_adapter"): _posting("/v1/unload_lora_adapter", "lora_name"),
    ("POST", "/unload_lora_adapter"): _posting("/unload_lora_adapter", "lora_name"),
    ("POST", "/v1/load_lora_adapter"): _posting(
        "/v1/load_lora_adapter", "lora_name", lora_path="/nowhere"
    ),
    ("POST", "/load_lora_adapter"): _posting(
        "/load_lora_adapter", "lora_name", lora_path="/nowhere"
    ),
    ("POST", "/v1/feedback"): _posting("/v1/feedback", "id", score=1),
    **{
        ("POST", path): lambda name, path=path: (
            path,
            {"inputs": "x", "parameters": {"adapter_id": name}},
        )
        for path in ("/", "/invocations", "/generate", "/generate_stream", "/embed")
    },
    ("GET", ADAPTERS): lambda name: (f"{ADAPTERS}?name={name.partition('@')[0]}&state=any", None),
    ("GET", "/admin/v1/adapters/{tenant}/{adapter}"): lambda name: (_managed(name), None),
    ("POST", "/admin/v1/adapters/{tenant}/{adapter}"): lambda name: (_managed(name), {}),
    ("POST", "/admin/v1/adapters/{tenant}/{adapter}/state"): lambda name: (
        f"{_managed(name)}/state",
        {"state": "retired"},
    ),
    ("POST", "/admin/v1/adapters/{tenant}/{adapter}/aliases"): lambda name: (
        f"{_managed(name)}/aliases",
        {"alias": "mine", "version": 1},
    ),
    ("GET", "/admin/v1/adapters/{tenant}/{adapter}/aliases/{alias}"): lambda name: (
        f"{_managed(name)}/aliases/stable",
        None,
    ),
    ("GET", "/admin/v1/audit"): lambda name: (
        f"/admin/v1/audit?tenant={_tenant_of(name)}",
        None,
    ),
    ("POST", "/admin/v1/verify"): lambda name: (
        "/admin/v1/verify",
        {"tenant": _tenant_of(name), "name": _name_of(name)},
    ),
}
# What names nothing of a tenant, and why it is no leak.
NAMELESS = {
    ("GET", "/v1/models"): "shown below to list one's own alone",
    ("GET", "/info"): "facts about the base",
    ("GET", "/"): "the server's health",
    ("GET", "/ping"): "the server's health",
    ("GET", "/startup"): "the server's health",
    ("GET", "/health"): "the server's health",
    ("GET", "/health/{model_id:path}"): "a base's health",
    ("GET", "/metrics"): "wants a key of its own, which is no tenant's",
    ("GET", "/openapi.json"): "the API's document",
    ("GET", "/docs"): "the API's document",
}


def _tenant_of(name: str) -> str:
    return name.partition("/")[0] if "/" in name else "acme"


def _name_of(name: str) -> str:
    return name.rpartition("/")[2]


def _managed(name: str) -> str:
    return f"{ADAPTERS}/{_tenant_of(name)}/{_name_of(name)}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A store in which umbrella has `secret@stable`, and acme has `mine`."""
    place = Place(made_place(tmp_path_factory.mktemp("made")), tmp_path_factory.mktemp("place"))
    store = place.open()
    store.publish(place.peft, "umbrella", "secret", place.base)
    store.alias("umbrella", "secret", "stable", 1)
    store.publish(place.other, "acme", "mine", place.base)
    return place


@asynccontextmanager
async def isolated(place: Place) -> AsyncIterator[Server]:
    store, tenants = place.open(), place.keyring({"may_publish": True})
    admin = Admin(store, tenants, AdminSection(enabled=True), place.scratch)
    loads = RuntimeAdapters(store, ["/somewhere"], place.folder / "loads", 2**20)
    how: dict[str, Any] = {"base_fingerprint": place.base, "admin": admin, "tenants": tenants}
    how |= {"adapters": loads, "embeddings": EmbeddingUse("mean")}
    try:
        async with serving(store=cast(FakeStore, store), **how) as server:
            yield server
    finally:
        admin.close()


async def ask(server: Server, method: str, path: str, body: Any, key: str = ACME) -> Answered:
    key = PUBLISH if path.startswith("/admin") and key == ACME else key
    raw = b"" if body is None else json.dumps(body).encode()
    client = Client(server.api, method, path, raw, key, [(b"x-request-id", b"r")])
    await asyncio.wait_for(client.done, 10)
    return client.answered


def without(name: str, answered: Answered) -> tuple[int, dict[str, str], bytes]:
    """The answer but for the name itself, in its parts and whole, and what counts up."""
    body = answered.body
    for part in (name, *re.split(r"[/@+:]", name)):
        if len(part) > 5:
            body = body.replace(part.encode(), b"<name>")
    headers = {k: v for k, v in answered.headers.items() if k not in ("date", "content-length")}
    return answered.status, headers, body


def test_every_route_is_listed(place: Place) -> None:
    async def run() -> None:
        async with isolated(place) as server:
            routes = {(route.method, route.path) for route in server.api.routes}  # type: ignore[attr-defined]
            assert routes == ASKED.keys() | NAMELESS.keys()

    asyncio.run(run())


@pytest.mark.parametrize("kind", NAMES)
def test_what_is_anothers_answers_as_what_never_existed(place: Place, kind: str) -> None:
    anothers, nobodys = NAMES[kind]
    if kind == "a digest":
        [record] = place.open().list("umbrella")
        anothers = record.digest

    async def run() -> None:
        async with asyncio.timeout(HANG_S), isolated(place) as server:
            for (method, route), asked in ASKED.items():
                first = await ask(server, method, *asked(anothers))
                second = await ask(server, method, *asked(nobodys))
                assert without(anothers, first) == without(nobodys, second), (method, route)
                assert first.status in (400, 403, 404, 409, 415) or route in OWN_SEARCHES, (
                    method,
                    route,
                    first.status,
                )
            assert server.engine.requests == [], "no engine has heard of it"
            assert [r.state for r in place.open().list("umbrella")] == ["live"]

    asyncio.run(run())


# These search what is the key's own, and find nothing there.
OWN_SEARCHES = (ADAPTERS, "/admin/v1/audit", "/admin/v1/verify", "/generate_stream")


def test_a_list_has_ones_own_alone_and_its_owner_is_served(place: Place) -> None:
    async def run() -> None:
        async with isolated(place) as server:
            listed = (await ask(server, "GET", "/v1/models", None)).json["data"]
            assert [model["id"] for model in listed] == ["base", "mine"]
            body = {"model": "secret@stable", "prompt": "x", "max_tokens": 1}
            answer = await ask(server, "POST", "/v1/completions", body, UMBRELLA)
            assert answer.status == 200, answer.body

    asyncio.run(run())


@pytest.mark.parametrize("field", ["previous_response_id", "conversation"])
def test_ids_of_responses_open_nothing(place: Place, field: str) -> None:
    """Nothing is stored: an id of another tenant's answer is refused as one that never was."""

    async def run() -> None:
        async with isolated(place) as server:
            body = {"model": "base", "input": "x", "max_output_tokens": 16}
            made = await ask(server, "POST", "/v1/responses", body, UMBRELLA)
            theirs = str(made.json["id"])
            nobodys = theirs[:-1] + ("1" if theirs[-1] != "1" else "2")
            answers = [
                await ask(server, "POST", "/v1/responses", {**body, field: each})
                for each in (theirs, nobodys)
            ]
            assert without(theirs, answers[0]) == without(nobodys, answers[1])
            assert answers[0].status == 400

    asyncio.run(run())
