"""The admin API: publish, describe, list, alias, retire, restore, delete and verify adapters."""

from collections.abc import Mapping
from typing import cast, get_args

from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from adapter_store.audit import MAX_AUDITED
from adapter_store.errors import InvalidName
from adapter_store.listing import Position, Wanted, parse_position
from adapter_store.names import State
from deployments.ingress.admin import Admin, check_right
from deployments.ingress.api.admin import (
    AdapterDescription,
    AdapterList,
    AliasAnswer,
    AuditList,
    ChangedVersions,
    NewAlias,
    NewSource,
    StateChange,
    Verification,
    VerifyLine,
    adapter_description,
    adapter_list,
    alias_answer,
    audit_list,
)
from deployments.ingress.api.openai_fields import parse_request
from deployments.ingress.api_route import JSON, ApiRoute, RouteDoc, json_answer
from deployments.ingress.http_errors import invalid
from deployments.ingress.ingress import Ingress
from deployments.ingress.surfaces.adapters import loaded_base
from deployments.ingress.uploads import FORM_TYPE, TAR_TYPES, media_type_of
from deployments.tenants.tenant import Publisher

MAX_LISTED = 1000
PROOFS = ("", "none", "proven", "no_effect", "failed")
LINES = "application/x-ndjson"
ADAPTERS = "/admin/v1/adapters"
_STATUSES = {
    401: "No key, or one that is not valid.",
    403: "The key does not manage this tenant's adapters.",
    429: "Too many requests of this kind at a time.",
    503: "The adapter store cannot be used now.",
}
_BINARY = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "additionalProperties": _BINARY}


def admin_routes(ingress: Ingress) -> list[ApiRoute]:
    """Make the routes; none where the API is off."""
    return [] if ingress.admin is None else _routes(ingress, ingress.admin)


def _routes(ingress: Ingress, admin: Admin) -> list[ApiRoute]:
    async def publish(http_request: HttpRequest, publisher: Publisher) -> Response:
        tenant, name = _place(http_request, publisher)
        query = _query(http_request, ("base", "only_new"))
        only_new = _one_of("only_new", query.get("only_new", "false"), ("false", "true")) == "true"
        place = (tenant, name)
        if media_type_of(http_request) != JSON:
            base = _fingerprint(ingress, query.get("base"))
            ref = await admin.publish(http_request, publisher, place, base, only_new)
        else:
            source = parse_request(NewSource, await ingress.raw_document(http_request)).source
            if "://" in source:
                base = _fingerprint(ingress, query.get("base"))
                ref = await admin.publish_from(source, publisher, place, base, only_new)
            elif "base" in query:
                raise invalid("A version has its base: leave base out.", "base")
            else:
                ref = await admin.publish_again(source, publisher, place, only_new)
        return await _described(ingress, admin, tenant, f"{name}@{ref.version}")

    async def describe(http_request: HttpRequest, publisher: Publisher) -> Response:
        return await _described(ingress, admin, *_place(http_request, publisher))

    async def list_(http_request: HttpRequest, publisher: Publisher) -> Response:
        wanted, after, limit = _asked_for(http_request, publisher)
        page = await admin.page(wanted, after, limit)
        return json_answer(adapter_list(page, _base_models(ingress)))

    async def change_state(http_request: HttpRequest, publisher: Publisher) -> Response:
        tenant, name = _place(http_request, publisher)
        state = parse_request(StateChange, await ingress.raw_document(http_request)).state
        versions = list(await admin.change_state(publisher, tenant, name, state))
        bare_name = name.partition("@")[0]
        return json_answer(
            ChangedVersions(tenant=tenant, name=bare_name, versions=versions, state=state)
        )

    async def alias(http_request: HttpRequest, publisher: Publisher) -> Response:
        tenant, name = _place(http_request, publisher)
        body = parse_request(NewAlias, await ingress.raw_document(http_request))
        trial = body.trial
        view, figures = await admin.alias(
            publisher.author,
            (tenant, name),
            body.alias,
            body.weights,
            lambda: None if trial is None else trial.trial(),
        )
        return json_answer(alias_answer(view, figures))

    async def alias_state(http_request: HttpRequest, publisher: Publisher) -> Response:
        tenant, name = _place(http_request, publisher)
        full_name = f"{name}@{http_request.path_params['alias']}"
        return json_answer(alias_answer(*await admin.alias_state(tenant, full_name)))

    async def audit(http_request: HttpRequest, publisher: Publisher) -> Response:
        query = _query(http_request, ("tenant", "before", "limit"))
        before = _number(query, "before", 1, 10**15) if "before" in query else None
        limit = _number(query, "limit", 1, MAX_AUDITED) if "limit" in query else 100
        tenant = query.get("tenant") or publisher.tenant
        if tenant is not None:
            check_right(publisher, tenant)
        return json_answer(audit_list(await admin.audit(before, limit, tenant)))

    async def verify(http_request: HttpRequest, publisher: Publisher) -> Response:
        body = parse_request(Verification, await ingress.raw_document(http_request))
        tenant = body.tenant or publisher.tenant
        if tenant is not None:
            check_right(publisher, tenant)
        lines = await admin.verify(tenant, body.name)
        return StreamingResponse(lines, media_type=LINES)

    one = ADAPTERS + "/{tenant}/{adapter}"
    return [
        ingress.admin_route("GET", ADAPTERS, list_, LIST_DOC),
        ingress.admin_route("GET", one, describe, DESCRIBE_DOC),
        ingress.admin_route("POST", one, publish, PUBLISH_DOC),
        ingress.admin_route("POST", f"{one}/state", change_state, STATE_DOC),
        ingress.admin_route("POST", f"{one}/aliases", alias, ALIAS_DOC),
        ingress.admin_route("GET", one + "/aliases/{alias}", alias_state, ALIAS_STATE_DOC),
        ingress.admin_route("GET", "/admin/v1/audit", audit, AUDIT_DOC),
        ingress.admin_route("POST", "/admin/v1/verify", verify, VERIFY_DOC),
    ]


