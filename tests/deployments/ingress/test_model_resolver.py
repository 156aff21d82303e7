"""What a model name means to a tenant, with several bases, and where only names are known.

The registry is the adapter store's own catalog, without its log.
"""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_store.catalog import Catalog
from adapter_store.errors import AdapterNotFound, AdapterStoreError, SourceUnavailable, StoreCorrupt
from adapter_store.names import AdapterRecord, AdapterRef
from deployments.config_sections import IngressSection
from deployments.fleet.protocol import Hello
from deployments.ingress import model_resolver
from deployments.ingress.adapter_texts import AdapterTexts
from deployments.ingress.base_paths import name_within
from deployments.ingress.http_errors import ApiError
from deployments.ingress.ingress import Ingress
from deployments.ingress.metrics import Metrics
from deployments.ingress.model_resolver import ListedAdapter, Models, ServedModel, Target
from deployments.ingress.routes import build_api
from deployments.ingress.tenant_limiter import TenantLimiter
from deployments.tenants.tenant import Tenant
from deployments.tenants.tenants import Everybody
from tests.deployments.support.fakes import INFO, Answered, byte_vocabulary, call

ACME = Tenant("acme", granted=("lab",))
SMALL, LARGE, FOREIGN = "5" * 64, "1" * 64, "f" * 64  # fingerprints
VOCABULARY = byte_vocabulary()


class CatalogStore:
    """Adapters by (tenant, name, base), in the order in which they are published."""

    def __init__(self, *published: tuple[str, str, str]) -> None:
        self.catalog = Catalog()
        self.looks: list[str] = []
        self.failure: Exception | None = None
        for number, (tenant, name, base) in enumerate(published):
            self._append(
                kind="publish",
                tenant=tenant,
                name=name,
                version=self.catalog.num_versions(tenant, name) + 1,
                digest=f"digest-{number}",
                base=base,
                lora_rank=8,
                nbytes=1,
                published_s=1e9 + number,
            )

    def alias(self, tenant: str, name: str, alias: str, version: int) -> None:
        self._append(kind="alias", tenant=tenant, name=name, alias=alias, version=version)

    def retire(self, tenant: str, name: str, versions: list[int]) -> None:
        self._append(kind="retire", tenant=tenant, name=name, versions=versions)

    def _append(self, **record: Any) -> None:
        self.catalog.apply(record)

    def resolve_first(self, places: Sequence[tuple[str, str | None]], full_name: str) -> AdapterRef:
        for tenant, base in places:
            self.looks.append(tenant)
            try:
                return self.catalog.resolve(tenant, full_name, base)
            except AdapterNotFound:
                continue
        raise self.failure or AdapterNotFound(full_name)

    def resolve_known(
        self, places: Sequence[tuple[str, str | None]], full_name: str
    ) -> AdapterRef | None:
        try:
            return self.resolve_first(places, full_name)
        except AdapterStoreError:
            return None

    def list_from(self, tenant: str, first_name: str, num_names: int) -> Sequence[AdapterRecord]:
        if self.failure is not None:
            raise self.failure
        found = itertools.groupby(self.catalog.list_from(tenant, first_name), lambda r: r.name)
        return [record for _, of_name in itertools.islice(found, num_names) for record in of_name]


@dataclass
class FakeLink:
    hello: Hello | None
    trouble: str = "no replica was heard of"
    is_asleep: bool = False

    @property
    def outage(self) -> str | None:
        return self.trouble if self.hello is None else None

    async def ready(self) -> float:
        return 0.0


def models(store: CatalogStore, **bases: str | None) -> Models:
    """Served models by id; None: its engine has not started yet."""
    served = [
        ServedModel(i, VOCABULARY, FakeLink(base and Hello(INFO, base, "replica", 1)), 100)  # type: ignore[arg-type]
        for i, base in bases.items()
    ]
    return Models(served, store)


def resolve(at: Models, name: str, tenant: Tenant = ACME) -> Target:
    return asyncio.run(at.resolve(tenant, name))


def error(at: Models, name: str, tenant: Tenant = ACME) -> ApiError:
    with pytest.raises(ApiError) as caught:
        resolve(at, name, tenant)
    return caught.value


