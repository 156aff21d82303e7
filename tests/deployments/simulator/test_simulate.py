"""A simulated fleet: the same for one seed, nothing lost, and as good as it should be."""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner

from deployments.simulator.clock import Clock
from deployments.simulator.config import InvalidSimulation, Simulation, as_simulation
from deployments.simulator.fleet import NOTICED_S, Fleet
from deployments.simulator.records import Record
from deployments.simulator.routers import ROUTERS
from deployments.simulator.simulate import Summary, run
from deployments.simulator.workload import (
    Arrival,
    Lengths,
    Popularity,
    Process,
    Workload,
    make_arrivals,
)
from engine.scheduler.fairness import bound
from reef.commands import reef

CONFIGS = Path(__file__).parents[3] / "configs"
ADAPTER_BYTES = 20 * 2**20


def fleet(duration_s: float = 8.0, **changes: Any) -> Simulation:
    document: dict[str, Any] = {
        "duration_s": duration_s,
        "workload": {
            "arrivals": {"rate": 20.0},
            "popularity": {"adapters": 200},
            "prompt": {"median": 60.0, "most": 200},
            "output": {"median": 20.0, "most": 60},
        },
        "fleet": {
            "scaling": {"min": 4, "max": 4},
            "size": {"max_adapters": 8, "host_bytes": 8 * ADAPTER_BYTES, "max_num_seqs": 16},
            "adapter_bytes": ADAPTER_BYTES,
        },
    }
    for path, value in changes.items():
        place = document
        *parents, last = path.split("__")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return as_simulation(document, "test")


def simulate(
    simulation: Simulation, seed: int = 0, *, runs_together: bool = True
) -> tuple[Summary, list[Record]]:
    records: list[Record] = []
    result = run(simulation, seed, on_record=records.append, runs_together=runs_together)
    return result.summary, records


@pytest.mark.parametrize("router", ROUTERS)
def test_every_request_gets_all_its_tokens_and_a_seed_gives_the_same(router: str) -> None:
    simulation = fleet(fleet__router=router)
    summary, records = simulate(simulation, seed=3)
    assert summary.finished == summary.requests == len(records) > 120
    assert all(r.num_tokens == r.arrival.num_output_tokens for r in records)
    assert simulate(simulation, seed=3)[0] == summary
    assert simulate(simulation, seed=4)[0] != summary


def test_replicas_that_die_lose_no_token() -> None:
    simulation = fleet(faults__kill_every_s=2.0, profile__cold_start=3.0, fleet__ingresses=2)
    summary, records = simulate(simulation, seed=1)
    assert summary.finished == summary.requests > 120
    assert all(r.num_tokens == r.arrival.num_output_tokens for r in records)
    calm, _ = simulate(fleet(), seed=1)
    assert summary.longest_gap_p99_s > calm.longest_gap_p99_s, "somebody noticed"


@pytest.mark.parametrize("memory_bytes", [2**26, 2**32], ids=["short of memory", "with room"])
def test_steps_taken_together_are_those_taken_one_by_one(memory_bytes: int) -> None:
    simulation = fleet(
        workload__popularity={"adapters": 30, "base_share": 0.3},
        workload__prompt={"median": 60.0, "most": 200},
        fleet__size__memory_bytes=memory_bytes,
        fleet__scaling={"min": 2, "max": 4, "autoscaling": {"busy": 0.5, "up_delay_s": 1.0}},
        fleet__ingresses=2,
        profile__cold_start=1.0,
        profile__step__disturbed={"share": 0.2, "seconds": [0.001, 0.02]},
        faults__kill_every_s=3.0,
    )
    together, records = simulate(simulation, seed=5)
    assert together.finished > 120 and together.steps > 400
    assert (together.preemptions > 0) == (memory_bytes == 2**26)
    assert (together, records) == simulate(simulation, seed=5, runs_together=False)


