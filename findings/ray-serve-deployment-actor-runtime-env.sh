#!/usr/bin/env bash
# A Serve deployment's actor always has a runtime environment; the deployment's replicas have none.
#
# Versions:  ray 2.60.0 (extra: serve), Python 3.11
# Expected:  an actor of `deployment_actors` for which nobody asked for a runtime environment has
#            none, as the replicas beside it.
# Seen:      Serve tells it where it belongs by four environment variables, so it is started with
#            `runtime_env={"env_vars": ...}`. (2026-12-01)
# Matters:   it cannot start in one of the workers that Ray keeps ready, and it needs the node's
#            runtime environment agent: where that does not run, the raylet ends itself after 30 s,
#            and the whole node with it. An ordinary named actor with `get_if_exists` needs neither.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'ray[serve]==2.60.0'
cat >"$folder/actor.py" <<'PYTHON'
import sys

import ray
from ray import serve
from ray.serve.config import DeploymentActorConfig


def names():
    return sorted(ray.get_runtime_context().runtime_env.get("env_vars", {}))


@ray.remote
class Counter:
    def names(self):
        return names()


@serve.deployment(
    deployment_actors=[
        DeploymentActorConfig(name="counter", actor_class=Counter, actor_options={"num_cpus": 0})
    ]
)
class Replica:
    async def __call__(self):
        actor = serve.get_deployment_actor("counter")
        return names(), await actor.names.remote()


ray.init(
    address="local", num_cpus=2, include_dashboard=False, object_store_memory=10**8,
    _temp_dir=sys.argv[1], _node_ip_address="127.0.0.1", log_to_driver=False,
    logging_level="error",
)
serve.start(proxy_location="Disabled")
handle = serve.run(Replica.bind(), route_prefix=None)
replica, actor = handle.remote().result()
print("variables of a replica:", len(replica), "of the deployment's actor:", len(actor))
serve.shutdown()
ray.shutdown()
PYTHON
said=$("$folder/venv/bin/python" "$folder/actor.py" "$folder/ray" 2>/dev/null | grep '^variables')
echo "$said"
if [ "$said" != "variables of a replica: 0 of the deployment's actor: 4" ]; then
    echo "changed: this finding no longer holds" >&2
    exit 1
fi