def digest(at: Models, name: str, tenant: Tenant = ACME) -> str:
    target = resolve(at, name, tenant)
    assert target.adapter_ref is not None and target.tenant == tenant.name
    return target.adapter_ref.digest


# ---- tenants -------------------------------------------------------------------------------

SQLS = CatalogStore(
    ("public", "sql", SMALL),
    ("acme", "sql", SMALL),
    ("umbrella", "sql", SMALL),
    ("lab", "sql", SMALL),
    ("public", "both", SMALL),
    ("umbrella", "secret", SMALL),
    ("lab", "rare", SMALL),
)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("sql", "digest-1"),
        ("acme/sql", "digest-1"),
        ("small:sql@1", "digest-1"),
        ("public/sql", "digest-0"),
        ("small:public/sql@latest", "digest-0"),
        ("lab/sql", "digest-3"),
        ("both", "digest-4"),
        ("lab/rare", "digest-6"),
    ],
)
def test_a_tenants_own_adapters_come_first_then_public_ones(name: str, wanted: str) -> None:
    assert digest(models(SQLS, small=SMALL), name) == wanted


def test_the_same_name_means_another_adapter_to_another_tenant() -> None:
    at = models(SQLS, small=SMALL)
    assert digest(at, "sql", Tenant("umbrella")) == "digest-2"
    assert digest(at, "sql", Tenant("newcomer")) == "digest-0"
    assert digest(at, "sql", Tenant("public")) == "digest-0"


@pytest.mark.parametrize("there", ["umbrella/sql", "umbrella/secret", "small:umbrella/secret@1"])
def test_another_tenants_adapter_is_404_like_a_missing_one_and_is_not_looked_up(
    there: str,
) -> None:
    store = CatalogStore(("umbrella", "sql", SMALL), ("umbrella", "secret", SMALL))
    at = models(store, small=SMALL)
    absent = there.replace("umbrella", "nobody").replace("secret", "nothing")
    found, missing = error(at, there), error(at, absent)
    assert found.status == missing.status == 404
    assert found.body().replace(there.encode(), b"") == missing.body().replace(absent.encode(), b"")
    assert found.headers() == missing.headers()
    assert store.looks == []


def test_granted_adapters_are_found_by_their_full_name_only() -> None:
    at = models(SQLS, small=SMALL)
    assert error(at, "rare").status == 404
    assert error(at, "lab/rare", Tenant("umbrella")).status == 404


# ---- several bases -------------------------------------------------------------------------

MIXED = CatalogStore(
    ("acme", "sql", LARGE),  # version 1
    ("acme", "sql", SMALL),
    ("acme", "sql", SMALL),
    ("acme", "sql", LARGE),  # version 4
    ("acme", "sql", FOREIGN),
    ("public", "sql", SMALL),
    ("public", "small-only", SMALL),
)
MIXED.alias("acme", "sql", "prod", 2)


@pytest.mark.parametrize(
    ("name", "model", "wanted"),
    [
        ("sql", "large", "digest-3"),  # the first base in the configuration
        ("sql@latest", "large", "digest-3"),
        ("large:sql", "large", "digest-3"),
        ("small:sql", "small", "digest-2"),
        ("sql@1", "large", "digest-0"),
        ("sql@3", "small", "digest-2"),
        ("sql@prod", "small", "digest-1"),
        ("small:sql@prod", "small", "digest-1"),
        ("small-only", "small", "digest-6"),
        ("public/sql", "small", "digest-5"),
    ],
)
def test_an_adapter_goes_to_the_base_that_it_was_published_for(
    name: str, model: str, wanted: str
) -> None:
    target = resolve(models(MIXED, large=LARGE, small=SMALL), name)
    assert target.adapter_ref is not None
    assert (target.model.id, target.adapter_ref.digest) == (model, wanted)


@pytest.mark.parametrize("name", ["large:sql@prod", "small:sql@1", "large:small-only", "sql@5"])
def test_an_adapter_of_another_base_is_404(name: str) -> None:
    assert error(models(MIXED, large=LARGE, small=SMALL), name).status == 404


