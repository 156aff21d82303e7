"""Ingress: the HTTP routes of one ingress replica.

`build_api` makes an ASGI application of an Ingress. Requests are parsed, resolved and planned here;
`streaming` runs the plans. No Ray here.
"""

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from deployments.config_sections import IngressSection
from deployments.ingress.adapter_templates import AdapterTemplates, ChatRenderer
from deployments.ingress.api.json_body import decode_json
from deployments.ingress.api.model_cards import adapter_card, base_card, model_list
from deployments.ingress.api.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    OpenAIRequest,
)
from deployments.ingress.api.openai_fields import parse_request
from deployments.ingress.asgi import Api
from deployments.ingress.browser_guard import BrowserGuard
from deployments.ingress.engine_metrics import LinkFigures
from deployments.ingress.generation import Plan
from deployments.ingress.health import health_of
from deployments.ingress.http_errors import (
    ApiError,
    as_api_error,
    body_too_large,
    body_too_slow,
    invalid,
    model_not_found,
)
from deployments.ingress.metrics import CONTENT_TYPE, Metrics
from deployments.ingress.model_resolver import MAX_LISTED, Models, ServedModel, Target
from deployments.ingress.planning import Origin, plan_chat, plan_completion
from deployments.ingress.streaming import CLIENT_GONE, ErrorResponse, GenerationResponse
from deployments.ingress.tenant_limiter import Place, TenantLimiter
from deployments.tenants.tenant import Tenant
from deployments.tenants.tenants import Tenants

Handler = Callable[[HttpRequest, ExitStack], Awaitable[Response]]
TenantHandler = Callable[[HttpRequest, Tenant, Place], Awaitable[Response]]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
BODY_TIMEOUT_S = 60.0


def system_origin() -> Origin:
    return Origin(
        new_id=lambda: secrets.token_hex(12),
        new_seed=lambda: secrets.randbits(63),
        now=time.time,
    )


