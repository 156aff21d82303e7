"""An ingress with the admin API, listening on loopback, and a client of it."""

import asyncio
import json
import shutil
import subprocess
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import aiohttp
import yaml

from adapter_store.layout import WEIGHTS_NAME
from adapter_store.peft_config import CONFIG_NAME
from adapter_store.store import AdapterStore
from deployments.config_sections import AdminSection
from deployments.ingress.admin import Admin
from deployments.ingress.flips import Flips
from deployments.ingress.rollouts import Rollouts
from deployments.ingress.trials import Trials
from deployments.policy.admission import Limits
from deployments.tenants.tenants import Keyring
from tests.adapter_store.adapters import write_base, write_peft
from tests.deployments.support.fakes import HANG_S, FakeEngine, FakeStore, Server, serving
from tests.deployments.support.keys import ACME, PROMETHEUS, UMBRELLA, digest
from tests.deployments.support.loopback import listening

ADAPTERS = "/admin/v1/adapters"
PUBLISH, ADMIN = "reef-" + "p" * 40, "reef-" + "d" * 40
TAR = "application/x-tar"

Body = Mapping[str, bytes] | bytes


def made_place(folder: Path) -> Path:
    """Make a base and two adapters of it, once for many tests."""
    base = write_base(folder / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        write_peft(folder / "peft", base, 1)
    shutil.copytree(folder / "peft", folder / "other")
    config = json.loads((folder / "other" / CONFIG_NAME).read_text())
    (folder / "other" / CONFIG_NAME).write_text(json.dumps(config | {"lora_alpha": 3}))
    for name in ("peft", "other"):
        (folder / name / "README.md").unlink(missing_ok=True)
    return folder


class Place:
    """A store that knows the base, and what is to be uploaded."""

    def __init__(self, made: Path, folder: Path) -> None:
        self.folder = folder
        self.peft, self.other = made / "peft", made / "other"
        self.file_names = ["-C", str(self.peft), CONFIG_NAME, WEIGHTS_NAME]
        self.base = self.open().register_base(made / "base")

    @property
    def store_folder(self) -> Path:
        return self.folder / "store"

    @property
    def scratch(self) -> Path:
        return self.folder / "disk" / ".uploads"

    def open(self) -> AdapterStore:
        return AdapterStore(f"file://{self.store_folder}", self.folder / "disk", 2**30)

    def tar(self, options: Sequence[str]) -> bytes:
        return subprocess.run(["tar", "-c", *options], capture_output=True, check=True).stdout

    def left_behind(self) -> list[str]:
        """What uploads have left on disk and in the store beside what live versions need."""
        local = [str(path) for path in self.scratch.glob("*")]
        drafts = [str(path) for path in (self.store_folder / ".drafts").glob("*")]
        needed = {record.digest for record in self.open().list()}
        blobs = (path.name for path in (self.store_folder / "blobs").glob("*"))
        return local + drafts + [name for name in blobs if name not in needed]

    def secrets(self) -> list[str]:
        keys = [ACME, UMBRELLA, PUBLISH, ADMIN]
        return [*keys, *map(digest, keys), *(digest(key)[:8] for key in keys)]

    def keyring(self, limits: Mapping[str, Any]) -> Keyring:
        path = self.folder / "keys.yaml"
        acme = {"keys": [digest(ACME)], "publish_keys": {"ci": digest(PUBLISH)}, **limits}
        document = {
            "tenants": {"acme": acme, "umbrella": {"keys": [digest(UMBRELLA)]}},
            "metrics_keys": [digest(PROMETHEUS)],
            "admin_keys": {"ann": digest(ADMIN)},
        }
        path.write_text(yaml.safe_dump(document))
        return Keyring(path, Limits())


def form(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@dataclass
class Answer:
    status: int
    text: str

    @property
    def json(self) -> Any:
        assert self.status == 200, self.text
        return json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.text)["error"]


@dataclass
class Api:
    """A client of one ingress."""

    session: aiohttp.ClientSession
    server: Server
    url: str
    admin: Admin | None

    async def call(
        self, method: str, path: str, body: object = None, key: str | None = PUBLISH, **more: Any
    ) -> Answer:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        headers |= more.pop("headers", {})
        sent = more if more else {"json": body}
        url = self.url + path
        async with self.session.request(method, url, headers=headers, **sent) as answer:
            return Answer(answer.status, await answer.text())

    async def get(self, path: str, key: str | None = PUBLISH) -> Answer:
        return await self.call("GET", path, key=key)

    async def post(self, path: str, body: object, key: str | None = PUBLISH) -> Answer:
        return await self.call("POST", path, body, key)

    async def publish(
        self,
        tenant: str,
        name: str,
        body: Body,
        key: str = PUBLISH,
        query: str = "",
        content_type: str = TAR,
    ) -> Answer:
        """Upload files by their names, or bytes of a type."""
        path = f"{ADAPTERS}/{tenant}/{name}{query}"
        if isinstance(body, bytes):
            headers = {"content-type": content_type}
            return await self.call("POST", path, None, key, data=body, headers=headers)
        fields = aiohttp.FormData()
        for file_name, content in body.items():
            fields.add_field("file", content, filename=file_name)
        return await self.call("POST", path, None, key, data=fields)

    async def said(self, model: str, key: str = ACME) -> str:
        answer = await self.call("POST", "/v1/completions", {"model": model, "prompt": "x"}, key)
        return answer.json["choices"][0]["text"] if answer.status == 200 else str(answer.status)

    async def listed(self, query: str, key: str) -> list[str]:
        """All pages of a list, as names of versions."""
        found, after = list[str](), ""
        while True:
            page = (await self.get(f"{ADAPTERS}?{query}{after}", key)).json
            found += [f"{a['tenant']}/{a['name']}@{a['version']}" for a in page["adapters"]]
            if page["next_after"] is None:
                return found
            after = f"after={page['next_after']}"


@asynccontextmanager
async def administered(
    place: Place,
    *,
    is_on: bool = True,
    limits: Mapping[str, Any] | None = None,
    period_s: float = 0.05,
    wait_s: float = 30.0,
    writer: str = "ingress",
    engine: FakeEngine | None = None,
    publish_from: list[str] | None = None,
    endpoint_url: str | None = None,
) -> AsyncIterator[Api]:
    """One ingress with a store object of its own, as each ingress replica has."""
    store, tenants = place.open(), place.keyring(limits or {})
    settings = AdminSection(enabled=True, publish_from=publish_from)
    admin = Admin(store, tenants, settings, place.scratch, endpoint_url) if is_on else None
    rollouts = Rollouts(store, Flips(store, wait_s), Trials(store, writer, period_s))
    how: dict[str, Any] = {"base_fingerprint": place.base, "admin": admin, "tenants": tenants}
    how |= {"rollouts": rollouts, "renew_s": 0.05, "engine": engine}
    try:
        async with (
            serving(store=cast(FakeStore, store), **how) as server,
            listening(server.api) as url,
            aiohttp.ClientSession() as session,
        ):
            yield Api(session, server, url, admin)
    finally:
        await rollouts.close()
        if admin is not None:
            admin.close()


def in_admin(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(HANG_S):
            await test()

    asyncio.run(run())