def _doc(
    summary: str,
    answer: type[BaseModel],
    body: type[BaseModel] | None = None,
    query: Mapping[str, str] | None = None,
    statuses: Mapping[int, str] | None = None,
    media_type: str = JSON,
    upload: Mapping[str, object] | None = None,
) -> RouteDoc:
    return RouteDoc(
        summary,
        body,
        answer,
        media_type,
        query=query or {},
        statuses={**_STATUSES, **(statuses or {})},
        upload=upload,
    )


_WRONG = {400: "A parameter or field is wrong.", 404: "There is no such adapter."}
LIST_DOC = _doc(
    "Versions of adapters, in pages.",
    AdapterList,
    query={
        "tenant": "only its adapters",
        "name": "only these names; `*` and `?` stand for any letters",
        "base": "only for this base: the first digits of its fingerprint",
        "state": "`live` (the default), `retired`, `deleted` or `any`",
        "proof": "the latest probe: `proven`, `no_effect`, `failed` or `none`",
        "limit": f"versions on a page, at most {MAX_LISTED}; 100 if it is not given",
        "after": "the last page's `next_after`",
    },
    statuses={400: "A parameter is wrong."},
)
DESCRIBE_DOC = _doc("One version, in whatever state.", AdapterDescription, statuses=_WRONG)
PUBLISH_DOC = _doc(
    "Publish an adapter as a name's next version.",
    AdapterDescription,
    query={
        "base": "a base model's id or fingerprint; may be left out where one is served",
        "only_new": "`true` refuses a name that has a live version",
    },
    statuses={
        400: "What was uploaded cannot be served, or a parameter is wrong.",
        404: "No such base model.",
        409: "The name is taken, or the tenant has no room.",
        413: "The upload is too large.",
        507: "The server's disk is full.",
    },
    upload={
        FORM_TYPE: {"schema": _FORM},
        TAR_TYPES[0]: {"schema": _BINARY},
        JSON: {"schema": NewSource.model_json_schema()},
    },
)
STATE_DOC = _doc(
    "Retire a version or all of a name, restore one, or delete.",
    ChangedVersions,
    StateChange,
    statuses={**_WRONG, 409: "Its files were removed, or the tenant has no room."},
)
ALIAS_DOC = _doc(
    "Make an alias mean a version, or several by weight, one of them perhaps on trial.",
    AliasAnswer,
    NewAlias,
    statuses=_WRONG,
)
ALIAS_STATE_DOC = _doc(
    "What an alias means, and what its trial has shown so far.", AliasAnswer, statuses=_WRONG
)
AUDIT_DOC = _doc(
    "Who has changed what, the newest first.",
    AuditList,
    query={
        "tenant": "only its adapters",
        "before": "the last page's `next_before`",
        "limit": f"entries that are looked at, at most {MAX_AUDITED}; 100 if it is not given",
    },
    statuses={400: "A parameter is wrong."},
)
VERIFY_DOC = _doc(
    "Hash what is stored again; a line of JSON each second, and one with the outcome.",
    VerifyLine,
    Verification,
    statuses=_WRONG,
    media_type=LINES,
)