@dataclass(frozen=True, slots=True)
class Ingress:
    """The handlers, and what they work with. Those of tenant routes are given the tenant."""

    models: Models
    templates: AdapterTemplates
    tenants: Tenants
    limiter: TenantLimiter
    metrics: Metrics
    settings: IngressSection
    created: int  # when this ingress began to serve, for the model cards
    origin: Origin = field(default_factory=system_origin)

    @contextmanager
    def tenant_of(self, http_request: HttpRequest) -> Generator[tuple[Tenant, Place]]:
        """Count a request as its tenant's while it runs. Raises KeyRefused or ApiError."""
        tenant = self.tenants.identify(http_request.headers.get("authorization"))
        with self.limiter.inside(tenant.name, tenant.limits) as place:
            yield tenant, place

    # ---- generation ----------------------------------------------------------------------

    async def chat(self, http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        request = parse_request(ChatCompletionRequest, await self._document(http_request))
        place.hold(request.num_answers)
        target = await self.models.resolve(tenant, request.model)
        splits = self.settings.split_special_tokens is True
        own_template = await self._own_template(target)
        is_lenient = self.settings.lenient_schemas
        plan = await plan_chat(request, target, self.origin, splits, own_template, is_lenient)
        return self._answer(plan, request, CHAT)

    async def _own_template(self, target: Target) -> ChatRenderer | None:
        """Find the adapter's template where the base has none. Raises AdapterStoreError."""
        if target.adapter_ref is None or target.model.vocabulary.has_template:
            return None
        return await self.templates.find(target.adapter_ref)

    async def completion(self, http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        request = parse_request(CompletionRequest, await self._document(http_request))
        place.hold(request.num_answers)
        target = await self.models.resolve(tenant, request.model)
        is_lenient = self.settings.lenient_schemas
        plan = await plan_completion(request, target, self.origin, is_lenient)
        return self._answer(plan, request, COMPLETIONS)

    def _answer(self, plan: Plan, request: OpenAIRequest, route: str) -> GenerationResponse:
        keep_alive_s = self.settings.keep_alive_s
        return GenerationResponse(plan, bool(request.stream), self.metrics, route, keep_alive_s)

    async def _document(self, http_request: HttpRequest) -> object:
        return decode_json(await read_body(http_request, self.settings.max_body_bytes))

    # ---- models --------------------------------------------------------------------------

    async def list_models(
        self, http_request: HttpRequest, tenant: Tenant, place: Place
    ) -> Response:
        after, limit = page_asked_for(http_request)
        bases = list(self.models.by_id)
        if after in bases:
            bases, after = bases[bases.index(after) + 1 :], None
        elif after is not None:
            bases = []
        cards = [self._base_card(self.models.by_id[model_id]) for model_id in bases]
        # One more than is shown says whether there are more.
        wanted = max(0, limit + 1 - len(cards))
        for listed in await self.models.list_adapters(tenant, after, wanted):
            record = listed.record
            created = int(record.published_s)
            cards.append(adapter_card(listed.id, listed.parent, record.digest, created))
        return _json(model_list(cards[:limit], has_more=len(cards) > limit))

    async def show_model(self, http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        name = http_request.path_params["model_id"]
        target = await self.models.resolve(tenant, name)
        if target.adapter_ref is None:
            return _json(self._base_card(target.model))
        created = int(await self.models.published_s(target.adapter_ref))
        return _json(adapter_card(name, target.model.id, target.adapter_ref.digest, created))

    def _base_card(self, model: ServedModel) -> dict[str, Any]:
        hello = model.link.hello
        max_model_len = None if hello is None else hello.engine.max_model_len
        return base_card(model.id, self.created, max_model_len)

    # ---- operation -----------------------------------------------------------------------

    async def health(self, http_request: HttpRequest, held: ExitStack) -> Response:
        """Answer 200 while any model can answer, and name the state of each."""
        return health_of(list(self.models.by_id), self.models.outages)

    async def model_health(self, http_request: HttpRequest, held: ExitStack) -> Response:
        model_id = http_request.path_params["model_id"]
        model = self.models.by_id.get(model_id)
        if model is None:
            raise model_not_found(model_id)
        outage = model.outage
        return health_of([model_id], {} if outage is None else {model_id: outage})

    async def show_metrics(self, http_request: HttpRequest, held: ExitStack) -> Response:
        self.tenants.check_metrics(http_request.headers.get("authorization"))
        models = self.models.by_id.values()
        stats = {model.id: await model.link.refresh_stats() for model in models}
        links = {m.id: LinkFigures(m.link.num_live, m.link.num_held) for m in models}
        return Response(await self.metrics.render(stats, links), media_type=CONTENT_TYPE)


def page_asked_for(http_request: HttpRequest) -> tuple[str | None, int]:
    """Read the id after which a list is to begin, and how long it may be. Raises ApiError."""
    given = http_request.query_params.get("limit", str(MAX_LISTED))
    limit = int(given) if given.isascii() and given.isdigit() and len(given) < 10 else 0
    if not 1 <= limit <= MAX_LISTED:
        raise invalid(f"limit must be in [1, {MAX_LISTED}], not {given[:20]!r}", "limit")
    return http_request.query_params.get("after"), limit


async def read_body(http_request: HttpRequest, max_bytes: int) -> bytes:
    """Read the body. Stops at the limits, whatever length the client announced."""
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in http_request.stream():
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise body_too_large(max_bytes)
                chunks.append(chunk)
    except TimeoutError:
        raise body_too_slow(BODY_TIMEOUT_S) from None
    return b"".join(chunks)


def build_api(ingress: Ingress, guard: BrowserGuard | None = None) -> Api:
    def route(method: str, path: str, handler: Handler) -> Route:
        return Route(path, Endpoint(path, handler, ingress.metrics), methods=[method])

    def of_tenants(handler: TenantHandler) -> Handler:
        async def handle(http_request: HttpRequest, held: ExitStack) -> Response:
            tenant, place = held.enter_context(ingress.tenant_of(http_request))
            return await handler(http_request, tenant, place)

        return handle

    def no_route(scope: Scope, methods: Sequence[str]) -> Response:
        status = 405 if methods else 404
        ingress.metrics.count_answer("none", status)
        what = f"{scope['method']} {HttpRequest(scope).url.path}"
        message = f"{HTTPStatus(status).phrase}: {what}"
        return ErrorResponse(ApiError(status, message, allow=", ".join(methods) or None))

    def refuse(scope: Scope) -> Response | None:
        refusal = None if guard is None else guard.refusal(scope)
        if refusal is None:
            return None
        ingress.metrics.count_answer("none", refusal.status)
        return ErrorResponse(refusal)

    routes = [
        route("POST", CHAT, of_tenants(ingress.chat)),
        route("POST", COMPLETIONS, of_tenants(ingress.completion)),
        route("GET", "/v1/models", of_tenants(ingress.list_models)),
        route("GET", "/v1/models/{model_id:path}", of_tenants(ingress.show_model)),
        route("GET", "/health", ingress.health),
        route("GET", "/health/{model_id:path}", ingress.model_health),
        route("GET", "/metrics", ingress.show_metrics),
    ]
    origins = ingress.settings.cors_origins or ()
    return Api(routes, no_route, origins, None if guard is None else refuse)


class Endpoint:
    """One route as an ASGI application. Errors become answers, and every answer is counted.

    What a handler enters into `held` is exited once the answer is sent or the client is gone.
    """

    def __init__(self, path: str, handler: Handler, metrics: Metrics) -> None:
        self._path = path
        self._handler = handler
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as held:
            response = await self._respond(HttpRequest(scope, receive), held)
            await response(scope, receive, send)

    async def _respond(self, http_request: HttpRequest, held: ExitStack) -> Response:
        try:
            response = await self._handler(http_request, held)
        except ClientDisconnect:
            response = ErrorResponse(ApiError(CLIENT_GONE, "The client went away."))
        except Exception as error:
            response = ErrorResponse(as_api_error(error, self._path))
        if not isinstance(response, GenerationResponse):  # that one counts itself, at its end
            self._metrics.count_answer(self._path, response.status_code)
        return response


def _json(document: dict[str, Any]) -> Response:
    return Response(json.dumps(document, ensure_ascii=False), media_type="application/json")
