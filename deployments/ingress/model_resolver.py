"""Models: resolve a model name in a tenant's request to the engine and adapter that serve it.

A name that the tenant has no access to is 404, exactly like one that nothing has, and never
means the base. The adapter store is asked off the event loop, because it may read objects.

One name may mean several adapters. Without a namespace it is the tenant's own adapter of that
name if there is a live one, whatever its versions and bases, and else the public one. A name
without version or alias that was published for several bases means the newest of the base that
comes first in the configuration; the others are `<base>:<name>`. So a withdrawn version never
turns into another tenant's, and publishing for one more base changes no answer of earlier ones.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from adapter_store.errors import AdapterNotFound, AdapterStoreError, InvalidName
from adapter_store.names import AdapterRecord, AdapterRef
from deployments.fleet.engine_link import EngineLink
from deployments.ingress.http_errors import (
    ApiError,
    model_not_found,
    models_not_ready,
    unavailable,
)
from deployments.ingress.model_names import parse_model_name
from deployments.tenants.tenant import Tenant
from deployments.text.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

Resolve = Callable[[Sequence[tuple[str, str | None]], str], AdapterRef | None]


class AdapterNames(Protocol):
    """The part of `adapter_store.store.AdapterStore` that an ingress uses."""

    def resolve_first(
        self, places: Sequence[tuple[str, str | None]], full_name: str
    ) -> AdapterRef: ...
    def resolve_known(
        self, places: Sequence[tuple[str, str | None]], full_name: str
    ) -> AdapterRef | None: ...
    def list(self, tenant: str | None = None) -> Sequence[AdapterRecord]: ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One base model: its id, its vocabulary and its engine.

    `max_answers` is how many answers all its replicas together may run or queue.
    """

    id: str
    vocabulary: Vocabulary
    link: EngineLink
    max_answers: int


@dataclass(frozen=True, slots=True)
class Target:
    """What a model name means to a tenant."""

    model: ServedModel
    adapter_ref: AdapterRef | None
    tenant: str

    @property
    def label(self) -> str:
        """The name in metrics. There are as many as versions exist, however clients spell them."""
        ref = self.adapter_ref
        return self.model.id if ref is None else f"{ref.tenant}/{ref.name}@{ref.version}"


@dataclass(frozen=True, slots=True)
class ListedAdapter:
    """`id` is the shortest name by which the tenant gets this very version."""

    id: str
    parent: str
    record: AdapterRecord