def _place(http_request: HttpRequest, publisher: Publisher) -> tuple[str, str]:
    """Read tenant and adapter from the path, if the key manages them. Raises ApiError."""
    tenant, name = http_request.path_params["tenant"], http_request.path_params["adapter"]
    check_right(publisher, tenant)
    return tenant, name


async def _described(ingress: Ingress, admin: Admin, tenant: str, full_name: str) -> Response:
    record, manifest = await admin.find(tenant, full_name)
    return json_answer(adapter_description(record, manifest, _base_models(ingress)))


def _base_models(ingress: Ingress) -> dict[str, str]:
    models = reversed(ingress.models.by_id.values())  # the first of two with one base counts
    return {m.link.hello.base_fingerprint: m.id for m in models if m.link.hello is not None}


def _fingerprint(ingress: Ingress, base: str | None) -> str:
    """Find the base that is meant: by its id, or as the store knows it. Raises ApiError."""
    if base is not None and base not in ingress.models.by_id:
        return base
    return loaded_base(ingress, base, "base").fingerprint


def _asked_for(
    http_request: HttpRequest, publisher: Publisher
) -> tuple[Wanted, Position | None, int]:
    names = ("tenant", "name", "base", "state", "proof", "limit", "after")
    query = _query(http_request, names)
    tenant = query.get("tenant") or publisher.tenant or ""
    if tenant:
        check_right(publisher, tenant)
    state = _one_of("state", query.get("state", "live"), (*get_args(State), "any"))
    wanted = Wanted(
        tenant=tenant,
        name=query.get("name", ""),
        base=query.get("base", ""),
        state=None if state == "any" else cast(State, state),
        proof=_one_of("proof", query.get("proof", ""), PROOFS),
    )
    limit = _number(query, "limit", 1, MAX_LISTED) if "limit" in query else 100
    return wanted, _position(query.get("after"), publisher), limit


def _position(after: str | None, publisher: Publisher) -> Position | None:
    if after is None:
        return None
    try:
        position = parse_position(after)
    except InvalidName as error:
        raise invalid(f"after: {error}.", "after") from None
    check_right(publisher, position.tenant)
    return position


def _query(http_request: HttpRequest, known: tuple[str, ...]) -> dict[str, str]:
    """Read the query, in which each parameter is known and comes once. Raises ApiError."""
    items = http_request.query_params.multi_items()
    for number, (name, value) in enumerate(items):
        if name not in known:
            raise invalid(
                f"Unknown parameter {name[:80]!r}; known are {', '.join(known)}.", name[:80]
            )
        if name in dict(items[:number]) or len(value) > 200:
            raise invalid(f"{name} comes twice, or is longer than 200 characters.", name)
    return dict(items)


def _number(query: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = query[name]
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 18 else -1
    if not least <= number <= most:
        raise invalid(f"{name} must be in [{least}, {most}], not {text[:20]!r}.", name)
    return number


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        listed = ", ".join(filter(None, allowed))
        raise invalid(f"{name} must be one of {listed}, not {value[:20]!r}.", name)
    return value
