"""How close the simulator comes to the engine: the same requests, run by both.

    python -m tests.bench.simulator_bench small --seconds 20

Profiles this machine, draws requests at a part of what the profile can do, and lets the loop of a
real engine answer them as they come, and a simulated replica in virtual time. Both get the same.
The engine answers twice, other prompts of the same lengths, so that a slower hour is seen.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import msgspec

from deployments.simulator import simulate
from deployments.simulator.config import FleetSection, Objective, Simulation
from deployments.simulator.profile import LoadTimes, Profile
from deployments.simulator.records import Record
from deployments.simulator.replica import ReplicaSize
from deployments.simulator.scaling import Scaling
from deployments.simulator.simulate import percentile
from deployments.simulator.workload import (
    Arrival,
    Lengths,
    Popularity,
    Process,
    Workload,
    make_arrivals,
)
from engine.config import EngineConfig
from engine.messages import AdapterFolder, GenerateRequest
from engine.profiling.adapters import write_adapter
from engine.profiling.measure import RANKS, measure
from engine.profiling.turns import Turns
from engine.scheduler.request import SamplingParams
from reef.profiling import fit, size_of
from tests.bench.environment import NoiseMeter, append_row, header
from tests.bench.models import SHAPES, make_model


@dataclass(slots=True)
class Answer:
    arrived_s: float
    times_s: list[float] = field(default_factory=list[float])  # of each token


def figures(answers: Sequence[Answer]) -> dict[str, float]:
    """Return milliseconds and tokens/s of all answers."""
    ttft = sorted(a.times_s[0] - a.arrived_s for a in answers)
    long = [a for a in answers if len(a.times_s) > 1]
    tpot = sorted((a.times_s[-1] - a.times_s[0]) / (len(a.times_s) - 1) for a in long)
    last_s = max(a.times_s[-1] for a in answers)
    return {
        "TTFT p50 ms": 1e3 * percentile(ttft, 0.5),
        "TTFT p99 ms": 1e3 * percentile(ttft, 0.99),
        "TPOT p50 ms": 1e3 * percentile(tpot, 0.5),
        "TPOT p99 ms": 1e3 * percentile(tpot, 0.99),
        "tokens/s": sum(len(a.times_s) for a in answers) / last_s,
    }


def run_engine(
    turns: Turns, arrivals: Sequence[Arrival], adapters: Sequence[AdapterFolder], seed: int
) -> dict[str, float]:
    """Answer requests as they come; time stands still while the clients' part is done."""
    rng, vocab_size = Random(seed), turns.engine.settled.spec.vocab_size
    requests = [_request(a, rng, vocab_size, adapters) for a in arrivals]
    waiting, answers = list(zip(arrivals, requests, strict=True))[::-1], dict[str, Answer]()
    num_open, now_s = 0, 0.0
    while waiting or num_open:
        if not num_open and (gap_s := waiting[-1][0].time_s - now_s) > 0:
            time.sleep(gap_s)
            now_s += gap_s
        while waiting and waiting[-1][0].time_s <= now_s:
            arrival, request = waiting.pop()
            answers[request.request_id] = Answer(arrival.time_s)
            turns.add(request)
            num_open += 1
        news, took_s = turns.turn()
        now_s += took_s
        for request_id, num_tokens, has_ended in news:
            answers[request_id].times_s += [now_s] * num_tokens
            num_open -= has_ended
    return figures(list(answers.values()))


def warm_up(turns: Turns, adapters: Sequence[AdapterFolder]) -> None:
    """Have all adapters on the device."""
    for adapter in adapters:
        sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        turns.add(GenerateRequest(adapter.digest, [1, 2, 3], sampling, adapter_folder=adapter))
    num_open = len(adapters)
    while num_open:
        news, _ = turns.turn()
        num_open -= sum(has_ended for _, _, has_ended in news)


def _request(
    arrival: Arrival, rng: Random, vocab_size: int, adapters: Sequence[AdapterFolder]
) -> GenerateRequest:
    prompt = [rng.randrange(vocab_size) for _ in range(arrival.num_prompt_tokens)]
    sampling = SamplingParams(
        max_tokens=arrival.num_output_tokens, temperature=0.0, ignore_eos=True
    )
    adapter = adapters[arrival.adapter] if arrival.adapter >= 0 else None
    return GenerateRequest(str(arrival.number), prompt, sampling, adapter_folder=adapter)


