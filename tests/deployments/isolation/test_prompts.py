"""What one tenant's prompts leave in the prefix cache is found by no other tenant."""

from pathlib import Path
from typing import Any

import pytest

from deployments.policy.admission import Limits
from deployments.tenants.tenants import Keyring
from tests.deployments.support.fakes import Server, in_server
from tests.deployments.support.keys import ACME, UMBRELLA, keys_file
from tests.deployments.support.real_engine import FolderStore, RealEngine
from tests.deployments.support.tiny_models import make_adapter, make_base

PROMPT = list(range(1, 49))
# The salts keep umbrella's own requests apart.
SAID: list[dict[str, Any]] = [
    {},
    {"cache_salt": "acme"},
    {"cache_salt": "1", "user": "acme"},
    {"cache_salt": "2", "prompt_cache_key": "acme"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_base(folder / "base", 128)
    make_adapter(folder / "red", folder / "base", 4, 1)
    return folder


def test_a_tenants_prompts_are_cached_for_itself_alone(folders: Path, tmp_path: Path) -> None:
    async def cached(server: Server, key: str, **fields: Any) -> int:
        body = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, **fields}
        answer = await server.post("/v1/completions", key, **body)
        assert answer.status == 200, answer.body
        return int(answer.json["usage"]["prompt_tokens_details"]["cached_tokens"])

    async def test(server: Server) -> None:
        for model in ("base", "red"):
            await cached(server, ACME, model=model, prompt=[7])  # an adapter is proven first
            assert await cached(server, ACME, model=model) == 0
            assert await cached(server, ACME, model=model) > 0, "the cache works"
            # The same prompt, and with whatever a client may say to be taken for another.
            for fields in SAID:
                assert await cached(server, UMBRELLA, model=model, **fields) == 0, fields
            assert await cached(server, ACME, model=model, cache_salt="other") == 0

    store, engine = FolderStore(red=folders / "red"), RealEngine(folders / "base")
    in_server(test, engine=engine, store=store, tenants=Keyring(keys_file(tmp_path), Limits()))