def test_a_withdrawn_version_does_not_turn_into_a_public_one() -> None:
    store = CatalogStore(
        ("acme", "sql", SMALL),
        ("acme", "sql", SMALL),
        ("public", "sql", SMALL),
        ("public", "sql", SMALL),
    )
    at = models(store, small=SMALL)
    assert digest(at, "sql@2") == "digest-1"
    store.retire("acme", "sql", [2])
    assert error(at, "sql@2").status == 404
    assert digest(at, "sql") == "digest-0"
    store.retire("acme", "sql", [1])
    assert digest(at, "sql") == "digest-3", "no adapter of its own is left"


def test_publishing_for_a_later_base_does_not_change_what_a_name_means() -> None:
    before = CatalogStore(("acme", "sql", LARGE))
    after = CatalogStore(("acme", "sql", LARGE), ("acme", "sql", SMALL))
    bases = {"large": LARGE, "small": SMALL}
    assert digest(models(before, **bases), "sql") == digest(models(after, **bases), "sql")


def test_two_models_of_the_same_base_are_told_apart_by_their_ids() -> None:
    at = models(MIXED, exact=SMALL, fast=SMALL)
    assert [resolve(at, n).model.id for n in ("sql", "fast:sql", "exact:sql")] == [
        "exact",
        "fast",
        "exact",
    ]


# ---- engines that are not there ------------------------------------------------------------


@pytest.mark.parametrize("name", ["sql", "small-only", "large:sql", "sql@1"])
def test_a_503_names_the_base_that_has_not_started_and_may_have_the_adapter(name: str) -> None:
    found = error(models(MIXED, large=None, small=SMALL), name)
    assert found.status == 503 and found.retry_after_s and "'large'" in found.message


@pytest.mark.parametrize("name", ["small:sql", "sql@3", "sql@prod"])
def test_a_base_that_has_not_started_does_not_block_adapters_of_others(name: str) -> None:
    assert resolve(models(MIXED, large=None, small=SMALL), name).model.id == "small"


@pytest.mark.parametrize("name", ["nothing", "large:nothing", "umbrella/sql"])
def test_an_unknown_adapter_is_404_whichever_bases_have_started(name: str) -> None:
    assert error(models(MIXED, large=None, small=SMALL), name).status == 404


def test_a_base_that_is_restarted_keeps_its_adapters() -> None:
    at = models(MIXED, large=LARGE, small=SMALL)
    assert at.outages == {} and digest(at, "sql") == "digest-3"
    at.by_id["large"].link.hello = None
    assert list(at.outages) == ["large"]
    assert resolve(at, "sql").model.id == "large"
    assert resolve(at, "small:sql").model.id == "small"


def test_an_unreadable_registry_is_503_for_names_that_are_not_cached() -> None:
    store = CatalogStore(("acme", "sql", SMALL))
    at = models(store, small=SMALL)
    store.failure = SourceUnavailable("the bucket does not answer")
    assert digest(at, "sql") == "digest-0"
    found = error(at, "news")
    assert found.status == 503 and "retry-after" in found.headers()
    assert "bucket" not in found.message


def test_a_damaged_registry_is_503_for_names_that_cannot_be_decided_and_tells_no_key() -> None:
    store = CatalogStore(("acme", "sql", SMALL))
    at = models(store, small=SMALL)
    store.failure = StoreCorrupt("log/00000000000000000002.json is not JSON")
    assert digest(at, "sql") == "digest-0"
    found = error(at, "news")
    assert found.status == 503 and "log/" not in found.message


# ---- lists ---------------------------------------------------------------------------------


def test_everything_a_tenant_may_use_is_listed_with_its_parent_under_its_shortest_name() -> None:
    store = CatalogStore(
        ("acme", "sql", SMALL),
        ("acme", "sql", LARGE),
        ("public", "sql", SMALL),
        ("public", "tales", LARGE),
        ("lab", "tales", LARGE),
        ("umbrella", "secret", LARGE),
        ("acme", "foreign", FOREIGN),
    )
    at = models(store, large=LARGE, small=SMALL)
    listed = asyncio.run(at.list_adapters(ACME))
    assert [(card.id, card.parent, card.record.tenant) for card in listed] == [
        ("sql", "large", "acme"),
        ("small:sql", "small", "acme"),
        ("public/sql", "small", "public"),
        ("tales", "large", "public"),
        ("lab/tales", "large", "lab"),
    ]


