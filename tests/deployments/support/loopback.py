"""Serve an API on loopback, from the test's own event loop, to clients in other processes."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn

from deployments.ingress.asgi import Api

ROOT = Path(__file__).parents[3]
CLIENTS = ROOT / ".venv-clients" / "bin" / "python"
CLIENT_S = 60.0


@asynccontextmanager
async def listening(api: Api) -> AsyncIterator[str]:
    """Yields the address."""
    config = uvicorn.Config(api, "127.0.0.1", 0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    [socket] = server.servers[0].sockets
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


async def run_client(script: str, *arguments: str) -> None:
    """Run a program of tests/clients, which must end with 0."""
    if not CLIENTS.exists():
        pytest.skip(f"{CLIENTS} is missing: `make test` makes it")
    process = await asyncio.create_subprocess_exec(
        CLIENTS,
        ROOT / "tests" / "clients" / script,
        *arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), CLIENT_S)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, output.decode()
