"""A folder of plain adapters behind HTTP: names, lists, errors, beside what is published."""

import asyncio
import shutil
from pathlib import Path
from typing import Any, cast

import pytest

from adapter_store.layout import WEIGHTS_NAME
from adapter_store.plain_folders import FRESH_S
from adapter_store.plain_origin import PLAIN_NAMESPACE
from adapter_store.store import AdapterStore
from deployments.config import load_config, shared_namespaces
from deployments.policy.admission import NO_LIMITS
from deployments.tenants.keys_file import KeysFileError
from deployments.tenants.tenants import Everybody, Keyring
from tests.deployments.support.fakes import FakeStore, serving
from tests.deployments.support.keys import ACME, digest
from tests.deployments.support.tiny_models import make_adapter, make_base

COMPLETIONS = "/v1/completions"


def test_what_lies_in_a_folder_answers_by_its_name(tmp_path: Path) -> None:
    make_base(tmp_path / "base", 64)
    root = tmp_path / "plain"
    for seed, name in enumerate(("sql", "both", "cut", "hot")):
        make_adapter(root / name, tmp_path / "base", 4, seed=seed)
    (root / "cut" / WEIGHTS_NAME).unlink()
    (root / "hot" / "generation_config.json").write_text('{"temperature": "hot"}')
    (root / "no adapter").mkdir()
    now_s = 100.0
    store = AdapterStore(
        f"file://{tmp_path}/store",
        tmp_path / "disk",
        2**30,
        plain_root=f"file://{root}",
        clock=lambda: now_s,
    )
    base = store.register_base(tmp_path / "base")
    store.publish(root / "both", "public", "both")
    how: dict[str, Any] = {
        "store": cast(FakeStore, store),
        "base_fingerprint": base,
        "tenants": Everybody(shared=(PLAIN_NAMESPACE,)),
    }

    async def test() -> None:
        nonlocal now_s
        async with serving(**how) as server:

            async def say(model: str) -> tuple[int, str]:
                answer = await server.post(COMPLETIONS, model=model, prompt="x")
                text = (
                    answer.json["choices"][0]["text"]
                    if answer.status == 200
                    else answer.body.decode()
                )
                return answer.status, text

            for name in ("sql", "base:sql", "plain/sql", "sql@latest", "plain/both", "both"):
                assert (await say(name))[0] == 200, name
            assert (await say("absent"))[0] == (await say("sql@1"))[0] == 404
            status, text = await say("cut")
            assert status == 400 and f"has no {WEIGHTS_NAME}" in text
            status, text = await say("hot")
            assert status == 400 and "temperature" in text and str(tmp_path) not in text
            status, text = await say("sql:0.5+both:0.5")
            assert status == 400 and "publish it to combine it" in text
            listed = (await server.call("GET", "/v1/models")).json["data"]
            names = ["base", "both", "plain/both", "cut", "hot", "sql"]
            assert [card["id"] for card in listed] == names
            one = (await server.call("GET", "/v1/models/sql")).json
            assert (one["parent"], len(one["root"])) == ("base", 64)
            shutil.copytree(root / "both", root / "new")
            shutil.rmtree(root / "sql")
            now_s += FRESH_S + 0.1
            assert [(await say(name))[0] for name in ("new", "sql")] == [200, 404]

    asyncio.run(test())


def test_the_namespace_is_open_to_all_tenants_and_no_tenants(tmp_path: Path) -> None:
    models = [{"id": "m", "source": "m"}]
    adapters = load_config({"models": models, "adapters": {"plain_root": "file://here"}}).adapters
    assert adapters.plain_root == f"file://{Path.cwd()}/here"
    assert shared_namespaces(adapters) == (PLAIN_NAMESPACE,)
    assert shared_namespaces(load_config({"models": models}).adapters) == ()
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"tenants: {{acme: {{keys: [{digest(ACME)}]}}}}")
    tenant = Keyring(keys, NO_LIMITS, shared=(PLAIN_NAMESPACE,)).identify(f"Bearer {ACME}")
    assert tenant.default_namespaces == ("acme", "public", "plain")
    keys.write_text(f"tenants: {{plain: {{keys: [{digest(ACME)}]}}}}")
    with pytest.raises(KeysFileError, match=r"tenants\.plain: no tenant may have this name"):
        Keyring(keys, NO_LIMITS, shared=(PLAIN_NAMESPACE,))
