"""The lists of models and their cards."""

import json
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.ingress.api.answers import ModelCard, ModelList
from deployments.ingress.api.anthropic_answers import AnthropicModel, AnthropicModels
from deployments.ingress.api.anthropic_errors import ANTHROPIC_ERRORS
from deployments.ingress.api.model_cards import (
    adapter_card,
    anthropic_card,
    anthropic_list,
    base_card,
    model_list,
)
from deployments.ingress.api_route import ApiRoute, RouteDoc
from deployments.ingress.base_paths import base_of, name_within
from deployments.ingress.http_errors import invalid
from deployments.ingress.ingress import Ingress, TenantHandler
from deployments.ingress.model_resolver import MAX_LISTED, ServedModel
from deployments.ingress.tenant_limiter import Place
from deployments.tenants.tenant import Tenant

LIST_DOC = RouteDoc(
    "The base models, and the adapters that the key may use.",
    answer=(ModelList, AnthropicModels),
    query={
        "limit": f"models on a page, at most {MAX_LISTED}",
        "after": "an id: the page behind it",
        "after_id": "the same for clients of Anthropic's API",
    },
)
CARD_DOC = RouteDoc("One model, under any name that means it.", answer=(ModelCard, AnthropicModel))


def model_routes(ingress: Ingress) -> list[ApiRoute]:
    async def page(http_request: HttpRequest, tenant: Tenant, after: str) -> dict[str, Any]:
        base = base_of(http_request.scope)
        return await _model_list(ingress, tenant, base, *page_asked_for(http_request, after))

    async def card(http_request: HttpRequest, tenant: Tenant) -> dict[str, Any]:
        name = name_within(base_of(http_request.scope), http_request.path_params["model_id"])
        return await _card(ingress, tenant, name)

    async def list_models(http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        return _json(await page(http_request, tenant, "after"))

    async def list_for_anthropic(
        http_request: HttpRequest, tenant: Tenant, place: Place
    ) -> Response:
        return _json(anthropic_list(await page(http_request, tenant, "after_id")))

    async def show_model(http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        return _json(await card(http_request, tenant))

    async def show_for_anthropic(
        http_request: HttpRequest, tenant: Tenant, place: Place
    ) -> Response:
        return _json(anthropic_card(await card(http_request, tenant)))

    def route(path: str, doc: RouteDoc, ours: TenantHandler, theirs: TenantHandler) -> ApiRoute:
        route = ingress.tenant_route("GET", path, ours, doc=doc)
        form = ANTHROPIC_ERRORS
        other = ingress.tenant_route("GET", path, theirs, form, takes_api_key=True)
        route.app = _ByVersion(route.app, other.app)
        return route

    return [
        route("/v1/models", LIST_DOC, list_models, list_for_anthropic),
        route("/v1/models/{model_id:path}", CARD_DOC, show_model, show_for_anthropic),
    ]


class _ByVersion:
    """Answers clients of Anthropic's API, which name its version, in its form."""

    def __init__(self, ours: ASGIApp, theirs: ASGIApp) -> None:
        self._ours = ours
        self._theirs = theirs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_theirs = "anthropic-version" in Headers(scope=scope)
        await (self._theirs if is_theirs else self._ours)(scope, receive, send)


async def _model_list(
    ingress: Ingress, tenant: Tenant, base: str | None, after: str | None, limit: int
) -> dict[str, Any]:
    """List all models, or those of one base."""
    models = ingress.models
    bases = list(models.by_id) if base is None else [base]
    if after in bases:
        bases, after = bases[bases.index(after) + 1 :], None
    elif after is not None:
        bases = []
    cards = [_base_card(ingress, models.by_id[model_id]) for model_id in bases]
    # One more than is shown says whether there are more.
    wanted = max(0, limit + 1 - len(cards))
    for listed in await models.list_adapters(tenant, after, wanted, base):
        record = listed.record
        created = int(record.published_s)
        card = adapter_card(listed.id, listed.parent, record.digest, created, record.verdict)
        cards.append(card)
    return model_list(cards[:limit], has_more=len(cards) > limit)


async def _card(ingress: Ingress, tenant: Tenant, name: str) -> dict[str, Any]:
    target = await ingress.models.resolve(tenant, name)
    if target.adapter_ref is None:
        return _base_card(ingress, target.model)
    ref = target.adapter_ref
    if ref.recipe is not None:
        return adapter_card(name, target.model.id, ref.digest, ingress.created, None)
    record = await ingress.models.record_of(ref)
    created = int(record.published_s)
    return adapter_card(name, target.model.id, ref.digest, created, record.verdict)


def _base_card(ingress: Ingress, model: ServedModel) -> dict[str, Any]:
    hello = model.link.hello
    max_model_len = None if hello is None else hello.engine.max_model_len
    return base_card(model.id, ingress.created, max_model_len)


def page_asked_for(http_request: HttpRequest, after: str = "after") -> tuple[str | None, int]:
    """Read the id behind which a list is to begin, and how long it may be. Raises ApiError.

    `after` is the name of the parameter with the id.
    """
    if "before_id" in http_request.query_params:
        raise invalid(f"before_id is not supported: lists are read with {after}.", "before_id")
    given = http_request.query_params.get("limit", str(MAX_LISTED))
    limit = int(given) if given.isascii() and given.isdigit() and len(given) < 10 else 0
    if not 1 <= limit <= MAX_LISTED:
        raise invalid(f"limit must be in [1, {MAX_LISTED}], not {given[:20]!r}", "limit")
    return http_request.query_params.get(after), limit


def _json(document: dict[str, Any]) -> Response:
    return Response(json.dumps(document, ensure_ascii=False), media_type="application/json")