def test_what_is_taken_back_loses_no_token_and_costs_less_than_what_dies() -> None:
    calm = simulate(fleet(), seed=1)[0]
    keys = {"profile__cold_start": 1.0, "faults__reclaim_every_s": 2.0}
    noticed, records = simulate(fleet(**keys, faults__notice_s=4.0), seed=1)
    sudden, _ = simulate(fleet(**keys, faults__notice_s=0.0), seed=1)
    assert noticed.finished == noticed.requests == sudden.finished > 120
    assert all(r.num_tokens == r.arrival.num_output_tokens for r in records)
    assert noticed.longest_gap_p99_s < sudden.longest_gap_p99_s, "requests end before the replica"
    assert noticed.replica_hours > calm.replica_hours, "two at a time cost more"


def test_a_slow_store_is_felt_while_it_is_slow() -> None:
    slow = {"faults__slow_store_at_s": 2.0, "faults__slow_store_s": 3.0}
    calm, slowed = simulate(fleet())[0], simulate(fleet(**slow, faults__slow_store_factor=20.0))[0]
    assert slowed.ttft_p90_s > 2 * calm.ttft_p90_s
    never = simulate(fleet(faults__slow_store_at_s=100.0, faults__slow_store_s=3.0))[0]
    assert never == calm


def test_hours_cost_what_the_file_says() -> None:
    summary = simulate(fleet(fleet__gpus=2, fleet__price_per_hour=3.0))[0]
    assert summary.gpu_hours == pytest.approx(2 * summary.replica_hours)
    assert summary.cost == pytest.approx(3 * summary.replica_hours) and summary.cost > 0.02


def test_the_number_of_replicas_follows_the_load() -> None:
    busy = fleet(
        15.0,
        workload__arrivals__rate=60.0,
        fleet__scaling={"min": 1, "max": 6},
        profile__cold_start=2.0,
    )
    lazy = fleet(
        15.0,
        workload__arrivals__rate=2.0,
        fleet__scaling={"min": 1, "max": 6},
        profile__cold_start=2.0,
    )
    (many, _), (few, _) = simulate(busy), simulate(lazy)
    assert many.replica_hours > 2 * few.replica_hours
    assert many.finished == many.requests and few.finished == few.requests


def test_from_zero_requests_wait_for_a_start_and_all_are_answered() -> None:
    scaling = {"min": 0, "max": 2, "autoscaling": {"zero_delay_s": 1.0, "up_delay_s": 0.0}}
    simulation = fleet(
        30.0, workload__arrivals__rate=0.1, fleet__scaling=scaling, profile__cold_start=0.5
    )
    summary, records = simulate(simulation, seed=2)
    assert summary.finished == summary.requests > 0
    assert all(r.ttft_s is not None and r.ttft_s > 0.5 for r in records[:1]), "it found none"
    assert summary.replica_hours < 0.5 * 30 / 3600, "between requests there was none"


TENANTS: dict[str, Any] = {
    "workload__arrivals__rate": 60.0,
    "workload__popularity": {"adapters": 12, "tenants": 3, "tenant_shares": [0.6, 0.3, 0.1]},
    "fleet__scaling": {"min": 1, "max": 1},
    "fleet__size__max_num_seqs": 8,
}


def test_tenants_that_wait_are_given_as_much_within_the_bound() -> None:
    simulation = fleet(**TENANTS)
    summary, _ = simulate(simulation)
    assert 500 < summary.service_gap <= bound(200, 8 * (200 + 60))
    assert summary.ttft_p99_s > 2.0, "they had to wait"
    alone = fleet(**TENANTS | {"workload__popularity": {"adapters": 12}})
    assert simulate(alone)[0].service_gap == 0, "with nobody to be compared to"


def test_tenants_of_more_weight_wait_less_and_steps_together_are_those_one_by_one() -> None:
    simulation = fleet(**TENANTS, workload__weights={"tenant-0": 8.0})
    summary, records = simulate(simulation)
    equal, _ = simulate(fleet(**TENANTS))
    first = [r.ttft_s or 0.0 for r in records if r.arrival.tenant == "tenant-0"]
    assert max(first) < equal.ttft_p99_s / 1.5
    assert (summary, records) == simulate(simulation, runs_together=False)


