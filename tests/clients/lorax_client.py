"""LoRAX's own client against a running server, sync and async.

    python tests/clients/lorax_client.py <base url> <base model> <adapter>

Runs in an environment of its own (requirements.txt); ends with 0 if everything held.
"""

import asyncio
import json
import sys
from collections.abc import Callable

from lorax import AsyncClient, Client
from lorax.errors import NotFoundError, ValidationError
from lorax.types import FinishReason, MergedAdapters

PROMPT = "Hello!"
GREEDY = {"max_new_tokens": 12, "ignore_eos_token": True}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}


def check_generate(client: Client, base: str, adapter: str) -> None:
    texts = {}
    for adapter_id in (None, base, adapter):
        answer = client.generate(PROMPT, adapter_id=adapter_id, adapter_source="local", **GREEDY)
        details = answer.details
        assert details.finish_reason == FinishReason.Length and details.seed is None
        assert details.generated_tokens == len(details.tokens) == 12
        assert details.prompt_tokens > 0 and details.prefill == []
        shown = "".join(token.text for token in details.tokens if not token.special)
        assert shown == answer.generated_text
        texts[adapter_id] = answer.generated_text
    assert texts[None] == texts[base] != texts[adapter], "the adapter must change what is said"


def check_options(client: Client, adapter: str) -> None:
    asked = {"adapter_id": adapter, "return_k_alternatives": 2, "decoder_input_details": True}
    answer = client.generate(PROMPT, return_full_text=True, **asked, **GREEDY)
    assert answer.generated_text.startswith(PROMPT)
    assert len(answer.details.prefill) == answer.details.prompt_tokens
    assert answer.details.prefill[0].logprob is None and answer.details.prefill[1].logprob < 0
    for token in answer.details.tokens:
        assert len(token.alternative_tokens) == 2
        assert token.id == token.alternative_tokens[0].id, "a greedy token is the likeliest"
    several = client.generate(PROMPT, do_sample=True, best_of=3, max_new_tokens=6)
    assert len(several.details.best_of_sequences) == 2
    sampled = {"do_sample": True, "seed": 2**64 - 1, "temperature": 2.0, "top_k": 50, "top_p": 0.9}
    first, again = (client.generate(PROMPT, max_new_tokens=8, **sampled) for _ in range(2))
    assert first == again and first.details.seed == 2**64 - 1, "a seed must give the same answer"
    stop = answer.generated_text[len(PROMPT) + 2 :][:1]
    stopped = client.generate(PROMPT, adapter_id=adapter, stop_sequences=[stop], **GREEDY)
    assert stopped.generated_text.endswith(stop)
    assert stopped.details.finish_reason == FinishReason.StopSequence
    wanted = {"type": "json_object", "schema": SCHEMA}
    text = client.generate(PROMPT, max_new_tokens=200, response_format=wanted).generated_text
    assert isinstance(json.loads(text)["a"], bool)


def check_stream(client: Client, adapter: str) -> None:
    whole = client.generate(PROMPT, adapter_id=adapter, **GREEDY)
    *first, last = client.generate_stream(PROMPT, adapter_id=adapter, **GREEDY)
    assert [e.token.id for e in (*first, last)] == [t.id for t in whole.details.tokens]
    assert all(e.generated_text is None and e.details is None for e in first)
    assert last.generated_text == whole.generated_text
    assert last.details.generated_tokens == 12


def check_combined(client: Client, adapter: str) -> None:
    def text(**asked: object) -> str:
        return client.generate(PROMPT, **asked, **GREEDY).generated_text

    def merged(weights: list[float], **how: object) -> str:
        ids = [adapter] * len(weights)
        return text(merged_adapters=MergedAdapters(ids=ids, weights=weights, **how))

    alone = text(adapter_id=adapter)
    assert (
        text(adapter_id=f"{adapter}:1") == text(adapter_id=f"{adapter}:0.5+{adapter}:0.5") == alone
    )
    assert text(adapter_id=f"{adapter}:0") == text() == merged([0.0, 0.0], density=0.0)
    # The same one twice: its A and its B have each the root of a quarter, twice.
    assert merged([0.25, 0.25], merge_strategy="linear", density=0.0) == alone
    for strategy in ("ties", "dare_linear", "dare_ties"):
        how = {"merge_strategy": strategy, "density": 0.5, "majority_sign_method": "frequency"}
        assert merged([0.9, 0.8], **how) == merged([0.8, 0.9], **how)


def check_errors(client: Client, adapter: str) -> None:
    calls: list[tuple[Callable[[], object], type[Exception]]] = [
        (lambda: client.generate(PROMPT, adapter_id="nobody"), NotFoundError),
        (lambda: list(client.generate_stream(PROMPT, adapter_id="nobody")), NotFoundError),
        (lambda: client.generate(PROMPT, typical_p=0.5), ValidationError),
        (
            lambda: client.generate(PROMPT, adapter_id=adapter, adapter_source="hub"),
            ValidationError,
        ),
        (
            lambda: client.generate(
                PROMPT,
                merged_adapters=MergedAdapters(
                    ids=[adapter, "nobody"], weights=[1.0, 1.0], density=0.0
                ),
            ),
            NotFoundError,
        ),
    ]
    for call, error in calls:
        try:
            call()
        except error:
            continue
        raise AssertionError(f"no {error.__name__}")


async def check_async(url: str, adapter: str) -> None:
    client = AsyncClient(url)

    async def whole(adapter_id: str | None) -> str:
        return (await client.generate(PROMPT, adapter_id=adapter_id, **GREEDY)).generated_text

    async def streamed(adapter_id: str | None) -> str:
        stream = client.generate_stream(PROMPT, adapter_id=adapter_id, **GREEDY)
        return "".join([e.token.text async for e in stream if not e.token.special])

    pairs = [(whole(a), streamed(a)) for a in (None, adapter) * 2]
    texts = await asyncio.gather(*(call for pair in pairs for call in pair))
    assert len(set(texts)) == 2 and texts[:4] == texts[4:], "concurrency changed an answer"
    try:
        await client.generate(PROMPT, adapter_id="nobody")
    except NotFoundError:
        return
    raise AssertionError("an unknown adapter was served")


def main() -> None:
    url, base, adapter = sys.argv[1:]
    client = Client(url)
    check_generate(client, base, adapter)
    check_options(client, adapter)
    check_stream(client, adapter)
    check_combined(client, adapter)
    check_errors(client, adapter)
    asyncio.run(check_async(url, adapter))


if __name__ == "__main__":
    main()
