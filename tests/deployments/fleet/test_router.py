"""Ray's request router, without a cluster: which replica is chosen."""

import tests.deployments.support.quiet_ray  # noqa: F401

# isort: split
import asyncio
import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.request_router import RequestRouter

from deployments.fleet import router
from deployments.fleet.protocol import Hints
from deployments.fleet.router import DIGEST_CHARS, AdapterRouter, from_stats, to_stats
from deployments.policy.replica_view import ReplicaFigures

DIGEST = "d" * 64


@dataclass(eq=False)
class Replica:
    """As much of Ray's RunningReplica as the router looks at."""

    name: str
    routing_stats: dict[str, Any] = field(default_factory=dict)

    @property
    def replica_id(self) -> Any:
        return SimpleNamespace(unique_id=self.name)


@pytest.fixture
def chooser(monkeypatch: pytest.MonkeyPatch) -> AdapterRouter:
    """A router without Ray's machinery around it."""

    def update(self: Any, replicas: list[Replica]) -> None:
        self._replicas = {replica.name: replica for replica in replicas}

    monkeypatch.setattr(RequestRouter, "update_replicas", update)
    made = object.__new__(AdapterRouter)
    made._replicas = {}
    made.initialize_state(max_num_seqs=4, keep_s=60.0)
    return made


def choose(chooser: AdapterRouter, hints: Hints) -> list[str]:
    pending = SimpleNamespace(args=[hints], routing_context=SimpleNamespace(should_backoff=False))
    candidates: Any = list(chooser.curr_replicas.values())
    ranks = asyncio.run(chooser.choose_replicas(candidates, pending))  # type: ignore[arg-type]
    assert pending.routing_context.should_backoff, "else a busy loop"
    return [replica.name for rank in ranks for replica in rank]  # type: ignore[attr-defined]


def replicas(*names: str, **stats: ReplicaFigures) -> Any:
    return [Replica(name, to_stats(stats.get(name, ReplicaFigures()))) for name in names]


def test_figures_survive_a_round_trip_but_for_their_rounding() -> None:
    figures = ReplicaFigures(3, 1234, 5, 64, 0.4567, frozenset({DIGEST}), frozenset({"e" * 64}))
    stats = to_stats(figures)
    assert json.loads(json.dumps(stats)) == stats
    short = frozenset({"d" * DIGEST_CHARS}), frozenset({"e" * DIGEST_CHARS})
    assert from_stats(stats) == ReplicaFigures(3, 1200, 5, 64, 0.5, *short)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_request_goes_where_its_adapter_is(chooser: AdapterRouter, name: str) -> None:
    having = ReplicaFigures(device_adapters=frozenset({DIGEST}), max_num_seqs=8)
    chooser.update_replicas(replicas("a", "b", "c", **{name: having}))
    ranked = choose(chooser, Hints(request_id="r", num_prompt_tokens=5, adapter_digest=DIGEST))
    assert ranked[0] == name and sorted(ranked) == ["a", "b", "c"]


def test_requests_between_two_reports_spread(chooser: AdapterRouter) -> None:
    same = ReplicaFigures(max_num_seqs=8)
    chooser.update_replicas(replicas("a", "b", a=same, b=same))
    chosen = [choose(chooser, Hints(request_id=f"r{n}", num_prompt_tokens=5))[0] for n in range(8)]
    assert sorted(chosen) == ["a"] * 4 + ["b"] * 4


def test_a_burst_before_any_report_fills_one_replica_and_goes_on_at_the_next(
    chooser: AdapterRouter,
) -> None:
    chooser.update_replicas([Replica("a", {}), Replica("b", {})])
    hints = [
        Hints(request_id=f"r{n}", num_prompt_tokens=5, adapter_digest=DIGEST) for n in range(9)
    ]
    chosen = [choose(chooser, each)[0] for each in hints]
    assert len(set(chosen[:4])) == 1 and sorted(map(chosen.count, "ab")) == [4, 5]


def test_a_call_with_a_target_goes_there_alone(chooser: AdapterRouter) -> None:
    chooser.update_replicas(replicas("a", "b"))
    assert choose(chooser, Hints(target="b", avoid=("b",))) == ["b"]


def test_a_call_whose_target_is_gone_reaches_another_replica(
    chooser: AdapterRouter,
) -> None:
    chooser.update_replicas(replicas("a"))
    assert choose(chooser, Hints(target="b")) == ["a"]


def test_a_leaving_replica_is_reached_by_name_and_told(chooser: AdapterRouter) -> None:
    chooser.update_replicas(replicas("a", "b", "c"))
    for name in ("a", "b"):
        hints = Hints(target=name)
        choose(chooser, hints)
        assert not hints.is_leaving
    chooser.update_replicas(replicas("b"))
    assert choose(chooser, Hints(request_id="r")) == ["b"], "c was never named and is forgotten"
    leaving = Hints(target="a")
    assert choose(chooser, leaving) == ["a"] and leaving.is_leaving
    chooser.update_replicas(replicas("a", "b"))
    staying = Hints(target="a")
    assert choose(chooser, staying) == ["a"] and not staying.is_leaving


def test_a_leaving_replica_is_forgotten_in_time(
    chooser: AdapterRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(router.time, "monotonic", lambda: now)
    chooser.update_replicas(replicas("a", "b"))
    choose(chooser, Hints(target="a"))
    chooser.update_replicas(replicas("b"))
    assert "a" in chooser.curr_replicas
    now += 61.0
    chooser.update_replicas(replicas("b"))
    assert "a" not in chooser.curr_replicas
