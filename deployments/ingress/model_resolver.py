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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol, cast

from adapter_store.errors import AdapterInvalid, AdapterNotFound, AdapterStoreError, InvalidName
from adapter_store.names import AdapterRecord, AdapterRef
from adapter_store.plain_origin import PLAIN_NAMESPACE, UNVERSIONED
from adapter_store.recipes import MAX_MEMBERS, make_recipe
from deployments.fleet.engine_link import EngineLink
from deployments.fleet.held_requests import ModelNotReady
from deployments.ingress.base_paths import name_within
from deployments.ingress.http_errors import (
    ApiError,
    invalid,
    model_not_found,
    models_not_ready,
    store_unavailable,
)
from deployments.ingress.model_names import AdapterSet, parse_adapter_set, parse_model_name
from deployments.ingress.own_text import NOTHING_OWN, OwnText
from deployments.ingress.rollouts import Arm, Rollouts
from deployments.ingress.tool_format_rules import ToolFormatRule
from deployments.tenants.tenant import Tenant
from deployments.text.answer_syntax import PLAIN, AnswerSyntax
from deployments.text.embedding_use import NO_EMBEDDINGS, EmbeddingUse
from deployments.text.vocabulary import Vocabulary
from engine.messages import EngineInfo
from engine.scheduler.request import NO_DEFAULTS, SamplingDefaults

MAX_LISTED = 1000
VERSION_HEADER = "x-reef-version"  # of answers by adapters
COMBINED = "combined"  # no adapter's label: theirs have a slash
NAMES_AT_ONCE = 100

Resolve = Callable[[Sequence[tuple[str, str | None]], str], AdapterRef | None]


class AdapterNames(Protocol):
    """The part of `adapter_store.store.AdapterStore` that an ingress uses."""

    def resolve_first(
        self, places: Sequence[tuple[str, str | None]], full_name: str
    ) -> AdapterRef: ...
    def resolve_known(
        self, places: Sequence[tuple[str, str | None]], full_name: str
    ) -> AdapterRef | None: ...
    def list_from(
        self, tenant: str, first_name: str, num_names: int
    ) -> Sequence[AdapterRecord]: ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One base model: its id, its vocabulary and its engine.

    `max_answers` is how many answers all its replicas together may run or queue, and `max_adapters`
    how many adapters may be in their batches.
    """

    id: str
    vocabulary: Vocabulary
    link: EngineLink
    max_answers: int
    syntax: AnswerSyntax = PLAIN
    embeddings: EmbeddingUse = NO_EMBEDDINGS
    max_adapters: int = 0
    has_sampling_defaults: bool = True  # whether generation_config.json's are used
    tool_formats: Sequence[ToolFormatRule] = ()  # of adapters; the first that fits counts
    folder: Path | None = None  # of its weights, for conversions of adapters

    @property
    def outage(self) -> str | None:
        """Why it cannot answer now; None if it can."""
        return self.link.outage


@dataclass(frozen=True, slots=True)
class Target:
    """What a model name means to a tenant."""

    model: ServedModel
    adapter_ref: AdapterRef | None
    tenant: str
    weight: float = 1.0  # the tenant's
    own: OwnText = NOTHING_OWN  # what the adapter brings beside its weights, once it is read
    held_s: float = 0.0  # that the request has waited for the model's first replica
    arm: Arm | None = None  # where its answer is counted, if an alias names the adapter
    shares_name: bool = False  # with other versions: the answer says which one it was

    @property
    def headers(self) -> dict[str, str]:
        """List the headers that name the version that answers."""
        ref = self.adapter_ref
        return {} if ref is None or ref.recipe is not None else {VERSION_HEADER: self.label}

    def answered_name(self, asked: str) -> str:
        """Return what the answer calls the model: the version, where the name means several."""
        if not self.shares_name or self.adapter_ref is None:
            return asked
        return f"{asked.rpartition('@')[0]}@{self.adapter_ref.version}"

    @property
    def vocabulary(self) -> Vocabulary:
        """The adapter's own, or else the base's."""
        return self.own.vocabulary or self.model.vocabulary

    @property
    def vocab_size(self) -> int:
        """The number of token ids, of which the adapter may have more than its base, or fewer.

        Raises ModelNotReady.
        """
        own = 0 if self.adapter_ref is None else self.adapter_ref.vocab_size
        return own or self.engine.vocab_size

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        """What holds for parameters that a request leaves out. Raises ModelNotReady."""
        generation = self.own.generation
        if generation is None:
            return self.engine.sampling_defaults
        if not self.model.has_sampling_defaults:
            return NO_DEFAULTS
        return SamplingDefaults(**cast(Any, generation.sampling))

    @property
    def own_end_tokens(self) -> tuple[int, ...] | None:
        """The adapter's own end tokens; None if they are the base's. Raises ModelNotReady.

        As if its files lay in the base's folder: what its generation_config.json does not name is
        the base's, and its tokenizer's end token counts in place of the base's.
        """
        own, base, generation = self.own, self.model.vocabulary, self.own.generation
        named = None if generation is None else generation.eos_token_ids
        if named is None and own.vocabulary is None:
            return None
        if named is None:
            theirs = self.engine.named_eos_token_ids
            named = tuple(i for i in theirs if self.vocabulary.token(i) == base.token(i))
        end = self.vocabulary.end_token_id
        return tuple(dict.fromkeys((*named, *(() if end is None else (end,)))))

    async def syntax(self) -> AnswerSyntax:
        """Find what answers look like. A template that a request brings changes nothing in that."""
        return await self.own.syntax(self.model.syntax, self.model.vocabulary)

    @property
    def engine(self) -> EngineInfo:
        """The facts about the model's engine. Raises ModelNotReady before its first start."""
        hello = self.model.link.hello
        if hello is None:
            raise ModelNotReady
        return hello.engine

    @property
    def label(self) -> str:
        """The name in metrics. There are as many as versions exist, however clients spell them.

        All combinations of adapters share one, because clients may make any number of them.
        """
        ref = self.adapter_ref
        if ref is not None and ref.recipe is not None:
            return f"{self.model.id}:{COMBINED}"
        return self.model.id if ref is None else f"{ref.tenant}/{ref.name}@{ref.version}"


