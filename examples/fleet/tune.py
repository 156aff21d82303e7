"""From the server's usage records to a config whose autoscaling is tuned to them.

    python examples/fleet/tune.py usage/ configs/replicas-cpu.yaml profile.yaml tuned.yaml

`usage/` holds what a server with `usage.path` has written (docs/usage.md): its folder, a log in it,
or an object of the store. `profile.yaml` is what `reef profile` has measured on the machines that
will serve. The search finds the policy that needs the fewest GPU-hours for this traffic at the
objective, and writes the config with it.
"""

import argparse
import tempfile
from pathlib import Path

import yaml

from deployments.simulator.config import Simulation, read_simulation
from deployments.simulator.pool import Pool
from deployments.simulator.space import REEF
from deployments.simulator.tuning import report, search
from deployments.simulator.usage_trace import usage_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("usage", "config", "profile", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--max", type=int, default=8, help="replicas at most")
    parser.add_argument("--ttft", type=float, default=2.0, help="seconds to the first token")
    parser.add_argument("--tpot", type=float, default=0.2, help="seconds for each further one")
    parser.add_argument("--attained", type=float, default=0.99, help="part of all requests")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--processes", type=int, help="as many as processors")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    model = config["applications"][0]["args"]["models"][0]
    with tempfile.TemporaryDirectory() as folder:
        simulation = write_simulation(Path(folder), options)
        with Pool(options.processes) as pool:
            found = search(simulation, REEF, trials=options.trials, seeds=[0], pool=pool)
    print("\n".join(report(simulation, [found])))
    replicas = model.setdefault("replicas", {})
    replicas |= {"min": 1, "max": options.max, "autoscaling": REEF.block(found.winner)}
    options.out.write_text(yaml.safe_dump(config, sort_keys=False))


def write_simulation(folder: Path, options: argparse.Namespace) -> Simulation:
    """Write the file that simulates the traffic; read it as `reef simulate` does."""
    records = usage_records(options.usage)
    silent = sum(record.output_tokens == 0 for record in records)
    if silent == len(records):
        raise SystemExit(f"{options.usage}: {silent} requests, none of which was answered")
    print(f"{len(records)} requests, of which {silent} got no token and are left out")
    document = yaml.safe_load(options.profile.read_text())
    document["duration_s"] = records[-1].time_s - records[0].time_s + 1.0
    trace = {"file": str(options.usage.absolute()), "format": "usage", "failed": "skip"}
    document["workload"] = {"trace": trace}
    document["fleet"]["scaling"] = {"min": 1, "max": options.max}
    document["objective"] = {
        "ttft_s": options.ttft,
        "tpot_s": options.tpot,
        "attained": options.attained,
    }
    file = folder / "simulation.yaml"
    file.write_text(yaml.safe_dump(document))
    return read_simulation(file)


if __name__ == "__main__":
    main()
