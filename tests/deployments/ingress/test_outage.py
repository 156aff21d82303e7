"""An object store that goes away while a server runs: what is known and local goes on."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from adapter_store.errors import SourceUnavailable
from adapter_store.store import AdapterStore
from deployments.policy.admission import Limits
from deployments.tenants.tenant import Tenant
from deployments.tenants.tenants import Everybody
from tests.adapter_store.synthetic import BASE, synthetic
from tests.deployments.support.fakes import FakeEngine, Server, encode, serving

COMPLETIONS = "/v1/completions"
OPERATIONS = ("get", "get_many", "get_file", "get_range", "size", "put", "put_if_absent", "list")


def store_with(folder: Path, *names: str) -> AdapterStore:
    """A new store that looks for changes at every opportunity. Names are <tenant>/<adapter>."""
    store = AdapterStore(f"file://{folder}/store", folder / "cache", 10**6, refresh_interval_s=0)
    for seed, full_name in enumerate(names):
        tenant, name = full_name.split("/")
        manifest, files = synthetic(seed)
        for file, content in files.items():
            store._objects.put(f"blobs/{manifest.digest}/{file}", content)
        store._registry.publish(tenant, name, manifest)
    return store


def refuse(*arguments: object, **options: object) -> Any:
    raise SourceUnavailable("the bucket does not answer")


class Acme(Everybody):
    """Everybody is the tenant acme, who has namespaces of its own to look into first."""

    def identify(self, authorization: str | None, api_key: str | None = None) -> Tenant:
        return Tenant("acme", Limits())


def test_during_an_outage_local_adapters_keep_serving_and_others_are_503(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_with(tmp_path, "public/here", "acme/mine", "acme/away")
    engine = FakeEngine(lambda request: [*encode("ok"), 256])

    async def post(server: Server, model: str) -> tuple[int, dict[str, str]]:
        answer = await server.post(COMPLETIONS, model=model, prompt="x")
        return answer.status, answer.headers

    async def run() -> None:
        how = {"tenants": Acme(), "base_fingerprint": BASE}
        async with serving(engine, store, **how) as server:  # type: ignore[arg-type]
            for model in ("here", "mine"):
                assert (await post(server, model))[0] == 200
            with monkeypatch.context() as outage:
                for name in OPERATIONS:
                    outage.setattr(store._objects, name, refuse)
                    outage.setattr(store._log_reader, name, refuse)
                for model in ("base", "here", "mine", "mine@1", "public/here", "base:here"):
                    assert (await post(server, model))[0] == 200, model
                for model in ("away", "acme/away@1", "never-heard-of"):
                    status, headers = await post(server, model)
                    assert status == 503 and int(headers["retry-after"]) >= 1, model
                assert (await post(server, "umbrella/x"))[0] == 404, "nobody has to look"
                listed = (await server.call("GET", "/v1/models")).json["data"]
                assert [m["id"] for m in listed] == ["base", "away", "mine", "here"]
                assert (await server.call("GET", "/health")).status == 200
            assert (await post(server, "away"))[0] == 200
            assert (await post(server, "never-heard-of"))[0] == 404

    asyncio.run(run())
