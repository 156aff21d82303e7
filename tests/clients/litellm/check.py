"""LiteLLM's SDK against a running server, and its proxy in front of one.

check.py <url> <base model> <adapter>
"""

import asyncio
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no download of prices

import litellm
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field

MESSAGES = [{"role": "user", "content": "Hello!"}]
FIXED = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
# Random weights would write spaces, texts and, where a schema allows any, fields without end. Their
# tokens are bytes: these biases leave out the spaces, and end the texts and objects.
TERSE = {"9": -100, "10": -100, "13": -100, "32": -100, "34": 100, "125": 90}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Forecast the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "weather"}}


class Answer(BaseModel):
    """What a customer wants. Random weights would add fields without end if they might."""

    model_config = ConfigDict(extra="forbid")

    is_good: bool
    count: Literal[1, 22, 333]
    words: list[Literal["ja", "nein"]] = Field(max_length=2)


# ---- the SDK -------------------------------------------------------------------------------


def check_chat(at: dict[str, str], prefix: str, base: str, adapter: str) -> None:
    texts = {}
    for model in (base, adapter):
        asked = {"model": f"{prefix}/{model}", "messages": MESSAGES, **at, **FIXED}
        whole = litellm.completion(**asked)
        assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length"
        chunks = list(
            litellm.completion(stream=True, stream_options={"include_usage": True}, **asked)
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content, (text, whole)
        assert [c.usage.completion_tokens for c in chunks if getattr(c, "usage", None)] == [12]
        texts[model] = text
    assert texts[base] != texts[adapter], "the adapter must change what is said"


def check_completions(at: dict[str, str], base: str, adapter: str) -> None:
    texts = {}
    for model in (base, adapter):
        asked = {"model": f"text-completion-openai/{model}", "prompt": "one", **at, **FIXED}
        texts[model] = litellm.text_completion(**asked).choices[0].text
        chunks = litellm.text_completion(stream=True, **asked)
        assert "".join(c.choices[0].text or "" for c in chunks) == texts[model]
    assert texts[base] != texts[adapter]


def check_structured(at: dict[str, str], prefix: str, model: str) -> None:
    asked = {"model": f"{prefix}/{model}", "messages": MESSAGES, "temperature": 0, **at}
    asked["logit_bias"] = TERSE
    answer = litellm.completion(response_format=Answer, max_tokens=400, **asked)
    Answer.model_validate_json(answer.choices[0].message.content)
    for choice in ("required", NAMED):
        answer = litellm.completion(tools=[TOOL], tool_choice=choice, max_tokens=200, **asked)
        function = answer.choices[0].message.tool_calls[0].function
        assert function.name == "weather", answer
        assert json.loads(function.arguments)["city"] in ("Rome", "Oslo"), answer


def check_responses(at: dict[str, str], model: str) -> None:
    asked = {"model": f"openai/{model}", "input": "Hello!", "temperature": 0, **at}
    asked |= {"max_output_tokens": 16}
    whole = litellm.responses(**asked)
    assert 0 < whole.usage.output_tokens <= 16
    events = list(litellm.responses(stream=True, **asked))
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output[0].content[0].text
    assert events[-1].type in ("response.completed", "response.incomplete")


def check_embeddings(at: dict[str, str], base: str, adapter: str) -> None:
    vectors = [
        litellm.embedding(model=f"openai/{model}", input=["one", "two"], **at).data[0]["embedding"]
        for model in (base, adapter)
    ]
    assert len(vectors[0]) == len(vectors[1]) > 1 and vectors[0] != vectors[1]


async def check_messages(url: str, base: str, adapter: str) -> None:
    """Anthropic's interface: of Reef, and of LiteLLM in front of chat completions."""
    for provider, address in (("anthropic", url), ("hosted_vllm", f"{url}/v1")):
        texts = {}
        for model in (base, adapter):
            at = {"model": f"{provider}/{model}", "api_base": address, "api_key": "none"}
            asked = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0, **at}
            whole = await litellm.anthropic.messages.acreate(**asked)
            assert whole["role"] == "assistant" and whole["usage"]["output_tokens"] > 0, whole
            texts[model] = "".join(block["text"] for block in whole["content"])
            stream = await litellm.anthropic.messages.acreate(stream=True, **asked)
            assert text_of([chunk async for chunk in stream]) == texts[model]
        assert texts[base] != texts[adapter], texts


def text_of(chunks: list[bytes]) -> str:
    lines = b"".join(chunks).decode().splitlines()
    events = [json.loads(line.removeprefix("data:")) for line in lines if line.startswith("data:")]
    assert events[-1]["type"] == "message_stop", events
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    return "".join(delta["text"] for delta in deltas)


# ---- the proxy -----------------------------------------------------------------------------


@contextmanager
def proxy(key: str, at: dict[str, str], *models: str) -> Iterator[str]:
    listed = [
        {"model_name": model, "litellm_params": {"model": f"hosted_vllm/{model}", **at}}
        for model in models
    ]
    settings = {"model_list": listed, "general_settings": {"master_key": key}}
    Path("proxy.yaml").write_text(json.dumps(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("litellm")), "--config", "proxy.yaml"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]
    with open("proxy.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/health/liveliness", process)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def wait_for(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline_s = time.monotonic() + 180
    while time.monotonic() < deadline_s and process.poll() is None:
        with suppress(OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.5)
    raise AssertionError(f"the proxy does not serve: {Path('proxy.log').read_text()[-3000:]}")


def check_proxy(url: str, key: str, base: str, adapter: str) -> None:
    asked = urllib.request.Request(f"{url}/health", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        health = json.load(answer)
    assert health["healthy_count"] == 2 and health["unhealthy_count"] == 0, health
    texts = {}
    with OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        assert {base, adapter} <= {model.id for model in client.models.list()}
        for model in (base, adapter):
            asked = {"model": model, "messages": MESSAGES, **FIXED}
            whole = client.chat.completions.create(**asked)
            chunks = client.chat.completions.create(stream=True, **asked)
            text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            assert text == whole.choices[0].message.content and whole.usage.completion_tokens == 12
            texts[model] = text
    assert texts[base] != texts[adapter]


def main() -> None:
    url, base, adapter = sys.argv[1:]
    at = {"api_base": f"{url}/v1", "api_key": "none"}
    for prefix in ("openai", "hosted_vllm"):
        check_chat(at, prefix, base, adapter)
        check_structured(at, prefix, adapter)
    check_completions(at, base, adapter)
    key = f"sk-{secrets.token_hex(16)}"
    with proxy(key, at, base, adapter) as proxied:
        check_proxy(proxied, key, base, adapter)
    check_embeddings(at, base, adapter)
    for model in (base, adapter):
        check_responses(at, model)
    asyncio.run(check_messages(url, base, adapter))


if __name__ == "__main__":
    main()
