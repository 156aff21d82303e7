"""A Ray cluster that does as it is told: a script, run by `test_ray_fleet` as a process of its own.

    python -m tests.deployments.support.ray_driver PORT

Each line on standard input is one order, and each line on standard output its answer, all JSON:
the `args` of an application to deploy, a whole config file as `serve deploy` sends it, "figures"
for what each engine replica says of itself, "running" or "target" for how many of them there are or
should be, or "delete". It ends, with all below it, when its input does.
"""

import json
import sys
import tempfile
from pathlib import Path


def main() -> None:
    # Ray's and HAProxy's sockets must have short paths.
    with tempfile.TemporaryDirectory(prefix="reef-", ignore_cleanup_errors=True) as folder:
        run(Path(folder), int(sys.argv[1]))


def run(folder: Path, port: int) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # Ray prints now and then
    from deployments.local.ray_head import prepare_ray

    # Before Ray is imported, here and in all its processes.
    prepare_ray(folder)
    import ray
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    from deployments.app import build_app

    ray.init(
        address="local",
        num_cpus=8,  # as many replicas as a test likes; what they share is another matter
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        _temp_dir=str(folder / "ray"),
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        logging_level="warning",
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=None)
        engines = None
        for line in sys.stdin:
            order = json.loads(line)
            if order == "figures":
                if engines is None:
                    engines = serve.get_deployment_handle("Engine", "reef")
                    engines._init(_run_router_in_separate_loop=True)  # here is no event loop
                answer = engines.broadcast("record_routing_stats").results(timeout_s=10)
            elif order == "running":
                states = serve.status().applications["reef"].deployments["Engine"].replica_states
                answer = states.get("RUNNING", 0)
            elif order == "target":
                details = serve.context._get_global_client().get_serve_details()
                engine = details["applications"]["reef"]["deployments"]["Engine"]
                answer = engine["target_num_replicas"]
            elif order == "delete":
                serve.delete("reef")
                answer = "deleted"
            elif "applications" in order:
                client = serve.context._get_global_client()
                client.deploy_apps(ServeDeploySchema.model_validate(order), _blocking=True)
                answer = "deployed"
            else:
                serve.run(build_app(order), name="reef")
                answer = "deployed"
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
