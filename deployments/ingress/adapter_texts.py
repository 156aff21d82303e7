"""AdapterTexts: reads what adapters bring beside their weights, off the event loop."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol
from weakref import WeakValueDictionary

from adapter_store.chat_template import AdapterTemplate
from adapter_store.errors import SourceUnavailable
from adapter_store.names import AdapterRef
from adapter_store.own_files import NO_OWN_FILES, OwnFiles
from adapter_store.own_tokenizer import OwnTokenizer
from adapter_store.tokenizer_file import TokenizerRefused
from deployments.ingress.http_errors import invalid
from deployments.ingress.model_resolver import ServedModel, Target
from deployments.ingress.own_text import NOTHING_OWN, ChatRenderer, OwnText
from deployments.ingress.tool_format_rules import tool_format_of
from deployments.text.bounded_renderer import BoundedRenderer
from deployments.text.vocabulary import Vocabulary

KEPT = 128  # adapters with what they bring, and so vocabularies: requests hold a few more
READ_S = 10.0  # for the store, which reads a few small objects, and for making a vocabulary of them
NUM_READERS = 4

Key = tuple[str, str, str | None]  # a base model, a digest and a tool format


class OwnFileSource(Protocol):
    """The part of `adapter_store.store.AdapterStore` that is used here."""

    def is_bare(self, ref_or_digest: AdapterRef | str) -> bool: ...
    def own_files(self, ref_or_digest: AdapterRef | str) -> OwnFiles: ...


class AdapterTexts:
    def __init__(self, store: OwnFileSource, renderer: BoundedRenderer | None = None) -> None:
        self._store = store
        self._renderer = renderer or BoundedRenderer()
        self._threads = ThreadPoolExecutor(NUM_READERS, "own-files")
        self._builder = ThreadPoolExecutor(1, "own-vocabulary")
        self._known: OrderedDict[Key, asyncio.Future[OwnText]] = OrderedDict()
        # Those in use, by base and content, so that adapters share them
        self._vocabularies: WeakValueDictionary[tuple[str, bytes], Vocabulary] = (
            WeakValueDictionary()
        )

    async def equip(self, target: Target) -> Target:
        """Add what the target's adapter brings. Raises ApiError, AdapterStoreError.

        Of adapters that are combined, all must have the same tokenizer.
        """
        ref = target.adapter_ref
        if ref is None:
            return target
        if ref.recipe is not None:
            members = [await self._find(target.model, each, None) for each in ref.recipe.members]
            return replace(target, own=_combined(members))
        own = await self._find(target.model, ref, tool_format_of(ref, target.model.tool_formats))
        return target if own is NOTHING_OWN else replace(target, own=own)

    def of_source(self, source: str) -> ChatRenderer:
        """Render with a template that a request brings."""
        return ChatRenderer(AdapterTemplate(source, {}), self._renderer)

    def close(self) -> None:
        for threads in (self._threads, self._builder):
            threads.shutdown(wait=False, cancel_futures=True)
        self._renderer.close()

    async def _find(
        self, model: ServedModel, ref_or_digest: AdapterRef | str, tool_format: str | None
    ) -> OwnText:
        if tool_format is None and self._store.is_bare(ref_or_digest):
            return NOTHING_OWN
        digest = ref_or_digest if isinstance(ref_or_digest, str) else ref_or_digest.digest
        key = (model.id, digest, tool_format)
        known = self._known.get(key)
        if known is None:
            known = asyncio.ensure_future(self._load(model, ref_or_digest, tool_format))
            known.add_done_callback(_see)  # also where all that waited have gone
            self._known[key] = known
        self._known.move_to_end(key)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        try:
            async with asyncio.timeout(READ_S):
                return await asyncio.shield(known)
        except TimeoutError:
            raise SourceUnavailable(f"the files of {digest} are not read yet") from None
        except Exception:
            if self._known.get(key) is known:
                del self._known[key]
            raise

    async def _load(
        self, model: ServedModel, ref_or_digest: AdapterRef | str, tool_format: str | None
    ) -> OwnText:
        loop = asyncio.get_running_loop()
        files = await loop.run_in_executor(self._threads, self._store.own_files, ref_or_digest)
        if files == NO_OWN_FILES:
            return OwnText(tool_format=tool_format)
        return await loop.run_in_executor(self._builder, self._build, model, files, tool_format)

    # ---- in the builder's thread ---------------------------------------------------------

    def _build(self, model: ServedModel, files: OwnFiles, tool_format: str | None) -> OwnText:
        found, base = self._vocabulary(model, files.tokenizer), model.vocabulary
        template = _own_template(files, found or base, base)
        return OwnText(
            found,
            () if template is None else (ChatRenderer(template, self._renderer),),
            files.generation,
            tool_format,
            found is None or found.extends(base),
        )

    def _vocabulary(self, model: ServedModel, tokenizer: OwnTokenizer | None) -> Vocabulary | None:
        """Make an adapter's vocabulary, or find that of another one with the same tokenizer."""
        if tokenizer is None:
            return None
        key = (model.id, hashlib.sha256(tokenizer.to_json()).digest())
        found = self._vocabularies.get(key)
        if found is None:
            try:
                found = model.vocabulary.with_own(tokenizer)
            except (TokenizerRefused, OSError) as error:
                message = f"The adapter's tokenizer cannot be used: {error}."
                raise invalid(message, "model") from None
            self._vocabularies[key] = found
        return found


def _see(done: asyncio.Future[OwnText]) -> None:
    if not done.cancelled():
        done.exception()


def _own_template(
    files: OwnFiles, vocabulary: Vocabulary, base: Vocabulary
) -> AdapterTemplate | None:
    """Leave out a template that renders as the base's own does, which needs no other process."""
    template = files.template
    if template is None or template.source != base.template_source:
        return template
    named = {n: t for n, t in template.special_tokens.items() if n in template.source}
    is_same = all(vocabulary.special_tokens.get(name) == text for name, text in named.items())
    return None if is_same else template


def _combined(members: Sequence[OwnText]) -> OwnText:
    """Put together what the members of a set bring. Settings count if all have the same."""
    first = members[0]
    if any(member.vocabulary is not first.vocabulary for member in members):
        raise invalid("The adapters have different tokenizers: they cannot be combined.", "model")
    templates = list[ChatRenderer]()
    for member in members:
        if member.templates and member.templates[0].template not in [t.template for t in templates]:
            templates.append(member.templates[0])
    is_same = all(member.generation == first.generation for member in members)
    return OwnText(
        first.vocabulary,
        templates,
        first.generation if is_same else None,
        extends_base=first.extends_base,
    )
