"""Templates that come with adapters: rendered as a model's own, and ended at a limit."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from adapter_store.chat_template import AdapterTemplate
from deployments.text import bounded_renderer
from deployments.text.bounded_renderer import BoundedRenderer
from deployments.text.chat_template import ChatTemplate, TemplateRefused

MESSAGES = [{"role": "user", "content": "Héllo \ufdd0“you”\n"}]
SOURCE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ extra | tojson }}"
TOKENS = {"bos_token": "<s>"}
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

Render = Callable[..., Awaitable[str]]


def rendering(test: Callable[[Render], Awaitable[None]]) -> None:
    renderer = BoundedRenderer(num_processes=1)

    async def render(source: str, tokens: Mapping[str, str] = TOKENS, **extra: Any) -> str:
        return await renderer.render(AdapterTemplate(source, tokens), MESSAGES, True, extra)

    async def run() -> None:
        await test(render)

    try:
        asyncio.run(run())
    finally:
        renderer.close()


def test_a_chat_is_rendered_as_with_a_models_own_template() -> None:
    async def test(render: Render) -> None:
        wanted = ChatTemplate(SOURCE, TOKENS).render(MESSAGES, True, {"extra": [1]})
        assert await render(SOURCE, extra=[1]) == wanted
        assert (await render(SOURCE, {"bos_token": "<b>"}, extra=0)).startswith("<b>")

    rendering(test)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ('a' * 2000000000) | length }}", "refused the messages"),
        ("{{ 'a' * 9000000 }}", "more than 8388608 characters"),
        ("{{ ''.__class__.__mro__ }}", "refused the messages"),
        ("{{ raise_exception('no') }}", "no"),
        ("{% for %}", "cannot be used"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot be used|too much"),
    ],
)
def test_a_template_that_goes_too_far_is_refused_and_the_next_chat_is_rendered(
    source: str, message: str
) -> None:
    async def test(render: Render) -> None:
        with pytest.raises(TemplateRefused, match=message):
            await render(source)
        assert await render("{{ messages[0].role }}") == "user"

    rendering(test)


def test_the_event_loop_goes_on_while_a_template_computes() -> None:
    async def test(render: Render) -> None:
        loop = asyncio.get_running_loop()
        late_s: list[float] = []
        task = asyncio.ensure_future(render(ENDLESS))
        while not task.done():
            before_s = loop.time()
            await asyncio.sleep(0.01)
            late_s.append(loop.time() - before_s)
        with pytest.raises(TemplateRefused, match="too much time or memory"):
            await task
        assert len(late_s) > 10  # it computed for two seconds meanwhile
        assert await render("fine") == "fine"

    rendering(test)


def test_a_process_that_does_not_answer_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_renderer, "PROGRAM", ("/bin/sleep", "60"))
    monkeypatch.setattr(bounded_renderer, "WALL_S", 0.3)

    async def test(render: Render) -> None:
        with pytest.raises(TemplateRefused, match="too much time"):
            await render(SOURCE)
        monkeypatch.undo()
        assert await render("fine") == "fine"

    rendering(test)


def test_the_process_is_given_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    process = bounded_renderer._RenderProcess()  # pyright: ignore[reportPrivateUsage]
    try:
        assert process.ask(b'{"source": 1}\n', 30.0) is not None  # it has started
        pid = process._process.pid  # pyright: ignore[reportPrivateUsage]
        with open(f"/proc/{pid}/environ", "rb") as file:
            names = {entry.partition(b"=")[0].decode() for entry in file.read().split(b"\0")}
    finally:
        process.end()
    assert "AWS_SECRET_ACCESS_KEY" in os.environ and "AWS_SECRET_ACCESS_KEY" not in names
