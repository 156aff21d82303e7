"""Recorded traces: every format is read, a bad row is refused with its line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from deployments.simulator.checked import InvalidSimulation
from deployments.simulator.config import read_simulation
from deployments.simulator.prompts import make_prompt
from deployments.simulator.simulate import simulate
from deployments.simulator.traces import Trace
from deployments.simulator.workload import (
    Arrival,
    Lengths,
    Popularity,
    Prefix,
    Process,
    Workload,
    make_arrivals,
)
from deployments.usage.meter import UsageMeter
from deployments.usage.record import UsageRecord

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:00.0000000,879,55
"""
AZURE_2024 = (
    AZURE.replace("900,", "900+00:00,").replace("690,", "690+00:00,").replace("000,", "000+00:00,")
)
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,GPT-4,1087,230,1317,API log
"""


def mooncake(*rows: tuple[int, int, int, list[int]]) -> str:
    keys = ("timestamp", "input_length", "output_length", "hash_ids")
    return "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)


MOONCAKE = mooncake((0, 700, 10, [0, 1]), (3052, 1100, 20, [0, 2, 3]))
OURS = (
    '{"time_s": 3, "prompt_tokens": 9, "output_tokens": 5, "adapter": "sql", "tenant": "acme"}\n'
    '{"time_s": 4.5, "prompt_tokens": 8, "output_tokens": 6, "adapter": null}\n'
    '{"time_s": 5, "prompt_tokens": 7, "output_tokens": 7, "adapter": "sql"}\n'
)


def read(tmp_path: Path, text: str, form: Any, most: int = 4096, **keys: Any) -> list[Arrival]:
    (tmp_path / "trace").write_text(text)
    trace = Trace(str(tmp_path / "trace"), form, **keys)
    return list(make_arrivals(Workload(trace=trace), 0, 1e6, most))


@pytest.mark.parametrize(
    ("text", "form", "wanted"),
    [
        (AZURE, "azure", [(0.0, 374, 44), (4.314579, 396, 109), (13.31941, 879, 55)]),
        (AZURE_2024, "azure", [(0.0, 374, 44), (4.314579, 396, 109), (13.31941, 879, 55)]),
        (BURSTGPT, "burstgpt", [(0.0, 472, 18), (40.5, 1087, 230)]),
        (MOONCAKE, "mooncake", [(0.0, 700, 10), (3.052, 1100, 20)]),
        (OURS, "reef", [(0.0, 9, 5), (1.5, 8, 6), (2.0, 7, 7)]),
    ],
    ids=["azure 2023", "azure 2024", "burstgpt", "mooncake", "reef"],
)
def test_every_format_is_read(
    text: str, form: str, wanted: list[tuple[float, int, int]], tmp_path: Path
) -> None:
    made = read(tmp_path, text, form)
    assert [(a.num_prompt_tokens, a.num_output_tokens) for a in made] == [w[1:] for w in wanted]
    assert [a.time_s for a in made] == pytest.approx([w[0] for w in wanted], abs=1e-6)
    faster = read(tmp_path, text, form, speed=2.0)
    assert faster[-1].time_s == pytest.approx(made[-1].time_s / 2)


def test_our_own_name_adapters_and_tenants(tmp_path: Path) -> None:
    made = read(tmp_path, OURS, "reef")
    assert [(a.adapter, a.tenant) for a in made] == [(0, "acme"), (-1, ""), (0, "")]


@pytest.mark.parametrize(
    ("text", "form", "told"),
    [
        (AZURE.replace("396", "many"), "azure", "line 3: 'many' is not a number"),
        (AZURE.replace("18:15:50.9951690", "noon"), "azure", "line 3: '2023-11-16 noon' is not"),
        (AZURE.replace("18:15:50", "18:15:40"), "azure", "line 3: it comes before the line above"),
        (AZURE.replace(",109", ",0"), "azure", "line 3: a request needs 1 token or more"),
        (AZURE.replace("396", "9396"), "azure", "line 3: prompt and output are 9505 tokens"),
        (AZURE, "burstgpt", "line 2: 'Request tokens' is missing; is it of format burstgpt"),
        (BURSTGPT.replace("1087", "-1"), "burstgpt", "line 3: '-1' is outside"),
        (MOONCAKE.replace("[0, 2, 3]", "[0, 2]"), "mooncake", "line 2: hash_ids are of 1024"),
        (MOONCAKE + "nonsense\n", "mooncake", "line 3: it is not a JSON object"),
        (OURS.replace("5,", "5.5,"), "reef", "line 1: 5.5 is not a number of tokens"),
        ("", "reef", "it has no requests"),
    ],
    ids=lambda value: value if "line" in value or " no " in value else "",
)
def test_a_bad_row_is_refused_with_its_line(
    text: str, form: str, told: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidSimulation, match=told):
        read(tmp_path, text, form)


def test_failed_and_long_requests_are_left_out_or_cut_where_that_is_said(tmp_path: Path) -> None:
    failed = read(tmp_path, AZURE.replace(",109", ",0"), "azure", failed="skip")
    assert [a.num_output_tokens for a in failed] == [44, 55]
    shorter = read(tmp_path, MOONCAKE, "mooncake", 1000, long="skip")
    assert [a.num_prompt_tokens for a in shorter] == [700]
    cut = read(tmp_path, MOONCAKE, "mooncake", 1000, long="cut")
    assert [a.num_prompt_tokens for a in cut] == [700, 980]
    assert sum(map(len, cut[1].shared)) == 980


def test_what_two_prompts_share_is_the_same_and_nothing_else_is(tmp_path: Path) -> None:
    a, b = read(tmp_path, MOONCAKE, "mooncake")
    first = make_prompt(a.number, a.num_prompt_tokens, a.shared)
    second = make_prompt(b.number, b.num_prompt_tokens, b.shared)
    assert list(first[:512]) == list(second[:512]) and len(second) == 1100
    assert not {*first[512:]} & {*second[512:]}
    assert [*second] == [second[i] for i in range(1100)] == [*second[:600], *second[600:]]


@pytest.mark.parametrize("kind", ["trace", "prefix"])
def test_the_prefix_cache_finds_what_prompts_share(kind: str, tmp_path: Path) -> None:
    rows = [(i * 500, 1040, 4, [0, 1, 2 + i]) for i in range(12)]
    (tmp_path / "trace.jsonl").write_text(mooncake(*rows))
    trace = "{file: trace.jsonl, format: mooncake}"
    workload = {"trace": f"trace: {trace}", "prefix": "prefix: {tokens: 1024}"}[kind]
    (tmp_path / "file.yaml").write_text(
        f"duration_s: 6\nworkload: {{{workload}, popularity: {{adapters: 1}}, "
        "arrivals: {rate: 4}, prompt: {median: 16, most: 16}, output: {median: 4, most: 8}}\n"
        "fleet: {size: {max_model_len: 2048}}\n"
    )
    found = simulate(read_simulation(tmp_path / "file.yaml"))
    assert found.requests == found.finished > 5
    assert found.cached_prompt_share > 0.7


def test_prefixes_are_an_adapters_own() -> None:
    workload = Workload(
        arrivals=Process(rate=20.0),
        popularity=Popularity(adapters=3),
        prompt=Lengths(median=10.0, most=20),
        prefix=Prefix(tokens=100, share=0.5),
    )
    made = list(make_arrivals(workload, 0, 50.0))
    sharing = [a for a in made if a.shared]
    assert len(sharing) == pytest.approx(len(made) / 2, rel=0.15)
    assert len({a.shared for a in sharing}) == len({a.adapter for a in sharing}) == 3
    assert all(101 <= a.num_prompt_tokens <= 120 for a in sharing)


def test_the_servers_own_records_are_a_trace(tmp_path: Path) -> None:
    """They are written as requests end, to a log that is uploaded; one may be in both."""
    meter = UsageMeter(tmp_path / "usage", 2**20, None, 1.0, 60.0, num_slots=8)
    for time_s, adapter, version in ((7.5, "acme/sql", 2), (5.0, None, 0), (6.0, "acme/sql", 1)):
        used = UsageRecord(
            id="", request_id="r", time_s=time_s, tenant="acme", route="r", model="base"
        )
        used.adapter, used.version = adapter, version
        charge = meter.begin(used)
        charge.read(9, 0, 0, 0.0, 0.1)
        charge.sent(int(time_s), 0)
        charge.end(200, {"stop"})
    meter.close()
    [log] = (tmp_path / "usage").glob("*.log")
    plain = b"".join(line[9:] for line in log.read_bytes().splitlines(keepends=True))
    (tmp_path / "usage" / "2026-12-01_w-000001.jsonl.gz").write_bytes(gzip.compress(plain))
    for file in (tmp_path / "usage", log):
        made = list(make_arrivals(Workload(trace=Trace(str(file), "usage")), 0, 1e6, 4096))
        assert [(a.time_s, a.num_output_tokens) for a in made] == [(0.0, 5), (1.0, 6), (2.5, 7)]
        assert made[0].adapter == -1 and made[1].adapter != made[2].adapter
        assert all(a.tenant == "acme" and a.num_prompt_tokens == 9 for a in made)
    log.write_bytes(b"00000000 {}\n")
    with pytest.raises(InvalidSimulation, match="line 1 is no usage record"):
        list(make_arrivals(Workload(trace=Trace(str(log), "usage")), 0, 1e6, 4096))