@dataclass(frozen=True, slots=True)
class ListedAdapter:
    """`id` is the shortest name by which the tenant gets this very version."""

    id: str
    parent: str
    record: AdapterRecord


class Models:
    """The base models that this ingress serves, and their adapters."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        adapter_names: AdapterNames,
        rollouts: Rollouts | None = None,
    ) -> None:
        self.by_id = {model.id: model for model in models}
        self._adapter_names = adapter_names
        self._rollouts = rollouts
        self._known_bases: dict[str, str] = {}  # fingerprints by model id, as of the last Hello

    @property
    def outages(self) -> dict[str, str]:
        """Say of each model that cannot answer now why not."""
        models = self.by_id.values()
        return {model.id: model.outage for model in models if model.outage is not None}

    @property
    def asleep(self) -> list[str]:
        """List the models that the next request will start."""
        return [model.id for model in self.by_id.values() if model.link.is_asleep]

    # ---- one name ------------------------------------------------------------------------

    async def resolve(self, tenant: Tenant, text: str, session: str = "") -> Target:
        """Find what the tenant means by a name. Raises ApiError.

        Where versions share an alias, one session gets the same one; without it is the heaviest.
        """
        name = parse_model_name(text, list(self.by_id))
        if name is None:
            wanted = parse_adapter_set(text, list(self.by_id))
            if wanted is None:
                raise model_not_found(text)
            return await self.resolve_set(tenant, wanted)
        if name.adapter_name is None:
            assert name.base is not None, "a name is a base, an adapter or both"
            return Target(self.by_id[name.base], None, tenant.name, tenant.weight)
        if name.tenant is not None and name.tenant not in tenant.namespaces:
            raise model_not_found(text)  # without a look: what is there makes no difference
        namespaces = tenant.default_namespaces if name.tenant is None else (name.tenant,)
        model_ids = list(self.by_id) if name.base is None else [name.base]
        held_s = await self._have_run(model_ids)
        bases = self._fingerprints(model_ids)
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
            raise store_unavailable(error) from error
        model = self._model_of(text, ref, bases)
        target = Target(model, ref, tenant.name, tenant.weight, held_s=held_s)
        if self._rollouts is None:
            return target
        chosen = self._rollouts.choose(model.link, ref, name.adapter_name, session)
        return replace(
            target, adapter_ref=chosen.ref, arm=chosen.arm, shares_name=chosen.shares_name
        )

    async def resolve_set(self, tenant: Tenant, wanted: AdapterSet) -> Target:
        """Find the members of a set, all of one base: an adapter of their own. Raises ApiError."""
        if wanted.base is not None and wanted.base not in self.by_id:
            raise invalid(
                f"model must be a base model beside a list of adapters, not {wanted.base[:200]!r}.",
                "model",
            )
        if len(wanted.members) > MAX_MEMBERS:
            raise invalid(
                f"A set has at most {MAX_MEMBERS} adapters, not {len(wanted.members)}.", "model"
            )
        base, refs, held_s = wanted.base, list[AdapterRef](), 0.0
        for name, _ in wanted.members:
            member = await self._member(tenant, name, base)
            assert member.adapter_ref is not None
            refs.append(member.adapter_ref)
            base, held_s = member.model.id, held_s + member.held_s
        assert base is not None, "a set has members"
        weights = [weight for _, weight in wanted.members]
        digests = [ref.digest for ref in refs]
        try:
            recipe = make_recipe(
                digests, weights, wanted.method, wanted.density, wanted.majority_sign
            )
        except AdapterInvalid as error:
            raise invalid(f"The adapters cannot be combined: {error}.", "model") from None
        fingerprint = refs[0].base
        digest = recipe.digest(fingerprint)
        rank = sum(ref.lora_rank for ref in refs)
        ref = AdapterRef(tenant.name, wanted.text, 0, digest, fingerprint, recipe, lora_rank=rank)
        return Target(self.by_id[base], ref, tenant.name, tenant.weight, held_s=held_s)

    async def _member(self, tenant: Tenant, name: str, base: str | None) -> Target:
        """Find one adapter of a set. Errors call it as the client does."""
        try:
            member = await self.resolve(tenant, name_within(base, name))
        except ApiError as error:
            raise (model_not_found(name) if error.status == 404 else error) from None
        ref = member.adapter_ref
        if ref is None or ref.recipe is not None:
            raise invalid(f"{name[:200]!r} is not one adapter: it cannot be in a set.", "model")
        if ref.tenant == PLAIN_NAMESPACE and ref.version == UNVERSIONED:
            message = f"{name[:200]!r} lies in a plain folder: publish it to combine it."
            raise invalid(message, "model")
        return member

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

    async def _have_run(self, model_ids: Sequence[str]) -> float:
        """Start the models that have not been heard of yet, if that is left to requests.

        Which adapters are theirs is known only then. Returns the seconds that it took. Raises
        ModelNotReady.
        """
        bases = self._fingerprints(model_ids)
        unknown = [self.by_id[model_id] for model_id, base in bases.items() if base is None]
        return max(await asyncio.gather(*(model.link.ready() for model in unknown)), default=0.0)

    def _fingerprints(self, model_ids: Sequence[str]) -> dict[str, str | None]:
        """Map model ids to base fingerprints, the last known ones; None before the first start."""
        for model in self.by_id.values():
            if model.link.hello is not None:
                self._known_bases[model.id] = model.link.hello.base_fingerprint
        return {model_id: self._known_bases.get(model_id) for model_id in model_ids}

    # ---- all names -----------------------------------------------------------------------

    async def list_adapters(
        self,
        tenant: Tenant,
        after: str | None = None,
        limit: int = MAX_LISTED,
        base: str | None = None,
    ) -> Sequence[ListedAdapter]:
        """List the newest live versions that a tenant may use, one per adapter and started base.

        At most `limit` of them, from the one on that follows the id `after`; with a base those of
        it alone. Raises ApiError.
        """
        try:
            return await asyncio.to_thread(self._list, tenant, after, limit, base)
        except AdapterStoreError as error:
            raise store_unavailable(error) from error

    async def record_of(self, ref: AdapterRef) -> AdapterRecord:
        """Look up what listings show of a resolved version. Raises ApiError."""
        try:
            records = await asyncio.to_thread(
                self._adapter_names.list_from, ref.tenant, ref.name, 1
            )
        except AdapterStoreError as error:
            raise store_unavailable(error) from error
        for record in records:
            if (record.name, record.version) == (ref.name, ref.version):
                return record
        raise model_not_found(ref.name)  # retired a moment ago

    def _list(
        self, tenant: Tenant, after: str | None, limit: int, base: str | None
    ) -> Sequence[ListedAdapter]:
        namespaces = tenant.namespaces
        first_name = ""
        if after is not None:
            namespace, first_name = self._place_of(tenant, after)
            namespaces = namespaces[namespaces.index(namespace) :]
        found = self._walk(tenant, namespaces, first_name)
        if after is not None:
            found = _behind(found, namespaces[0], first_name, after)
        wanted = (listed for listed in found if base in (None, listed.parent))
        return list(islice(wanted, limit))

    def _place_of(self, tenant: Tenant, listed_id: str) -> tuple[str, str]:
        """Find the namespace and name of an id that was listed, also of one retired since."""
        parsed = parse_model_name(listed_id, list(self.by_id))
        if parsed is None or parsed.adapter_name is None:
            raise invalid(f"after: no model has the id {listed_id[:200]!r}", "after")
        name = parsed.adapter_name
        if parsed.tenant is None:
            owners = (each for each in tenant.default_namespaces if self._has(each, name))
            return next(owners, tenant.default_namespaces[0]), name
        if parsed.tenant not in tenant.namespaces:
            raise invalid(f"after: no model has the id {listed_id[:200]!r}", "after")
        return parsed.tenant, name

    def _walk(
        self, tenant: Tenant, namespaces: Sequence[str], first_name: str
    ) -> Iterator[ListedAdapter]:
        for namespace in namespaces:
            earlier = tenant.namespaces[: tenant.namespaces.index(namespace)]
            is_default = namespace in tenant.default_namespaces
            for name, records in self._by_name(namespace, first_name):
                is_bare = is_default and not any(self._has(each, name) for each in earlier)
                yield from self._listed(records, is_bare)
            first_name = ""

    def _by_name(
        self, namespace: str, first_name: str
    ) -> Iterator[tuple[str, list[AdapterRecord]]]:
        """Walk through a namespace, and read no more of it than is taken."""
        while True:
            records = self._adapter_names.list_from(namespace, first_name, NAMES_AT_ONCE)
            name = ""
            for name, of_name in groupby(records, lambda record: record.name):
                yield name, list(of_name)
            if not records:
                return
            first_name = f"{name}\0"  # the next possible one

    def _has(self, namespace: str, name: str) -> bool:
        found = self._adapter_names.list_from(namespace, name, 1)
        return bool(found) and found[0].name == name

    def _listed(self, records: Sequence[AdapterRecord], is_bare: bool) -> Iterator[ListedAdapter]:
        """Name the versions of one adapter."""
        taken = set(self.by_id)  # spellings that mean something else already
        for parent, record in self._served(records):
            spellings = _spellings(record, parent, is_bare)
            shortest = next(each for each in spellings if each not in taken)
            yield ListedAdapter(shortest, parent, record)
            taken.update(spellings)

    def _served(self, records: Sequence[AdapterRecord]) -> Iterator[tuple[str, AdapterRecord]]:
        """Pair model ids and newest versions, by name and then in the order of the bases."""
        newest: dict[str, dict[str, AdapterRecord]] = {}
        for record in records:
            newest.setdefault(record.name, {})[record.base] = record
        for of_name in newest.values():
            for model_id, base in self._fingerprints(list(self.by_id)).items():
                # One without a base is of the first that runs, as its bare name is.
                record = None if base is None else of_name.pop(base, of_name.pop("", None))
                if record is not None:
                    yield model_id, record


def _behind(
    found: Iterator[ListedAdapter], namespace: str, name: str, after: str
) -> Iterator[ListedAdapter]:
    """Skip this adapter as far as the id, or all of it if the id is not there any more."""
    skipped: list[ListedAdapter] = []
    for listed in found:
        if (listed.record.tenant, listed.record.name) != (namespace, name):
            yield listed
            break
        skipped.append(listed)
        if listed.id == after:
            break
    yield from found


def _spellings(record: AdapterRecord, parent: str, is_bare: bool) -> list[str]:
    """List the names of this adapter (or of one of an earlier base), short ones first."""
    full = f"{record.tenant}/{record.name}"
    if is_bare:
        return [record.name, full, f"{parent}:{record.name}", f"{parent}:{full}"]
    return [full, f"{parent}:{full}"]