def test_what_a_dead_replica_leaves_keeps_its_tenants_weight() -> None:
    simulation = fleet(
        workload__arrivals__rate=80.0,
        workload__popularity={"adapters": 4, "tenants": 2},
        workload__weights={"tenant-1": 4.0},
    )
    clock = Clock()
    made = Fleet(simulation, clock, 0, lambda _: None)
    for arrival in arrivals(simulation.workload, 1.0):
        clock.at(arrival.time_s, partial(made.arrive, arrival))
    clock.at(1.0, partial(made.kill_one, Random(0)))
    clock.run(lambda: clock.now_s > 1.0 + NOTICED_S)
    schedulers = [replica.scheduler for replica in made.replicas.values()]
    requests = [r for s in schedulers for r in (*s.running, *s.waiting)]
    resumed = [r.scope.tenant for r in requests if r.num_resumed_tokens]
    assert len(set(resumed)) == 2, "of both tenants"
    assert all(r.weight == (4.0 if r.scope.tenant == "tenant-1" else 1.0) for r in requests)


def test_affinity_saves_loads_within_the_bound() -> None:
    changes = {
        "workload__arrivals__rate": 60.0,
        "workload__popularity__adapters": 40,
        "warm_up_s": 4.0,
    }
    ours, _ = simulate(fleet(12.0, **changes))
    blind, _ = simulate(fleet(12.0, fleet__router="power-of-two", **changes))
    assert ours.loads_per_request < 0.65 * blind.loads_per_request


def test_loads_of_the_warm_up_are_not_reported() -> None:
    whole, _ = simulate(fleet())
    late, _ = simulate(fleet(warm_up_s=4.0))
    assert 0 < late.remote_loads < whole.remote_loads / 2, "most adapters are on disk by then"
    assert late.disk_loads <= whole.disk_loads and late.device_loads < whole.device_loads
    assert 0 < late.loads_per_request < whole.loads_per_request


# ==== the workload ====


def arrivals(workload: Workload, duration_s: float = 2000.0, seed: int = 0) -> list[Arrival]:
    return list(make_arrivals(workload, seed, duration_s))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 8.0])
def test_requests_come_at_the_rate_and_as_unevenly_as_asked(burstiness: float) -> None:
    made = arrivals(Workload(arrivals=Process(rate=5.0, burstiness=burstiness)))
    gaps = [b.time_s - a.time_s for a, b in pairwise(made)]
    mean = sum(gaps) / len(gaps)
    squared = sum((gap - mean) ** 2 for gap in gaps) / len(gaps) / mean**2
    assert mean == pytest.approx(0.2, rel=0.12)
    assert squared == pytest.approx(burstiness, rel=0.25)


def test_a_day_has_a_peak_and_a_trough() -> None:
    made = arrivals(Workload(arrivals=Process(rate=10.0, day_s=400.0, swing=0.8)), 400.0)
    first = sum(a.time_s < 200.0 for a in made)
    assert first > 2 * (len(made) - first)


def test_adapters_follow_zipf_drift_and_flash_crowds() -> None:
    def counts(popularity: Popularity) -> dict[int, int]:
        found: dict[int, int] = {}
        for arrival in arrivals(Workload(arrivals=Process(rate=20.0), popularity=popularity), 500):
            found[arrival.adapter] = found.get(arrival.adapter, 0) + 1
        return found

    plain = sorted(counts(Popularity(adapters=100)).values(), reverse=True)
    assert plain[0] == pytest.approx(2 * plain[1], rel=0.25)
    drifting = sorted(counts(Popularity(adapters=100, drift_s=10.0)).values(), reverse=True)
    assert drifting[0] < 0.7 * plain[0]
    crowd = counts(Popularity(adapters=100, flash_at_s=100.0, flash_s=100.0))
    assert max(crowd.values()) > 0.08 * sum(crowd.values())
    base = counts(Popularity(adapters=100, base_share=0.5))
    assert base[-1] == pytest.approx(0.5 * sum(base.values()), rel=0.05)


