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
from deployments.text.bounded_renderer import BoundedRenderer

KEPT = 128  # templates, or the knowledge that there is none
READ_S = 10.0  # for the store, which reads two small objects
NUM_READERS = 4


class TemplateSource(Protocol):
    """The part of `adapter_store.store.AdapterStore` that is used here."""

    def chat_template(self, ref_or_digest: AdapterRef | str) -> AdapterTemplate | None: ...


@dataclass(frozen=True, slots=True)
class ChatRenderer:
    """Renders chats with one adapter's template."""

    template: AdapterTemplate
    renderer: BoundedRenderer

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
        tokens = {**base_tokens, **self.template.special_tokens}
        template = AdapterTemplate(self.template.source, tokens)
        return await self.renderer.render(template, messages, add_generation_prompt, extra)


class AdapterTemplates:
    """Reads a template once per digest, off the event loop."""

    def __init__(self, store: TemplateSource, renderer: BoundedRenderer | None = None) -> None:
        self._store = store
        self._renderer = renderer or BoundedRenderer()
        self._threads = ThreadPoolExecutor(NUM_READERS, "template-reader")
        self._known: OrderedDict[str, asyncio.Future[AdapterTemplate | None]] = OrderedDict()

    async def find(self, ref: AdapterRef) -> ChatRenderer | None:
        """Look up an adapter's template; None if it has none.

        Of adapters that are combined, all that have one must have the same. Raises ApiError,
        AdapterStoreError.
        """
        if ref.recipe is None:
            template = await self._find(ref.digest, ref)
        else:
            found = [await self._find(digest, digest) for digest in ref.recipe.members]
            known = [template for template in found if template is not None]
            if any(template != known[0] for template in known):
                raise invalid("The adapters have different chat templates: use /v1/completions.")
            template = known[0] if known else None
        return None if template is None else ChatRenderer(template, self._renderer)

    async def _find(self, digest: str, ref_or_digest: AdapterRef | str) -> AdapterTemplate | None:
        known = self._known.get(digest)
        if known is None:
            loop = asyncio.get_running_loop()
            read = self._store.chat_template
            known = loop.run_in_executor(self._threads, read, ref_or_digest)
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

    def of_source(self, source: str) -> ChatRenderer:
        """Render with a template that a request brings."""
        return ChatRenderer(AdapterTemplate(source, {}), self._renderer)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._renderer.close()
