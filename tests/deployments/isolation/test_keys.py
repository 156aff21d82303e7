"""Headers and keys of any content: a 401 that repeats nothing, or the tenant's answer."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.policy.admission import Limits
from deployments.tenants.tenants import Keyring
from tests.deployments.support.fakes import Client, Server, in_server
from tests.deployments.support.keys import ACME, UMBRELLA, bearer, keys_file

NAMES = (b"x-request-id", b"x-session-id", b"x-reef-session-id", b"x-request-timeout", b"x-made-up")
values = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=20).map(str.encode),
    st.sampled_from([b"", b"-1", b"1e400", b"nan", b"9" * 400, b"../../etc", b"\r\nx: y", b"\0"]),
)
keys = st.one_of(
    values,
    st.sampled_from([ACME, ACME[:-1], ACME + " ", ACME.upper(), f"{ACME},{UMBRELLA}"]).map(
        lambda key: f"Bearer {key}".encode()
    ),
    values.map(lambda value: b"Bearer " + value),
)


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    return Keyring(keys_file(tmp_path_factory.mktemp("keys")), Limits())


async def status(
    server: Server, path: str, headers: list[tuple[bytes, bytes]]
) -> tuple[int, bytes]:
    body = b'{"model": "base", "prompt": "x", "max_tokens": 1}'
    client = Client(server.api, "POST", path, body, None, headers)
    await client.done
    return client.answered.status, client.answered.body


@settings(max_examples=4)
@given(some=st.lists(st.tuples(keys, st.none() | values), min_size=10, max_size=30))
def test_only_a_whole_key_opens_anything(ring: Keyring, some: list[Any]) -> None:
    async def test(server: Server) -> None:
        wrong = await status(server, "/v1/completions", [(b"authorization", b"Bearer none")])
        for authorization, api_key in some:
            headers = [(b"authorization", authorization)]
            headers += [] if api_key is None else [(b"x-api-key", api_key)]
            code, body = await status(server, "/v1/completions", headers)
            is_right = authorization.strip() == bearer(ACME).encode()
            assert code == (200 if is_right else 401), authorization
            assert is_right or ACME.encode() not in body
        assert wrong[0] == 401

    in_server(test, tenants=ring)


@settings(max_examples=4)
@given(some=st.lists(st.tuples(st.sampled_from(NAMES), values), min_size=10, max_size=30))
def test_no_header_is_a_fault_or_makes_another_tenant(ring: Keyring, some: list[Any]) -> None:
    async def test(server: Server) -> None:
        for header in some:
            headers = [(b"authorization", bearer(ACME).encode()), header]
            code, body = await status(server, "/v1/completions", headers)
            assert code in (200, 400, 429), (header, body)
        assert {request.tenant for request in server.engine.requests} <= {"acme"}

    in_server(test, tenants=ring)


def test_two_keys_are_neither(ring: Keyring, tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        for first, second in ((ACME, UMBRELLA), (UMBRELLA, ACME)):
            headers = [(b"authorization", bearer(first).encode()), (b"x-api-key", second.encode())]
            assert (await status(server, "/v1/messages", headers))[0] == 401

    in_server(test, tenants=ring)