TENANTS = ("acme", "public", "lab", "umbrella")
PUBLISHED = st.lists(
    st.tuples(
        st.sampled_from(TENANTS),
        st.sampled_from(["a", "b", "base"]),
        st.sampled_from([SMALL, LARGE, FOREIGN]),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(PUBLISHED, st.sampled_from([("large", "small"), ("small", "large"), ("base", "acme/a")]))
def test_every_listed_name_means_what_the_list_says_and_nothing_is_missing(
    published: list[tuple[str, str, str]], ids: tuple[str, str]
) -> None:
    at = models(CatalogStore(*published), **dict(zip(ids, (LARGE, SMALL), strict=True)))
    listed = asyncio.run(at.list_adapters(ACME))
    names = [card.id for card in listed]
    assert len(set(names) | set(ids)) == len(names) + len(ids), "no name comes twice"
    for card in listed:
        target = resolve(at, card.id)
        assert target.adapter_ref is not None
        assert (target.model.id, target.adapter_ref.digest) == (card.parent, card.record.digest)
    wanted = {p for p in published if p[0] != "umbrella" and p[2] != FOREIGN}
    assert {(c.record.tenant, c.record.name, c.record.base) for c in listed} == wanted


@settings(deadline=None, max_examples=100)
@given(
    PUBLISHED,
    st.sampled_from([("large", "small"), ("base", "acme/a")]),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_pages_put_together_are_the_whole_list(
    published: list[tuple[str, str, str]], ids: tuple[str, str], limit: int, names_at_once: int
) -> None:
    at = models(CatalogStore(*published), **dict(zip(ids, (LARGE, SMALL), strict=True)))
    whole = asyncio.run(at.list_adapters(ACME))
    listed: list[ListedAdapter] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_resolver, "NAMES_AT_ONCE", names_at_once)
        while page := asyncio.run(at.list_adapters(ACME, listed[-1].id if listed else None, limit)):
            assert len(page) <= limit
            listed.extend(page)
    assert listed == whole


@settings(deadline=None, max_examples=60)
@given(PUBLISHED, st.sampled_from([("large", "small"), ("base", "acme/a")]), st.integers(1, 5))
def test_the_list_of_one_base_is_its_part_of_the_whole_and_means_the_same_there(
    published: list[tuple[str, str, str]], ids: tuple[str, str], limit: int
) -> None:
    at = models(CatalogStore(*published), **dict(zip(ids, (LARGE, SMALL), strict=True)))
    whole = asyncio.run(at.list_adapters(ACME))
    for base in ids:
        listed = asyncio.run(at.list_adapters(ACME, None, limit, base))
        assert listed == [card for card in whole if card.parent == base][:limit]
        for card in listed:
            target = resolve(at, name_within(base, card.id))
            assert target.model.id == base and target.adapter_ref is not None
            assert target.adapter_ref.digest == card.record.digest


def test_a_page_goes_on_behind_an_adapter_that_was_retired_meanwhile() -> None:
    store = CatalogStore(("acme", "a", SMALL), ("acme", "b", SMALL), ("public", "c", SMALL))
    at = models(store, small=SMALL)
    store.retire("acme", "a", [1])
    assert [card.id for card in asyncio.run(at.list_adapters(ACME, "a"))] == ["b", "c"]
    store.retire("public", "c", [1])
    assert asyncio.run(at.list_adapters(ACME, "public/c")) == []


@pytest.mark.parametrize("after", ["small", "umbrella/a", "no such id", "@", "x" * 1000])
def test_an_id_that_no_list_shows_is_no_place_to_go_on(after: str) -> None:
    at = models(CatalogStore(("acme", "a", SMALL)), small=SMALL)
    with pytest.raises(ApiError) as caught:
        asyncio.run(at.list_adapters(ACME, after))
    assert caught.value.status == 400 and caught.value.param == "after"
    assert len(caught.value.message) < 300


def test_a_page_reads_no_more_than_it_shows_however_many_adapters_there_are() -> None:
    names = [("acme" if n % 2 else "other", f"name-{n:05}", SMALL) for n in range(5000)]
    store = CatalogStore(*names)
    read: list[int] = []
    list_from = store.list_from

    def counted(tenant: str, first_name: str, num_names: int) -> Sequence[AdapterRecord]:
        records = list_from(tenant, first_name, num_names)
        read.append(len(records))
        return records

    store.list_from = counted  # type: ignore[method-assign]
    page = asyncio.run(models(store, small=SMALL).list_adapters(ACME, "name-04001", 150))
    assert [card.id for card in page][:2] == ["name-04003", "name-04005"] and len(page) == 150
    assert sum(read) <= 2 * model_resolver.NAMES_AT_ONCE + 1


@settings(deadline=None, max_examples=60)
@given(PUBLISHED)
def test_no_name_gets_a_tenant_to_anothers_adapter_or_past_its_own(
    published: list[tuple[str, str, str]],
) -> None:
    at = models(CatalogStore(*published), large=LARGE, small=SMALL)
    owners = {tenant for tenant, name, _ in published if name == "a"}
    bare_owner = next((owner for owner in ("acme", "public") if owner in owners), None)

    async def check(base: str, namespace: str, version: str) -> None:
        try:
            target = await at.resolve(ACME, f"{base}{namespace}a{version}")
        except ApiError as refused:
            assert refused.status == 404
        else:
            assert target.adapter_ref is not None
            assert target.adapter_ref.tenant == (namespace.rstrip("/") or bare_owner) != "umbrella"

    async def check_all() -> None:
        namespaces = ("", *(f"{tenant}/" for tenant in TENANTS))
        spellings = itertools.product(("", "large:", "small:"), namespaces, ("", "@1", "@2"))
        for spelling in spellings:
            await check(*spelling)

    asyncio.run(check_all())


def health(path: str, **bases: str | None) -> Answered:
    async def ask() -> Answered:
        metrics = Metrics(200)
        store = CatalogStore()
        texts = AdapterTexts(store)  # type: ignore[arg-type]
        served = models(store, **bases)
        ingress = Ingress(
            served, texts, Everybody(), TenantLimiter(metrics), metrics, IngressSection(), 10**9
        )
        return await call(build_api(ingress), "GET", path, b"")

    return asyncio.run(ask())


OK, DOWN = {"status": "ok"}, {"status": "unavailable", "reason": "no replica was heard of"}


def test_health_is_200_while_any_model_can_answer_and_names_the_others() -> None:
    both = health("/health", large=LARGE, small=SMALL)
    assert (both.status, both.json) == (200, {"status": "ok", "models": {"large": OK, "small": OK}})
    one = health("/health", large=LARGE, small=None)
    states = {"large": OK, "small": DOWN}
    assert (one.status, one.json) == (200, {"status": "degraded", "models": states})


def test_health_is_503_once_no_model_can_answer() -> None:
    none = health("/health", large=None, small=None)
    assert none.status == 503 and int(none.headers["retry-after"]) >= 1
    assert "'small'" in none.error["message"] and "'large'" in none.error["message"]
    assert none.json["status"] == "unavailable"
    assert none.json["models"] == {"large": DOWN, "small": DOWN}


def test_each_model_has_a_health_of_its_own() -> None:
    def status(path: str) -> int:
        return health(path, **{"large": LARGE, "team/small": None}).status

    assert health("/health/large", large=LARGE, small=None).json == {
        "status": "ok",
        "models": {"large": OK},
    }
    assert [status(f"/health/{name}") for name in ("large", "team/small")] == [200, 503]
    down = health("/health/small", large=LARGE, small=None)
    assert "'small'" in down.error["message"] and "large" not in down.body.decode()
    assert down.json["models"] == {"small": DOWN}
    for name in ("sql", "large:sql"):
        assert status(f"/health/{name}") == 404
