"""Models: from a model name in a request to the engine and the adapter that serve it.

A name that nothing has is 404; it never means the base. Asks the adapter store off the event
loop, because the store reads objects.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from adapter_store.errors import AdapterNotFound, AdapterStoreError, InvalidName
from adapter_store.names import AdapterRecord, AdapterRef
from deployments.errors import model_not_found, unavailable
from deployments.link import EngineLink
from deployments.names import parse_model_name
from deployments.text import Vocabulary

OPEN_TENANT = "public"  # everybody, where there are no keys


class Registry(Protocol):
    """The part of `adapter_store.store.AdapterStore` that an ingress uses."""

    def resolve(self, tenant: str, full_name: str, base: str | None = None) -> AdapterRef: ...
    def list(self, tenant: str | None = None) -> Sequence[AdapterRecord]: ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One base model: its id, its text side and its engine."""

    id: str
    vocabulary: Vocabulary
    link: EngineLink


@dataclass(frozen=True, slots=True)
class Target:
    """What a model name turned out to be."""

    model: ServedModel
    adapter: AdapterRef | None

    @property
    def label(self) -> str:
        """For metrics: bounded by what exists, whatever spellings clients use."""
        ref = self.adapter
        return self.model.id if ref is None else f"{ref.tenant}/{ref.name}@{ref.version}"


class Models:
    """All that this ingress serves."""

    def __init__(self, models: Sequence[ServedModel], registry: Registry) -> None:
        self.by_id = {model.id: model for model in models}
        self._registry = registry

    @property
    def is_ready(self) -> bool:
        return all(model.link.hello is not None for model in self.by_id.values())

    async def resolve(self, text: str) -> Target:
        """Raises ApiError."""
        name = parse_model_name(text, list(self.by_id))
        if name is None:
            raise model_not_found(text)
        if name.adapter is None:
            assert name.base is not None, "a name is a base, an adapter or both"
            return Target(self.by_id[name.base], None)
        if name.tenant not in (None, OPEN_TENANT):
            raise model_not_found(text)
        base = None if name.base is None else self._fingerprint(self.by_id[name.base])
        ref = await self._find(text, name.adapter, base)
        return Target(self._model_of(text, ref), ref)

    async def list_adapters(self) -> Sequence[AdapterRecord]:
        """The newest live version of each adapter that fits a served base, by name."""
        try:
            records = await asyncio.to_thread(self._registry.list, OPEN_TENANT)
        except AdapterStoreError as error:
            raise unavailable(f"The adapter store cannot be read now: {error}") from error
        newest = {record.name: record for record in records if self.base_id(record.base)}
        return list(newest.values())

    def base_id(self, fingerprint: str) -> str | None:
        for model in self.by_id.values():
            hello = model.link.hello
            if hello is not None and hello.base_fingerprint == fingerprint:
                return model.id
        return None

    async def _find(self, text: str, adapter: str, base: str | None) -> AdapterRef:
        try:
            return await asyncio.to_thread(self._registry.resolve, OPEN_TENANT, adapter, base)
        except (AdapterNotFound, InvalidName):
            raise model_not_found(text) from None
        except AdapterStoreError as error:
            raise unavailable(f"The adapter store cannot be read now: {error}") from error

    def _model_of(self, text: str, ref: AdapterRef) -> ServedModel:
        base_id = self.base_id(ref.base)
        if base_id is not None:
            return self.by_id[base_id]
        if not self.is_ready:
            raise unavailable("The model is not ready: it is being loaded or restarted.")
        raise model_not_found(text)

    def _fingerprint(self, model: ServedModel) -> str:
        if model.link.hello is None:
            raise model.link.unavailable()
        return model.link.hello.base_fingerprint
