"""Adapters that clients load and unload over HTTP, with a real store in a folder."""

import asyncio
import json
import shutil
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import save_file

from adapter_store.conversion.options import ConversionOptions
from adapter_store.store import AdapterStore
from deployments.config import ConfigError, load_config
from deployments.ingress.runtime_adapters import MAX_WAITING, RuntimeAdapters
from deployments.policy.admission import Limits
from deployments.tenants.tenants import Keyring, Tenants
from tests.adapter_store.adapters import write_base, write_peft
from tests.deployments.support.fakes import FakeStore, Server, serving
from tests.deployments.support.keys import ACME, UMBRELLA, digest, keys_file

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
SGLANG_LOAD, SGLANG_UNLOAD = "/load_lora_adapter", "/unload_lora_adapter"


@dataclass
class Place:
    """A root of adapters `one` and `two`, a store that knows their base, and a folder outside."""

    folder: Path
    base: str  # fingerprint

    @property
    def allowed(self) -> Path:
        return self.folder / "allowed"

    def path(self, name: str) -> str:
        return str(self.allowed / name)

    def open(self) -> AdapterStore:
        return AdapterStore(f"file://{self.folder / 'store'}", self.folder / "disk", 2**30)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    base = write_base(folder / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        for seed, name in enumerate(("one", "two")):
            write_peft(folder / name, base, seed)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Place:
    for name in ("one", "two"):
        shutil.copytree(made / name, tmp_path / "allowed" / name)
        shutil.copytree(made / name, tmp_path / "outside" / name)
    found = Place(tmp_path, "")
    found.base = found.open().register_base(made / "base")
    return found


def run(
    place: Place,
    test: Callable[[Server], Awaitable[None]],
    tenants: Tenants | None = None,
    roots: list[str] | None = None,
    conversion: ConversionOptions | None = None,
) -> None:
    async def wrapped() -> None:
        async with replica(place, tenants, roots, conversion) as server:
            await test(server)

    asyncio.run(wrapped())


@asynccontextmanager
async def replica(
    place: Place,
    tenants: Tenants | None = None,
    roots: list[str] | None = None,
    conversion: ConversionOptions | None = None,
) -> AsyncIterator[Server]:
    """One ingress with a store object of its own, as each ingress replica has."""
    store = place.open()
    roots = [str(place.allowed)] if roots is None else roots
    adapters = RuntimeAdapters(store, roots, place.folder / "disk", 2**30, conversion=conversion)
    how: dict[str, Any] = {"base_fingerprint": place.base, "adapters": adapters}
    async with serving(store=cast(FakeStore, store), tenants=tenants, **how) as server:
        yield server
    adapters.close()


async def said(server: Server, model: str, key: str | None = None) -> str:
    body = {"model": model, "prompt": "x"}
    answer = await server.call("POST", "/v1/completions", body, key)
    return answer.json["choices"][0]["text"] if answer.status == 200 else str(answer.status)


def test_what_is_loaded_answers_until_it_is_unloaded(place: Place) -> None:
    async def test(server: Server) -> None:
        assert await said(server, "mine") == "404"
        body = {"lora_name": "mine", "lora_path": place.path("one"), "load_inplace": False}
        answer = await server.call("POST", LOAD, {**body, "is_3d_lora_weight": False})
        assert answer.status == 200, answer.body
        assert answer.body == b"Success: LoRA adapter 'mine' added successfully."
        ref = place.open().resolve("public", "mine")
        assert await said(server, "mine") == f"{ref.digest[:3]}:X"
        answer = await server.call("POST", UNLOAD, {"lora_name": "mine", "lora_int_id": None})
        assert answer.status == 200
        assert answer.body == b"Success: LoRA adapter 'mine' removed successfully."
        assert await said(server, "mine") == "404"

    run(place, test)


def test_a_name_that_is_there_is_loaded_again_in_place_alone(place: Place) -> None:
    async def test(server: Server) -> None:
        body = {"lora_name": "mine", "lora_path": place.path("one")}
        assert (await server.call("POST", LOAD, body)).status == 200
        body["lora_path"] = place.path("two")
        again = await server.call("POST", LOAD, body)
        assert (again.status, again.error["type"]) == (400, "InvalidUserInput")
        assert again.error["code"] == 400 and "load_inplace" in again.error["message"]
        assert place.open().resolve("public", "mine").version == 1
        assert (await server.call("POST", LOAD, {**body, "load_inplace": True})).status == 200
        assert place.open().resolve("public", "mine").version == 2

    run(place, test)


def write_mlx(folder: Path) -> None:
    """Write what mlx_lm.lora does."""
    folder.mkdir()
    config = {"fine_tune_type": "lora", "lora_parameters": {"scale": 2.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    module = "model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_a": np.ones((32, 2)), f"{module}.lora_b": np.ones((2, 32))}
    tensors = {name: factor.astype(np.float32) for name, factor in factors.items()}
    save_file(tensors, folder / "adapters.safetensors")


def test_other_formats_are_converted_if_the_configuration_says_so(place: Place) -> None:
    write_mlx(place.allowed / "mlx")
    body = {"lora_name": "m", "lora_path": place.path("mlx")}

    async def off(server: Server) -> None:
        answer = await server.call("POST", LOAD, body)
        assert answer.status == 400 and "lora_parameters is MLX's" in answer.error["message"]

    async def on(server: Server) -> None:
        answer = await server.call("POST", LOAD, body)
        assert answer.status == 200, answer.json
        assert await said(server, "m") != "404"
        taken = body | {"lora_name": "n", "lora_path": place.path("one")}  # as it is
        assert (await server.call("POST", LOAD, taken)).status == 200

    async def too_slow(server: Server) -> None:
        answer = await server.call("POST", LOAD, body | {"lora_name": "s"})
        assert answer.status == 400 and "than the 0.001 s allowed" in answer.error["message"]

    run(place, off)
    run(place, on, conversion=ConversionOptions())
    store = place.open()
    manifest = store.manifest(store.resolve("public", "m"))
    assert manifest.conversion is not None and manifest.conversion.source == "MLX"
    assert store.manifest(store.resolve("public", "n")).conversion is None
    run(place, too_slow, conversion=ConversionOptions(limit_s=0.001))


def test_sglangs_answers_say_what_is_loaded(place: Place) -> None:
    async def test(server: Server) -> None:
        body = {"lora_name": "mine", "lora_path": place.path("one"), "pinned": False}
        answer = await server.call("POST", SGLANG_LOAD, body)
        ref = place.open().resolve("public", "mine")
        wanted = {"success": True, "error_message": "", "loaded_adapters": {"mine": ref.digest}}
        assert (answer.status, answer.json) == (200, wanted)
        again = await server.call("POST", SGLANG_LOAD, body)
        assert again.status == 400 and again.json["success"] is False
        assert "exists already" in again.json["error_message"]
        answer = await server.call("POST", SGLANG_UNLOAD, {"lora_name": "mine"})
        assert (answer.status, answer.json) == (200, {**wanted, "loaded_adapters": {}})
        answer = await server.call("POST", SGLANG_UNLOAD, {"lora_name": "mine"})
        assert answer.status == 400 and answer.json["success"] is False

    run(place, test)


def test_another_ingress_replica_serves_it_and_only_one_of_two_is_the_first(place: Place) -> None:
    async def test() -> None:
        async with replica(place) as one, replica(place) as two:
            bodies = [{"lora_name": "mine", "lora_path": place.path(n)} for n in ("one", "two")]
            answers = await asyncio.gather(
                one.call("POST", LOAD, bodies[0]), two.call("POST", LOAD, bodies[1])
            )
            assert sorted(answer.status for answer in answers) == [200, 400]
            ref = place.open().resolve("public", "mine")
            assert ref.version == 1
            for server in (one, two):
                assert await said(server, "mine") == f"{ref.digest[:3]}:X"
            assert (await one.call("POST", UNLOAD, {"lora_name": "mine"})).status == 200
            answer = await two.call("POST", UNLOAD, {"lora_name": "mine"})
            assert (answer.status, answer.error["type"]) == (404, "NotFoundError")

    asyncio.run(test())


def escapes(place: Place) -> list[tuple[str, int]]:
    (place.allowed / "link").symlink_to(place.folder / "outside" / "one")
    (place.allowed / "inner").symlink_to(place.allowed / "one")
    shutil.copytree(place.allowed / "one", place.allowed / "leaky")
    (place.allowed / "leaky" / "chat_template.jinja").symlink_to("/etc/hostname")
    sibling = place.folder / "allowed-not"
    shutil.copytree(place.allowed / "one", sibling)
    return [
        (str(place.folder / "outside" / "one"), 400),
        (str(place.folder / "outside" / "nothing"), 400),
        (f"{place.allowed}/../outside/one", 400),
        (place.path("link"), 400),
        (place.path("leaky"), 400),
        (str(sibling), 400),
        ("allowed/one", 400),
        ("org/adapter", 400),
        ("s3://bucket/one", 400),
        ("file:///etc", 400),
        (f"{place.path('one')}\0", 400),
        ("/", 400),
        (place.path("nothing"), 404),
        (str(place.allowed), 400),  # no adapter by itself
        (place.path("inner"), 200),
        (f"{place.path('two')}/", 200),
    ]


def test_no_path_leads_out_of_what_is_allowed(place: Place) -> None:
    async def test(server: Server) -> None:
        for number, (path, status) in enumerate(escapes(place)):
            body = {"lora_name": f"n{number}", "lora_path": path}
            answer = await server.call("POST", LOAD, body)
            assert answer.status == status, (path, answer.body)
            if status != 200:
                assert answer.error["param"] == "lora_path"
                kind = "InvalidUserInput" if status == 400 else "NotFoundError"
                assert answer.error["type"] == kind
        assert len(place.open().list("public")) == 2

    run(place, test)


@pytest.mark.parametrize(
    "path", ["s3://bucket", "s3://bucket/allowed-not/a", "s3://bucket/allowed/../a"]
)
def test_no_s3_path_leads_out_either(place: Place, path: str) -> None:
    async def test(server: Server) -> None:
        answer = await server.call("POST", LOAD, {"lora_name": "a", "lora_path": path})
        assert answer.status == 400 and "below none" in answer.error["message"]

    run(place, test, roots=["s3://bucket/allowed"])


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (LOAD, {}, 400, "lora_name"),
        (LOAD, {"lora_name": "a"}, 400, "lora_path"),
        (LOAD, {"lora_name": "", "lora_path": "x"}, 400, "lora_name"),
        (LOAD, {"lora_name": "../a", "lora_path": "one"}, 400, "lora_name"),
        (LOAD, {"lora_name": "a@1", "lora_path": "one"}, 400, "lora_name"),
        (LOAD, {"lora_name": "a", "lora_path": "one", "is_3d_lora_weight": True}, 400, None),
        (LOAD, {"lora_name": "a", "lora_path": "one", "base_model_name": "b"}, 404, "model"),
        (LOAD, {"lora_name": "a", "lora_path": "one", "more": 1}, 400, "more"),
        (UNLOAD, {}, 400, "lora_name"),
        (UNLOAD, {"lora_name": "nobody"}, 404, "lora_name"),
        (UNLOAD, {"lora_name": "a/b"}, 404, "lora_name"),
    ],
)
def test_what_is_wrong_is_refused_by_its_field(
    place: Place, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    if "one" in body.values():
        body = {**body, "lora_path": place.path("one")}

    async def test(server: Server) -> None:
        answer = await server.call("POST", path, body)
        assert answer.status == status == answer.error["code"], answer.body
        assert param in (None, answer.error["param"])
        assert place.open().list() == ()

    run(place, test)


def test_only_keys_with_the_right_load_and_only_into_their_own_namespace(
    place: Place, tmp_path: Path
) -> None:
    tenants = {
        "acme": {"keys": [digest(ACME)], "may_publish": True},
        "umbrella": {"keys": [digest(UMBRELLA)], "namespaces": ["acme"]},
    }
    keyring = Keyring(keys_file(tmp_path, tenants=tenants), Limits())

    async def test(server: Server) -> None:
        body = {"lora_name": "mine", "lora_path": place.path("one")}
        for path in (LOAD, SGLANG_LOAD):
            assert (await server.call("POST", path, body)).status == 401
        assert (await server.call("POST", LOAD, body, UMBRELLA)).status == 403
        assert (await server.call("POST", SGLANG_LOAD, body, UMBRELLA)).status == 400
        assert (await server.call("POST", LOAD, body, ACME)).status == 200
        ref = place.open().resolve("acme", "mine")
        assert await said(server, "mine", ACME) == f"{ref.digest[:3]}:X"
        assert await said(server, "mine", UMBRELLA) == "404"
        for name in ("mine", "acme/mine"):  # granted to read, not to retire
            gone = await server.call("POST", UNLOAD, {"lora_name": name}, UMBRELLA)
            assert gone.status == 403
        assert place.open().list("public") == ()

    run(place, test, keyring)


def test_it_is_off_unless_places_are_configured(place: Place) -> None:
    async def test(server: Server) -> None:
        body = {"lora_name": "mine", "lora_path": place.path("one")}
        answer = await server.call("POST", LOAD, body)
        assert (answer.status, answer.error["type"]) == (403, "PermissionDeniedError")
        assert "adapters.load_from" in answer.error["message"]

    run(place, test, roots=[])


def test_few_may_wait(place: Place) -> None:
    async def test(server: Server) -> None:
        body = {"lora_name": "mine", "lora_path": place.path("one"), "load_inplace": True}
        answers = await asyncio.gather(
            *(server.call("POST", LOAD, body) for _ in range(MAX_WAITING + 8))
        )
        statuses = sorted(answer.status for answer in answers)
        assert statuses == [200] * MAX_WAITING + [429] * 8
        assert place.open().resolve("public", "mine").version == 1, "the same content"

    run(place, test)


def test_a_place_is_a_folder_or_on_s3(tmp_path: Path) -> None:
    def config(place: str) -> Any:
        models = [{"id": "a", "source": str(tmp_path)}]
        return load_config({"models": models, "adapters": {"load_from": [place]}})

    assert config("x").adapters.load_from == [str(Path("x").absolute())]
    assert config("s3://b/p").adapters.load_from == ["s3://b/p"]
    for wrong in ("", "http://x", "file:///x"):
        with pytest.raises(ConfigError, match="load_from"):
            config(wrong)
