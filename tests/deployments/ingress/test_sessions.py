"""Sessions: which requests are told to belong together."""

import asyncio
import json

from deployments.fleet.protocol import Submit
from deployments.ingress.sessions import MAX_CHARS
from tests.deployments.support.fakes import Client, Server, in_server


def test_requests_of_a_header_or_a_key_are_of_one_session() -> None:
    async def test(server: Server) -> None:
        opened: list[Submit] = []
        open_queue = server.link.open
        server.link.open = lambda submits: opened.extend(submits) or open_queue(submits)  # type: ignore[method-assign]

        async def session(headers: dict[str, str], **body: object) -> str:
            document = {"model": "base", "prompt": "a", "max_tokens": 1, **body}
            raw = json.dumps(document).encode()
            named = [(name.encode(), value.encode()) for name, value in headers.items()]
            client = Client(server.api, "POST", "/v1/completions", raw, headers=named)
            await asyncio.wait_for(client.done, 10)
            assert client.answered.status == 200
            return opened[-1].session

        assert await session({}) == ""
        assert await session({"x-session-id": "s"}) == "s"
        assert await session({"x-reef-session-id": "s", "x-session-id": "t"}) == "s"
        assert await session({"x-session-id": "s"}, prompt_cache_key="k") == "k"
        assert await session({"x-session-id": "s" * 1000}) == "s" * MAX_CHARS

    in_server(test)
