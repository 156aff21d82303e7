"""From a log of answers to a config whose autoscaling is tuned to them.

    python examples/fleet/tune.py answers.jsonl configs/replicas-cpu.yaml profile.yaml tuned.yaml

`answers.jsonl` has a line for each answer, as the API returned it; read are `model`, `usage` and
`created`, a whole second in which its requests are spread evenly. `profile.yaml` is what
`reef profile` has measured on the machines that will serve. The search finds the policy that needs
the fewest GPU-hours for this traffic at the objective, and writes the config with it.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from deployments.simulator.config import Simulation, read_simulation
from deployments.simulator.pool import Pool
from deployments.simulator.space import REEF
from deployments.simulator.tuning import report, search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("answers", "config", "profile", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--max", type=int, default=8, help="replicas at most")
    parser.add_argument("--ttft", type=float, default=2.0, help="seconds to the first token")
    parser.add_argument("--tpot", type=float, default=0.2, help="seconds for each further one")
    parser.add_argument("--attained", type=float, default=0.99, help="part of all requests")
    parser.add_argument("--trials", type=int, default=100)
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    model = config["applications"][0]["args"]["models"][0]
    with tempfile.TemporaryDirectory() as folder:
        simulation = write_simulation(Path(folder), model["id"], options)
        with Pool() as pool:
            found = search(simulation, REEF, trials=options.trials, seeds=[0], pool=pool)
    print("\n".join(report(simulation, [found])))
    replicas = model.setdefault("replicas", {})
    replicas |= {"min": 1, "max": options.max, "autoscaling": REEF.block(found.winner)}
    options.out.write_text(yaml.safe_dump(config, sort_keys=False))


def write_simulation(folder: Path, base: str, options: argparse.Namespace) -> Simulation:
    """Write the trace, and the file that simulates it; read it as `reef simulate` does."""
    answers = [json.loads(line) for line in options.answers.read_text().splitlines()]
    rows = list(as_rows(sorted(answers, key=lambda answer: answer["created"]), base))
    trace = folder / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = yaml.safe_load(options.profile.read_text())
    document["duration_s"] = rows[-1]["time_s"] - rows[0]["time_s"] + 1.0
    document["workload"] = {"trace": {"file": trace.name, "format": "reef"}}
    document["fleet"]["scaling"] = {"min": 1, "max": options.max}
    document["objective"] = {
        "ttft_s": options.ttft,
        "tpot_s": options.tpot,
        "attained": options.attained,
    }
    file = folder / "simulation.yaml"
    file.write_text(yaml.safe_dump(document))
    return read_simulation(file)


def as_rows(answers: list[dict[str, Any]], base: str) -> Iterator[dict[str, Any]]:
    """Yield rows of a trace."""
    for second, group in groupby(answers, key=lambda answer: answer["created"]):
        of_second = list(group)
        for i, answer in enumerate(of_second):
            yield {
                "time_s": second + i / len(of_second),
                "prompt_tokens": answer["usage"]["prompt_tokens"],
                "output_tokens": answer["usage"]["completion_tokens"],
                "adapter": None if answer["model"] == base else answer["model"],
            }


if __name__ == "__main__":
    main()