class Models:
    """The base models that this ingress serves, and their adapters."""

    def __init__(self, models: Sequence[ServedModel], adapter_names: AdapterNames) -> None:
        self.by_id = {model.id: model for model in models}
        self._adapter_names = adapter_names
        self._known_bases: dict[str, str] = {}  # fingerprints by model id, as of the last Hello

    @property
    def not_ready(self) -> list[str]:
        return [model.id for model in self.by_id.values() if model.link.hello is None]

    # ---- one name ------------------------------------------------------------------------

    async def resolve(self, tenant: Tenant, text: str) -> Target:
        """Find what the tenant means by a name. Raises ApiError."""
        name = parse_model_name(text, list(self.by_id))
        if name is None:
            raise model_not_found(text)
        if name.adapter_name is None:
            assert name.base is not None, "a name is a base, an adapter or both"
            return Target(self.by_id[name.base], None, tenant.name)
        if name.tenant is not None and name.tenant not in tenant.namespaces:
            raise model_not_found(text)  # without a look: what is there makes no difference
        namespaces = tenant.default_namespaces if name.tenant is None else (name.tenant,)
        bases = self._fingerprints(list(self.by_id) if name.base is None else [name.base])
        try:
            # A thread costs more than all the rest: it is used only if objects may have to be read.
            ref = self._find(
                self._adapter_names.resolve_known, namespaces, name.adapter_name, bases
            )
            if ref is None:
                find = self._adapter_names.resolve_first
                ref = await asyncio.to_thread(
                    self._find, find, namespaces, name.adapter_name, bases
                )
            assert ref is not None, "resolve_first raises where it finds nothing"
        except (AdapterNotFound, InvalidName):
            raise model_not_found(text) from None
        except AdapterStoreError as error:
            raise _store_unavailable(error) from error
        return Target(self._model_of(text, ref, bases), ref, tenant.name)

    def _find(
        self,
        resolve: Resolve,
        namespaces: Sequence[str],
        adapter_name: str,
        bases: Mapping[str, str | None],
    ) -> AdapterRef | None:
        """Take the first namespace that has the name, and the first base that has the version."""
        namespace = namespaces[0]
        if len(namespaces) > 1:
            bare_name = adapter_name.partition("@")[0]
            found = resolve([(candidate, None) for candidate in namespaces], bare_name)
            if found is None:
                return None
            namespace = found.tenant
        # Without all fingerprints: is there anything at all?
        wanted = [None] if None in bases.values() else list(bases.values())
        return resolve([(namespace, base) for base in wanted], adapter_name)

    def _model_of(self, text: str, ref: AdapterRef, bases: Mapping[str, str | None]) -> ServedModel:
        """Choose the base model. 503 while one that has not started yet might change the answer."""
        fitting = [model_id for model_id, base in bases.items() if base == ref.base]
        waiting = [model_id for model_id, base in bases.items() if base is None]
        if fitting and (not waiting or "@" in text):
            return self.by_id[fitting[0]]
        if waiting:
            raise models_not_ready(waiting)
        raise model_not_found(text)

    def _fingerprints(self, model_ids: Sequence[str]) -> dict[str, str | None]:
        """Map model ids to base fingerprints, the last known ones; None before the first start."""
        for model in self.by_id.values():
            if model.link.hello is not None:
                self._known_bases[model.id] = model.link.hello.base_fingerprint
        return {model_id: self._known_bases.get(model_id) for model_id in model_ids}

    # ---- all names -----------------------------------------------------------------------

    async def list_adapters(self, tenant: Tenant) -> Sequence[ListedAdapter]:
        """List the newest live versions that a tenant may use, one per adapter and started base."""
        taken = set(self.by_id)  # spellings that mean something else already
        hidden: set[str] = set()  # names that mean an adapter of an earlier namespace
        listed: list[ListedAdapter] = []
        for namespace in tenant.namespaces:
            records = await self._records(namespace)
            is_default = namespace in tenant.default_namespaces
            for parent, record in self._served(records):
                spellings = _spellings(record, parent, is_default and record.name not in hidden)
                shortest = next(each for each in spellings if each not in taken)
                listed.append(ListedAdapter(shortest, parent, record))
                taken.update(spellings)
            hidden |= {record.name for record in records}
        return listed

    async def published_s(self, ref: AdapterRef) -> float:
        """Look up when a resolved version was published. Raises ApiError."""
        for record in await self._records(ref.tenant):
            if (record.name, record.version) == (ref.name, ref.version):
                return record.published_s
        raise model_not_found(ref.name)  # retired a moment ago

    async def _records(self, namespace: str) -> Sequence[AdapterRecord]:
        try:
            return await asyncio.to_thread(self._adapter_names.list, namespace)
        except AdapterStoreError as error:
            raise _store_unavailable(error) from error

    def _served(self, records: Sequence[AdapterRecord]) -> Iterator[tuple[str, AdapterRecord]]:
        """Pair model ids and newest versions, by name and then in the order of the bases."""
        newest: dict[str, dict[str, AdapterRecord]] = {}
        for record in records:
            newest.setdefault(record.name, {})[record.base] = record
        for of_name in newest.values():
            for model_id, base in self._fingerprints(list(self.by_id)).items():
                record = None if base is None else of_name.pop(base, None)
                if record is not None:
                    yield model_id, record


def _store_unavailable(error: AdapterStoreError) -> ApiError:
    """Make the answer; where the store is, and what is wrong with it, is for the log alone."""
    logger.error("the adapter store cannot be read: %s", error)
    return unavailable("The adapter store cannot be read now. Retry soon.")


def _spellings(record: AdapterRecord, parent: str, is_bare: bool) -> list[str]:
    """List the names of this adapter (or of one of an earlier base), short ones first."""
    full = f"{record.tenant}/{record.name}"
    if is_bare:
        return [record.name, full, f"{parent}:{record.name}", f"{parent}:{full}"]
    return [full, f"{parent}:{full}"]