def run_simulator(simulation: Simulation, arrivals: Sequence[Arrival]) -> dict[str, float]:
    """Answer them in virtual time; only first and last tokens are known."""
    answers: list[Answer] = []

    def take(record: Record) -> None:
        assert record.first_token_s is not None and record.is_finished
        inner = [record.first_token_s] * (record.num_tokens - 1)
        answers.append(Answer(record.arrival.time_s, [*inner, record.last_token_s]))

    simulate.run(simulation, arrivals=iter(arrivals), on_record=take)
    return figures(answers)


def without_loads(profile: Profile) -> Profile:
    """Return the same with adapters that have been read."""
    return msgspec.structs.replace(profile, load=LoadTimes(0.0, 0.0, 0.0, 0.0))


def as_simulation(
    profile: Profile, size: ReplicaSize, sizes: Sequence[int], duration_s: float
) -> Simulation:
    return Simulation(
        duration_s=duration_s,
        fleet=FleetSection(size=size, scaling=Scaling(), adapter_bytes=tuple(sizes)),
        profile=profile,
        objective=Objective(1e6, 1e6),
    )


def capacity(simulation: Simulation, workload: Workload) -> float:
    """Return the requests per second of a replica that always has enough of them."""
    many = msgspec.structs.replace(workload, arrivals=Process(rate=400.0))
    crowd = [
        msgspec.structs.replace(arrival, time_s=0.0) for arrival in make_arrivals(many, 9, 1.0)
    ]
    tokens = sum(arrival.num_output_tokens for arrival in crowd)
    return len(crowd) * run_simulator(simulation, crowd)["tokens/s"] / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of the two runs")
    parser.add_argument("--profile-seconds", type=float, default=40.0)
    parser.add_argument("--load", type=float, default=0.6, help="of what the profile can do")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--base-share", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path)
    args = parser.parse_args()
    config = EngineConfig(
        str(make_model(SHAPES[args.shape])),
        max_num_seqs=32,
        max_model_len=1024,
        memory_bytes=2**28,
        adapter_proof="off",
    )
    workload = Workload(
        popularity=Popularity(adapters=args.adapters, base_share=args.base_share),
        prompt=Lengths(median=100.0, sigma=0.5, most=400),
        output=Lengths(median=40.0, sigma=0.5, most=200),
    )
    with tempfile.TemporaryDirectory() as folder:
        row = run(config, workload, Path(folder), args)
    append_row(args.rows, row)


def run(config: EngineConfig, workload: Workload, folder: Path, args: argparse.Namespace) -> str:
    measured = measure(config, folder, seconds=args.profile_seconds, seed=args.seed)
    profile, fitted = fit(measured, [])
    turns = Turns(config)
    adapters = [
        write_adapter(folder / f"bench{i}", turns.engine.model.lora_sites, RANKS[i % len(RANKS)], i)
        for i in range(args.adapters)
    ]
    sizes = [turns.engine.loader.load(adapter).nbytes for adapter in adapters]
    simulation = as_simulation(
        without_loads(profile), size_of(measured.engine), sizes, args.seconds
    )
    rate = args.load * capacity(simulation, workload)
    workload = msgspec.structs.replace(workload, arrivals=Process(rate=rate))
    arrivals = list(make_arrivals(workload, args.seed, args.seconds))
    noise = NoiseMeter([os.getpid()])
    warm_up(turns, adapters)
    runs = [run_engine(turns, arrivals, adapters, seed) for seed in (1, 2)]
    noise_text = str(noise.read())
    turns.close()
    simulated = run_simulator(simulation, arrivals)
    parts = [
        f"{name} real {' and '.join(f'{r[name]:.2f}' for r in runs)}, simulated {value:.2f}, "
        f"ratio {value / (sum(r[name] for r in runs) / len(runs)):.3f}"
        for name, value in simulated.items()
    ]
    return " | ".join(
        [
            header(args.seed),
            "simulator",
            args.shape,
            f"{len(arrivals)} requests, {rate:.1f} a second, {args.load:.2f} of capacity",
            f"{len(measured.steps)} steps fitted, median error {fitted.median_error:.3f}, "
            f"p90 {fitted.p90_error:.3f}, bias {fitted.bias:+.3f}",
            *parts,
            noise_text,
        ]
    )


if __name__ == "__main__":
    main()
