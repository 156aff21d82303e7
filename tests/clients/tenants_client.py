"""The official OpenAI client with the keys of several tenants, and with none of them.

    python tests/clients/tenants_client.py <base url> < expectations.json

Expectations: `keys` by tenant; `answers`, a list of [tenant, model, greedy token ids]; `missing`,
a list of [tenant, model]; `lists`, tenant -> {model: parent}; `limited`, a tenant who may send two
requests per minute. Ends with 0 if everything held. Runs in an environment of its own.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import openai
from openai import OpenAI

PROMPT = "hello"
EXTRAS = {"ignore_eos": True, "return_token_ids": True}


def client_of(url: str, key: str) -> OpenAI:
    return OpenAI(base_url=url, api_key=key, max_retries=0)


def complete(client: OpenAI, model: str) -> list[int]:
    answer = client.completions.create(
        model=model, prompt=PROMPT, temperature=0, max_tokens=12, extra_body=EXTRAS
    )
    assert answer.model == model
    return answer.choices[0].token_ids


def stream(client: OpenAI, model: str) -> list[int]:
    chunks = client.completions.create(
        model=model, prompt=PROMPT, temperature=0, max_tokens=12, extra_body=EXTRAS, stream=True
    )
    return [i for chunk in chunks for choice in chunk.choices for i in choice.token_ids]


def refusal(
    kind: type[openai.APIStatusError], call: Callable[[], Any], code: str
) -> openai.APIStatusError:
    try:
        call()
    except kind as caught:
        assert caught.code == code, caught
        return caught
    raise AssertionError(f"{kind.__name__} was expected")


def check_keys(url: str, model: str) -> None:
    for key in ("reef-wrong", "none"):
        client = client_of(url, key)
        for call in (lambda c=client: complete(c, model), client.models.list):
            error = refusal(openai.AuthenticationError, call, "invalid_api_key")
            assert key not in error.message
            assert error.response.headers["www-authenticate"].startswith("Bearer")


def check_missing(client: OpenAI, model: str) -> None:
    error = refusal(openai.NotFoundError, lambda: complete(client, model), "model_not_found")
    unknown = refusal(openai.NotFoundError, lambda: complete(client, "zzz"), "model_not_found")
    assert error.message.replace(model, "zzz") == unknown.message
    refusal(openai.NotFoundError, lambda: client.models.retrieve(model), "model_not_found")


def check_limit(client: OpenAI, model: str) -> None:
    for _ in range(2):
        complete(client, model)
    error = refusal(openai.RateLimitError, lambda: complete(client, model), "rate_limit_exceeded")
    assert 1 <= int(error.response.headers["retry-after"]) <= 30


def main() -> None:
    url, wanted = f"{sys.argv[1]}/v1", json.load(sys.stdin)
    clients = {tenant: client_of(url, key) for tenant, key in wanted["keys"].items()}
    for tenant, model, token_ids in wanted["answers"]:
        for ask in (complete, stream):
            got = ask(clients[tenant], model)
            assert got == token_ids, f"{tenant}, {model}: {got}, not {token_ids}"
    for tenant, listed in wanted["lists"].items():
        assert {m.id: m.parent for m in clients[tenant].models.list()} == listed, tenant
    for tenant, model in wanted["missing"]:
        check_missing(clients[tenant], model)
    base = wanted["answers"][0][1]
    check_keys(url, base)
    check_limit(clients[wanted["limited"]], base)


if __name__ == "__main__":
    main()
