"""Bodies as benchmarks send them, and what they read from the streams."""

from typing import Any

import pytest

from tests.deployments.support.fakes import Server, in_server

TEXT = "Grüße an alle"
# guidellm 0.8.1
GUIDELLM: dict[str, Any] = {
    "model": "base",
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "stop": None,
    "ignore_eos": True,
}
# vllm bench serve
BENCH_SERVE: dict[str, Any] = {
    "model": "red",
    "temperature": 0.0,
    "repetition_penalty": 1.0,
    "logprobs": None,
    "stream": True,
    "stream_options": {"include_usage": True},
}


@pytest.mark.parametrize(
    ("path", "body", "num_tokens"),
    [
        (
            "/v1/chat/completions",
            {
                **GUIDELLM,
                "messages": [{"role": "user", "content": [{"type": "text", "text": TEXT}]}],
                "max_completion_tokens": 12,
            },
            12,
        ),
        ("/v1/completions", {**GUIDELLM, "prompt": TEXT, "max_tokens": 12}, 12),
        ("/v1/completions", {**BENCH_SERVE, "prompt": TEXT, "max_tokens": 8}, 8),
        (
            "/v1/chat/completions",
            {
                **BENCH_SERVE,
                "messages": [{"role": "user", "content": [{"type": "text", "text": TEXT}]}],
                "max_completion_tokens": 8,
            },
            8,
        ),
    ],
)
def test_a_benchmark_can_measure(path: str, body: dict[str, Any], num_tokens: int) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(path, **body)
        assert answer.status == 200, answer.body
        assert answer.headers["content-type"].startswith("text/event-stream")
        chunks = answer.chunks
        assert not any("error" in chunk for chunk in chunks)
        last = chunks[-1]
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == num_tokens
        assert last["usage"]["prompt_tokens"] == len(server.engine.requests[0].prompt_token_ids)
        if body["stream_options"].get("continuous_usage_stats"):
            counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
            assert counts == sorted(counts) and counts[-1] == num_tokens
        assert any(chunk["choices"] for chunk in chunks), "what the first token is timed by"

    in_server(test)
