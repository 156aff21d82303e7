"""The ledger as an actor on a real Ray cluster: shared, killed, and there again."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]

IN_A_CLUSTER = """
import asyncio, sys, time
import ray
from ray import serve
from deployments.fleet.ledger_actor import ledger_call, ledger_name
from deployments.fleet.ledger_link import SharedLedger
from deployments.ingress.http_errors import ApiError
from deployments.ingress.metrics import Metrics
from deployments.ingress.tenant_limiter import TenantLimiter
from deployments.policy.admission import Limits

LIMITS = Limits(requests_per_minute=60, request_burst=40, tokens_per_day=1000)


ROOT = f"file://{sys.argv[1]}/store"


@serve.deployment(num_replicas=2)
class Asker:
    def __init__(self, root):
        self.root = root
        name = serve.get_replica_context().replica_id.unique_id
        self.link = SharedLedger(ledger_call(root, None, True), name, 2)
        self.limiter = TenantLimiter(Metrics(10), link=self.link)
        self.link.start()

    async def storm(self, num):
        admitted = 0
        for _ in range(num):
            place = self.limiter.place("a", LIMITS)
            try:
                await place.enter()
                await place.reserve(1, [], False)
                admitted += 1
            except ApiError:
                pass
            place.leave()
        return admitted, self.link.leases.is_alone

    async def heal(self):
        for _ in range(400):
            await self.storm(1)
            if not self.link.leases.is_alone:
                return True
            await asyncio.sleep(0.1)
        return False

    async def kill(self):
        ray.kill(ray.get_actor(ledger_name(self.root, None, True)))


async def test(handle):
    while any(alone for _, alone in await many(handle.storm, 0)) or not await handle.heal.remote():
        await asyncio.sleep(0.1)
    await asyncio.sleep(2.5)
    one = await many(handle.storm, 60)
    print("admitted", sum(n for n, _ in one))
    await handle.kill.remote()
    two = await many(handle.storm, 60)
    print("after", sum(n for n, _ in two))
    print("healed", all(await asyncio.gather(*(handle.heal.remote() for _ in range(4)))))


async def many(method, num):
    return await asyncio.gather(*(method.remote(num) for _ in range(4)))


ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=10**8,
         _temp_dir=sys.argv[1] + "/ray", _node_ip_address="127.0.0.1", log_to_driver=False,
         logging_level="warning")
serve.start(proxy_location="Disabled", logging_config=None)
handle = serve.run(Asker.bind(ROOT), route_prefix=None, logging_config=None)
asyncio.run(test(handle))
serve.shutdown()
ray.shutdown()
"""


def test_replicas_share_a_ledger_that_may_be_killed() -> None:
    with tempfile.TemporaryDirectory(prefix="r") as folder:
        (Path(folder) / "store").mkdir()
        command = [sys.executable, "-c", IN_A_CLUSTER, folder]
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
        )
    assert result.returncode == 0, result.stderr
    told = dict(line.split() for line in result.stdout.splitlines() if line.count(" ") == 1)
    # Time goes on: some are refilled, and in between each ingress may have used its share.
    assert 20 <= int(told["admitted"]) <= 60, result.stdout
    assert int(told["after"]) <= 2 * 20 + 60, result.stdout
    assert told["healed"] == "True", result.stdout
