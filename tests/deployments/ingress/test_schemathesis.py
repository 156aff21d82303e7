"""schemathesis over the API's document: it makes up requests, valid ones and others, and judges the
answers. It runs apart, as other people's clients do."""

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvicorn

from deployments.local.ray_head import free_port
from tests.deployments.support.fakes import EOS, INFO, FakeEngine, Server, serving, until

PROGRAM = Path(__file__).parents[3] / ".venv-schemathesis" / "bin" / "schemathesis"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@contextlib.asynccontextmanager
async def listening(server: Server) -> AsyncIterator[str]:
    """Serve on loopback, in the test's own loop."""
    port = free_port()
    config = uvicorn.Config(server.api, "127.0.0.1", port, log_level="error", lifespan="off")
    http = uvicorn.Server(config)
    task = asyncio.create_task(http.serve())
    await until(lambda: http.started)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        http.should_exit = True
        await task


def test_no_made_up_request_is_a_5xx_or_answered_otherwise_than_documented(tmp_path: Path) -> None:
    assert PROGRAM.exists(), "`make slow` makes its environment"

    async def test() -> None:
        # An engine that goes on behind the end, for those that ask it to.
        engine = FakeEngine(lambda request: [48, 49, *[EOS] * INFO.max_model_len])
        async with serving(engine) as server, listening(server) as url:
            command = [PROGRAM, "run", f"{url}/openapi.json", "--checks", ",".join(CHECKS)]
            options = ["--max-examples", "20", "--seed", "1", "--continue-on-failure"]
            with (tmp_path / "out").open("wb") as out:
                process = await asyncio.create_subprocess_exec(
                    *command, *options, "--mode", "all", cwd=tmp_path, stdout=out, stderr=out
                )
                code = await process.wait()
            assert code == 0, (tmp_path / "out").read_text()
            assert (await server.post("/v1/completions", prompt="x")).status == 200

    asyncio.run(test())


def test_the_version_that_is_meant_runs() -> None:
    wanted = (Path(__file__).parents[2] / "schemathesis" / "requirements.txt").read_text()
    found = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.split()[-1] in wanted