def test_tenants_ask_for_their_own_adapters_as_often_as_their_shares_say() -> None:
    popularity = Popularity(adapters=50, tenants=3, tenant_shares=(0.7, 0.2, 0.1), base_share=0.2)
    made = arrivals(Workload(popularity=popularity))
    for number, share in enumerate(popularity.tenant_shares):
        own = [a.adapter for a in made if a.tenant == f"tenant-{number}"]
        assert len(own) == pytest.approx(share * len(made), rel=0.05)
        assert own.count(-1) == pytest.approx(0.2 * len(own), rel=0.12)
        assert {a % 3 for a in own if a >= 0} == {number} and max(own) < 50


def test_lengths_have_their_median_and_their_most() -> None:
    made = arrivals(Workload(prompt=Lengths(median=100.0, sigma=1.0, most=300)), 500.0)
    lengths = sorted(a.num_prompt_tokens for a in made)
    assert lengths[len(lengths) // 2] == pytest.approx(100, rel=0.06)
    assert lengths[-1] == 300 and lengths[0] >= 1


# ==== files ====


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fleet__scaling": {"min": 3, "max": 2}}, "min=3 must be from 0 to max=2"),
        ({"fleet__router": "best"}, "router is 'best', not one of reef"),
        ({"workload__prompt__most": 5000}, "max_model_len is 4096"),
        ({"workload__arrivals__rate": 0}, "> 0.0"),
        ({"workload__arrivals__ratee": 1}, "ratee"),
        ({"objective__ttft_s": 0.001}, "ttft_s is 0.001 s, below .* 0.045.* prompt of 200 tokens"),
        ({"objective": {"ttft_s": 0.016, "attained": 0.5}}, "below .* 0.017.* prompt of 60 tokens"),
        ({"objective__ttft_s": 0.2}, "ttft_s is 0.2 s, below .* first request .* 0.34.* leaves 2"),
        ({"objective__tpot_s": 0.005}, "tpot_s is 0.005 s, below .* 0.0052"),
        ({"fleet__size__memory_bytes": 2**25}, "need 38797312 bytes; .*memory_bytes is 33554432"),
        ({"fleet__adapter_bytes": []}, "adapter_bytes"),
        ({"profile__step__tokens": [[1, 0.1]]}, "two points"),
        ({"workload__popularity": {"tenants": 2, "tenant_shares": [0.5]}}, "not 1 that are 0.5"),
        ({"workload__weights": {"acme": 2.0}}, "'acme'; the tenants are tenant-0 to tenant-0"),
    ],
    ids=[
        *("bounds", "router", "lengths", "rate", "unknown"),
        *("first token", "half of them", "cold", "token", "memory", "sizes", "points"),
        *("shares", "weights"),
    ],
)
def test_what_cannot_be_simulated_is_refused_by_name(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidSimulation, match=told):
        fleet(**changes)


@pytest.mark.parametrize("name", ["routing", "autoscaling", "faults", "tuning"])
def test_the_command_runs_the_examples(name: str, tmp_path: Path) -> None:
    text = (CONFIGS / f"simulate-{name}.yaml").read_text()
    file = tmp_path / "small.yaml"
    file.write_text(
        text.replace("duration_s: 100", "duration_s: 4")
        .replace("duration_s: 120", "duration_s: 4")
        .replace("duration_s: 600", "duration_s: 4")
        .replace("warm_up_s: 20", "warm_up_s: 1")
        .replace("warm_up_s: 60", "warm_up_s: 0")
    )
    ran = CliRunner().invoke(reef, ["simulate", str(file), "--json", "--router", "reef"])
    assert ran.exit_code == 0, ran.output
    row = json.loads(ran.stdout.strip().splitlines()[-1])
    assert row["router"] == "reef" and row["finished"] == row["requests"] > 10
    assert row["service_gap"] == 0, "of one tenant"
    table = CliRunner().invoke(
        reef,
        ["simulate", str(file), "--router", "reef", "--router", "random", "--processes", "1"],
    )
    assert all(word in table.stdout for word in ("TTFT p99", "service gap of tenants", "random"))
