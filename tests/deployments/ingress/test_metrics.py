"""/metrics: what the engines report, and how many series adapters may have."""

import json
import re
from collections import Counter

from engine.messages import EngineStats
from tests.deployments.support.fakes import Client, FakeStore, Server, in_server, until

COMPLETIONS = "/v1/completions"


async def scrape(server: Server) -> str:
    return (await server.call("GET", "/metrics")).body.decode()


def values(text: str, name: str, label: str = "adapter") -> dict[str, float]:
    """The values of one metric by one of its labels."""
    pattern = rf'^{name}{{(?:[^}}]*,)?{label}="([^"]*)"[^}}]*}} (\S+)$'
    return {found[1]: float(found[2]) for found in re.finditer(pattern, text, re.MULTILINE)}


# ---- engines -------------------------------------------------------------------------------

TOTALS = EngineStats(
    num_blocks_cached=3,
    total_steps=100,
    total_prompt_tokens=2000,
    total_cached_tokens=500,
    total_output_tokens=800,
    total_preemptions=2,
    total_step_s=1.5,
    total_drafted_tokens=60,
    total_accepted_tokens=40,
)
SERIES = {
    "reef_kv_blocks_cached": 3,
    "reef_engine_steps_total": 100,
    "reef_engine_prompt_tokens_total": 2000,
    "reef_engine_cached_prompt_tokens_total": 500,
    "reef_engine_output_tokens_total": 800,
    "reef_engine_preemptions_total": 2,
    "reef_engine_step_seconds_total": 1.5,
    "reef_engine_drafted_tokens_total": 60,
    "reef_engine_accepted_tokens_total": 40,
}


def test_everything_an_engine_counts_is_shown() -> None:
    async def test(server: Server) -> None:
        server.engine.totals = TOTALS
        text = await scrape(server)
        for name, value in SERIES.items():
            assert values(text, name, "model") == {"base": value}, name
            kind = "counter" if name.endswith("_total") else "gauge"
            assert f"# TYPE {name} {kind}" in text
        assert re.search(r"# HELP reef_engine_steps_total .*Summed over the model's replicas", text)

    in_server(test)


def test_counters_do_not_fall_when_an_engine_starts_again() -> None:
    async def test(server: Server) -> None:
        for totals, steps in ((TOTALS, 100), (EngineStats(), 100), (TOTALS, 200)):
            server.engine.totals = totals
            text = await scrape(server)
            assert values(text, "reef_engine_steps_total", "model") == {"base": steps}

    in_server(test)


def test_requests_that_a_replica_holds_for_nobody_are_seen() -> None:
    async def test(server: Server) -> None:
        async def open_and_held() -> tuple[float, float]:
            text = await scrape(server)
            names = ("reef_requests_open", "reef_requests_held")
            is_open, held = (values(text, name, "model")["base"] for name in names)
            return is_open, held

        server.engine.running.clear()
        fields = {"model": "base", "prompt": "abc", "max_tokens": 2}
        client = Client(server.api, "POST", COMPLETIONS, json.dumps(fields).encode())
        await until(lambda: len(server.engine.requests) == 1)
        assert await open_and_held() == (1, 1)
        server.connection.lose = lambda abort: True
        client.hang_up()
        await client.done
        assert await open_and_held() == (0, 1), "the replica has not heard of the end"
        server.connection.lose = lambda abort: False
        await open_and_held()  # the report by which the ingress notices
        assert await open_and_held() == (0, 0)

    in_server(test)


def test_counters_keep_what_a_replica_counted_that_is_gone() -> None:
    async def test(server: Server) -> None:
        server.engine.totals = TOTALS
        await scrape(server)
        server.connection.kill("replica")
        text = await scrape(server)
        assert values(text, "reef_engine_output_tokens_total", "model") == {"base": 800}

    in_server(test)


# ---- adapters ------------------------------------------------------------------------------

NAMES = [f"adapter-{number}" for number in range(7)]


def test_adapters_beyond_the_cap_share_one_label_and_nothing_is_lost() -> None:
    async def test(server: Server) -> None:
        wanted = Counter[str]()
        for number, name in enumerate([*NAMES, *NAMES, "base"]):
            prompt = "x" * (number + 1)
            answer = await server.post(COMPLETIONS, model=name, prompt=prompt, max_tokens=3)
            assert answer.status == 200
            own = name == "base" or name in NAMES[:3]
            label = name if name == "base" else f"public/{name}@1" if own else "other"
            wanted[label] += len(prompt)
        text = await scrape(server)
        assert values(text, "reef_prompt_tokens_total") == wanted
        assert len(wanted) == 3 + len(["base", "other"])
        answers = dict.fromkeys(wanted, 2.0) | {"base": 1.0, "other": 8.0}
        for histogram in (
            "reef_time_to_first_token_seconds_count",
            "reef_time_per_output_token_seconds_count",
            "reef_request_seconds_count",
            "reef_request_queue_seconds_count",
        ):
            assert values(text, histogram) == answers, histogram
        gaps = {label: 2 * count for label, count in answers.items()}
        assert values(text, "reef_inter_token_latency_seconds_count") == gaps

    in_server(test, store=FakeStore(*NAMES), max_adapter_series=3)
