"""/metrics under vLLM's names, against what was asked and what the engine reports."""

import asyncio
from dataclasses import replace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from deployments.config_sections import IngressSection
from deployments.ingress.vllm_metrics import VllmSeries
from engine.messages import EngineStats
from tests.deployments.support.fakes import Client, FakeStore, Server, in_server, until

COMPLETIONS = "/v1/completions"


async def scrape(server: Server) -> dict[str, list[Any]]:
    """The samples by name, of vLLM's series alone."""
    text = (await server.call("GET", "/metrics")).body.decode()
    samples: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("vllm:"):
                assert sample.labels["model_name"] == "base"
                samples.setdefault(sample.name, []).append(sample)
    return samples


def value(samples: dict[str, list[Any]], name: str, **labels: str) -> float:
    [sample] = [s for s in samples[name] if labels.items() <= s.labels.items()]
    return sample.value


def test_requests_are_counted_as_they_end() -> None:
    async def test(server: Server) -> None:
        assert (await server.post(COMPLETIONS, prompt="abc")).status == 200
        answer = await server.post(COMPLETIONS, model="red", prompt="abc", max_tokens=2, n=2)
        assert answer.status == 200
        found = await scrape(server)
        assert value(found, "vllm:prompt_tokens_total") == 6
        assert value(found, "vllm:generation_tokens_total") == 4 + 2 * 2
        assert value(found, "vllm:request_success_total", finished_reason="stop") == 1
        assert value(found, "vllm:request_success_total", finished_reason="length") == 2
        for name, number in (
            ("time_to_first_token", 3),
            ("e2e_request_latency", 3),
            ("request_time_per_output_token", 3),
            ("request_queue_time", 2),  # once for a prompt
            ("inter_token_latency", 3 + 1 + 1),
            ("time_per_output_token", 3 + 1 + 1),
        ):
            assert value(found, f"vllm:{name}_seconds_count") == number, name
            assert value(found, f"vllm:{name}_seconds_bucket", le="+Inf") == number

    in_server(test)


def test_what_the_engine_reports_has_vllms_names() -> None:
    async def test(server: Server) -> None:
        server.engine.totals = EngineStats(
            num_waiting=3,
            num_blocks_used=16,
            total_prompt_tokens=100,
            total_cached_tokens=40,
            total_drafts=3,
            total_drafted_tokens=9,
            total_accepted_tokens=5,
            total_preemptions=2,
            resident_adapters=("red-digest", "f" * 64),
        )
        assert (await server.post(COMPLETIONS, model="red@1", prompt="x")).status == 200
        found = await scrape(server)
        assert value(found, "vllm:num_requests_running") == 0
        assert value(found, "vllm:num_requests_waiting") == 3
        assert value(found, "vllm:kv_cache_usage_perc") == 0.25  # of 64 blocks
        assert value(found, "vllm:gpu_cache_usage_perc") == 0.25
        assert value(found, "vllm:prefix_cache_queries_total") == 100
        assert value(found, "vllm:prefix_cache_hits_total") == 40
        assert value(found, "vllm:num_preemptions_total") == 2
        drafts = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
        assert [value(found, f"vllm:spec_decode_{name}_total") for name in drafts] == [3, 9, 5]
        assert value(found, "vllm:num_gpu_loaded_lora_adapters") == 2
        assert value(found, "vllm:cache_config_info", block_size="16", num_gpu_blocks="64") == 1
        loaded = {
            s.labels["adapter_name"]: s.labels["level"] for s in found["vllm:lora_adapter_loaded"]
        }
        assert loaded == {"red@1": "gpu", "f" * 64: "gpu"}

    in_server(test)


def test_adapters_are_named_while_their_requests_run_or_wait() -> None:
    async def test(server: Server) -> None:
        async def adapters() -> tuple[str, str, str]:
            [sample] = (await scrape(server))["vllm:lora_requests_info"]
            assert sample.value > 1.7e9, "the time"
            labels = sample.labels
            names = labels["running_lora_adapters"], labels["waiting_lora_adapters"]
            return (labels["max_lora"], *names)

        def ask(model: str) -> Client:
            body = b'{"model": "%s", "prompt": "abc", "stream": true}' % model.encode()
            return Client(server.api, "POST", COMPLETIONS, body)

        assert await adapters() == ("64", "", "")
        server.engine.running.clear()
        red = ask("red")
        await until(lambda: len(server.engine.requests) == 1)
        assert await adapters() == ("64", "", "red")
        server.engine.step()
        await until(lambda: red.answered.status == 200)
        blue, other = ask("base:blue"), ask("base")
        await until(lambda: len(server.engine.requests) == 3)
        assert await adapters() == ("64", "red", "base:blue")
        blue.hang_up()
        await blue.done
        server.engine.running.set()
        await asyncio.gather(red.done, other.done)
        assert await adapters() == ("64", "", "")
        found = await scrape(server)
        assert value(found, "vllm:request_success_total", finished_reason="abort") == 1

    in_server(test, store=FakeStore("red", "blue"))


def test_series_of_adapters_are_bounded() -> None:
    series = VllmSeries(2, ["base"])
    requests = [series.arrive("base", f"n{i}", f"d{i}") for i in range(5)]
    stats = replace(EngineStats(), resident_adapters=tuple(f"d{i}" for i in range(5)))
    text = "".join(series.parts({"base": stats}, {}))
    assert text.count("vllm:lora_adapter_loaded{") == 2
    assert 'num_gpu_loaded_lora_adapters{model_name="base"} 5.0' in text
    for request in requests:
        request.begin()
        request.begin()
        request.end()
    assert series.parts({}, {}) and not series._live["base"].running
    assert not series._live["base"].waiting


def test_they_can_be_left_out() -> None:
    async def test(server: Server) -> None:
        assert (await server.post(COMPLETIONS, prompt="abc")).status == 200
        assert await scrape(server) == {}
        assert "reef_requests_total" in (await server.call("GET", "/metrics")).body.decode()

    in_server(test, ingress_settings=IngressSection(vllm_metrics=False))
