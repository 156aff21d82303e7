"""AdapterTemplates: adapters' own chat templates, for bases that have none."""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from adapter_store.chat_template import AdapterTemplate
from adapter_store.errors import SourceUnavailable
from adapter_store.names import AdapterRef
from deployments.ingress.http_errors import invalid
from deployments.ingress.model_resolver import Target
from deployments.text.answer_syntax import AnswerSyntax, syntax_of
from deployments.text.bounded_renderer import BoundedRenderer
from deployments.text.vocabulary import Vocabulary

KEPT = 128  # templates, or the knowledge that there is none
READ_S = 10.0  # for the store, which reads two small objects
NUM_READERS = 4


async def syntax_for(target: Target, own_template: "ChatRenderer | None") -> AnswerSyntax:
    """Find what answers look like: the base's template says it, or the adapter's own.

    One that comes with a request changes the prompt, not how the model has learned to answer.
    """
    if own_template is None or own_template.is_of_request:
        return target.model.syntax
    return await own_template.syntax(target.model.vocabulary, target.model.syntax)


class TemplateSource(Protocol):
    """The part of `adapter_store.store.AdapterStore` that is used here."""

    def chat_template(self, ref_or_digest: AdapterRef | str) -> AdapterTemplate | None: ...


@dataclass(slots=True)
class ChatRenderer:
    """Renders chats with one adapter's template."""

    template: AdapterTemplate
    renderer: BoundedRenderer
    is_of_request: bool = False
    _syntax: AnswerSyntax | None = None

    async def syntax(self, vocabulary: Vocabulary, base: AnswerSyntax) -> AnswerSyntax:
        """Find what answers look like with this template; the base says what is configured."""
        if self._syntax is None:
            probed = await self.renderer.probe(self._with_tokens(vocabulary.special_tokens))
            self._syntax = syntax_of(probed, vocabulary, *base.configured)
        return self._syntax

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        extra: Mapping[str, Any],
        base_tokens: Mapping[str, str],
    ) -> str:
        """Render a chat. The base's special tokens are used where the adapter names none.

        Raises TemplateRefused.
        """
        template = self._with_tokens(base_tokens)
        return await self.renderer.render(template, messages, add_generation_prompt, extra)

    def _with_tokens(self, base_tokens: Mapping[str, str]) -> AdapterTemplate:
        tokens = {**base_tokens, **self.template.special_tokens}
        return AdapterTemplate(self.template.source, tokens)


class AdapterTemplates:
    """Reads a template once per digest, off the event loop."""

    def __init__(self, store: TemplateSource, renderer: BoundedRenderer | None = None) -> None:
        self._store = store
        self._renderer = renderer or BoundedRenderer()
        self._threads = ThreadPoolExecutor(NUM_READERS, "template-reader")
        self._known: OrderedDict[str, asyncio.Future[ChatRenderer | None]] = OrderedDict()

    async def find(self, ref: AdapterRef) -> ChatRenderer | None:
        """Look up an adapter's template; None if it has none.

        Of adapters that are combined, all that have one must have the same. Raises ApiError,
        AdapterStoreError.
        """
        if ref.recipe is None:
            return await self._find(ref.digest, ref)
        found = [await self._find(digest, digest) for digest in ref.recipe.members]
        known = [renderer for renderer in found if renderer is not None]
        if any(renderer.template != known[0].template for renderer in known):
            raise invalid("The adapters have different chat templates: use /v1/completions.")
        return known[0] if known else None

    async def _find(self, digest: str, ref_or_digest: AdapterRef | str) -> ChatRenderer | None:
        known = self._known.get(digest)
        if known is None:
            loop = asyncio.get_running_loop()
            known = loop.run_in_executor(self._threads, self._read, ref_or_digest)
            self._known[digest] = known
        self._known.move_to_end(digest)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        try:
            async with asyncio.timeout(READ_S):
                return await asyncio.shield(known)
        except TimeoutError:
            raise SourceUnavailable(f"the template of {digest} is not read yet") from None
        except Exception:
            self._known.pop(digest, None)
            raise

    def _read(self, ref_or_digest: AdapterRef | str) -> ChatRenderer | None:
        template = self._store.chat_template(ref_or_digest)
        return None if template is None else ChatRenderer(template, self._renderer)

    def of_source(self, source: str) -> ChatRenderer:
        """Render with a template that a request brings."""
        return ChatRenderer(AdapterTemplate(source, {}), self._renderer, is_of_request=True)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._renderer.close()
