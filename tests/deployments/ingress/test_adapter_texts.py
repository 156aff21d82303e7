"""What adapters bring beside their weights: chat templates, tokenizers, generation settings."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from adapter_store.chat_template import AdapterTemplate
from adapter_store.errors import SourceUnavailable, StoreCorrupt
from adapter_store.names import AdapterRef
from adapter_store.own_files import OwnFiles
from deployments.ingress import adapter_texts
from deployments.ingress.adapter_texts import AdapterTexts
from deployments.ingress.model_resolver import ServedModel, Target
from deployments.tenants.tenants import Everybody
from engine.messages import GenerateRequest
from tests.deployments.support.fakes import (
    EOS,
    INFO,
    FakeEngine,
    FakeStore,
    Server,
    byte_vocabulary,
    encode,
    in_server,
)
from tests.deployments.support.fakes import TEMPLATE as BASE_TEMPLATE
from tests.deployments.support.tool_templates import chat_without_calls, template_of

NO_LINK: Any = None
CHAT = "/v1/chat/completions"
TEMPLATE = AdapterTemplate(
    "{% for m in messages %}({{ m.content }}{{ eos_token }}){% endfor %}", {}
)


def in_bare_server(test: Callable[[Server], Awaitable[None]], *names: str) -> None:
    """The base has no chat template."""
    in_server(test, store=FakeStore(*names), vocabulary=byte_vocabulary(template=None))


def chat(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 40, **fields}


def test_an_adapters_template_is_used_where_the_base_has_none() -> None:
    async def test(server: Server) -> None:
        server.store.templates["own"] = TEMPLATE
        for _ in range(2):
            answer = await server.post(CHAT, **chat(model="own"))
            assert answer.status == 200
        prompt = server.engine.requests[-1].prompt_token_ids
        assert prompt == [*encode("(hi"), 256, *encode(")")]  # the base's eos_token
        assert server.store.own_files_read == ["own"]

    in_bare_server(test, "own")


def test_tokens_that_the_adapter_names_win() -> None:
    async def test(server: Server) -> None:
        server.store.templates["own"] = AdapterTemplate(TEMPLATE.source, {"eos_token": "|"})
        await server.post(CHAT, **chat(model="own"))
        assert server.engine.requests[-1].prompt_token_ids == encode("(hi|)")

    in_bare_server(test, "own")


def test_an_adapters_template_wins_over_the_bases() -> None:
    async def test(server: Server) -> None:
        server.store.templates["own"] = TEMPLATE
        await server.post(CHAT, **chat(model="own"))
        prompt = server.engine.requests[-1].prompt_token_ids
        assert prompt == [*encode("(hi"), 256, *encode(")")]

    in_server(test, store=FakeStore("own"))


def test_a_template_that_is_the_bases_is_rendered_as_the_bases() -> None:
    async def test(server: Server) -> None:
        server.store.templates["own"] = AdapterTemplate(BASE_TEMPLATE, {"pad_token": "[PAD]"})
        await server.post(CHAT, **chat(model="own"))
        assert server.engine.requests[-1].prompt_token_ids == encode("user:hi;")
        target = await server.ingress.target(Everybody().identify(None, None), "own")
        assert target.own.templates == ()

    in_server(test, store=FakeStore("own"))


def test_without_any_template_a_chat_is_refused() -> None:
    async def test(server: Server) -> None:
        server.store.templates["own"] = TEMPLATE
        for model in ("plain", "base"):
            answer = await server.post(CHAT, **chat(model=model))
            assert answer.status == 400 and "/v1/completions" in answer.error["message"]

    in_bare_server(test, "own", "plain")


def test_a_final_message_is_continued_with_an_adapters_template() -> None:
    async def test(server: Server) -> None:
        server.store.templates["own"] = TEMPLATE
        fields = chat(model="own", continue_final_message=True, add_generation_prompt=False)
        fields["messages"].append({"role": "assistant", "content": "yes, "})
        assert (await server.post(CHAT, **fields)).status == 200
        prompt = server.engine.requests[-1].prompt_token_ids
        assert prompt == [*encode("(hi"), 256, *encode(")(yes, ")]

    in_bare_server(test, "own")


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def test_tools_are_called_as_the_adapters_template_writes_calls() -> None:
    said = {
        "hermes": '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        "glm": "<think>Hm.</think><tool_call>f</tool_call>",
    }

    def answer(request: GenerateRequest) -> list[int]:
        adapter = request.adapter_folder
        assert adapter is not None
        return [*encode(said[adapter.digest.removesuffix("-digest")]), EOS]

    engine = FakeEngine(answer)
    engine.info = replace(INFO, max_model_len=4096)

    async def test(server: Server) -> None:
        for name in said:
            source = ("{# </think> #}" if name == "glm" else "") + template_of(name)
            server.store.templates[name] = AdapterTemplate(source, {})
            for choice in ("auto", "required"):
                fields = chat(model=name, tools=TOOLS, tool_choice=choice, max_tokens=200)
                answered = await server.post(CHAT, **fields)
                assert answered.status == 200, answered.body
                message = answered.json["choices"][0]["message"]
                assert [c["function"]["name"] for c in message["tool_calls"]] == ["f"]
                assert message.get("reasoning") == ("Hm." if name == "glm" else None)
                grammar = server.engine.requests[-1].sampling.grammar
                assert (grammar is not None) is (choice == "required")

    in_server(
        test, engine=engine, store=FakeStore(*said), vocabulary=byte_vocabulary(template=None)
    )


@pytest.mark.parametrize(
    ("source", "reason"),
    [(chat_without_calls(), "writes no calls"), ("{% endless %}", "cannot be used")],
)
def test_a_template_of_an_adapter_that_calls_no_tools_says_why(source: str, reason: str) -> None:
    async def test(server: Server) -> None:
        server.store.templates["own"] = AdapterTemplate(source, {})
        answer = await server.post(CHAT, **chat(model="own", tools=TOOLS))
        assert (answer.status, answer.error["param"]) == (400, "tools")
        assert reason in answer.error["message"]

    in_bare_server(test, "own")


def test_a_template_that_refuses_is_a_400() -> None:
    async def test(server: Server) -> None:
        server.store.templates["own"] = AdapterTemplate("{{ raise_exception('no chats') }}", {})
        answer = await server.post(CHAT, **chat(model="own"))
        assert (answer.status, answer.error["param"]) == (400, "messages")
        assert "no chats" in answer.error["message"]

    in_bare_server(test, "own")


@pytest.mark.parametrize("error", [SourceUnavailable("s3://secret"), StoreCorrupt("blobs/secret")])
def test_a_store_that_cannot_be_read_is_a_503_and_asked_again(error: Exception) -> None:
    async def test(server: Server) -> None:
        server.store.templates["own"] = error
        answer = await server.post(CHAT, **chat(model="own"))
        assert answer.status == 503 and "secret" not in answer.error["message"]
        server.store.templates["own"] = TEMPLATE
        assert (await server.post(CHAT, **chat(model="own"))).status == 200

    in_bare_server(test, "own")


def test_a_store_that_is_silent_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapter_texts, "READ_S", 0.05)
    store, answered = FakeStore("own"), threading.Event()
    target = Target(ServedModel("base", byte_vocabulary(), NO_LINK, 1), store.refs["own"], "public")

    class SilentStore:
        num_calls = 0

        def is_bare(self, ref_or_digest: AdapterRef | str) -> bool:
            return False

        def own_files(self, ref_or_digest: AdapterRef | str) -> OwnFiles:
            self.num_calls += 1
            answered.wait(60)
            return OwnFiles(TEMPLATE)

    async def run() -> None:
        silent = SilentStore()
        texts = AdapterTexts(silent)
        try:
            for _ in range(2):
                with pytest.raises(SourceUnavailable):
                    await texts.equip(target)
            answered.set()
            while True:
                try:
                    found = await texts.equip(target)
                    break
                except SourceUnavailable:
                    await asyncio.sleep(0.01)
            assert found.own.templates[0].template == TEMPLATE
            assert silent.num_calls == 1
        finally:
            answered.set()
            texts.close()

    asyncio.run(run())


def test_templates_that_were_not_used_for_long_are_forgotten() -> None:
    names = [f"a{n}" for n in range(adapter_texts.KEPT + 1)]
    model = ServedModel("base", byte_vocabulary(), NO_LINK, 1)
    store = FakeStore(*names)

    async def run() -> None:
        texts = AdapterTexts(store)
        for name in [*names, names[-1], names[0]]:
            target = Target(model, store.refs[name], "public")
            assert (await texts.equip(target)).own.templates == ()
        texts.close()

    asyncio.run(run())
    assert store.own_files_read == [*names, names[0]]
