"""Ingress: what the routes of one ingress replica work with, whichever API they belong to.

Every surface hands its requests to `answer_chat` or `answer_completion`, so limits, names and plans
are the same for all. No Ray here.
"""

import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deployments.config_sections import IngressSection
from deployments.ingress.adapter_texts import AdapterTexts
from deployments.ingress.admin import Admin
from deployments.ingress.api.embeddings import EmbeddingForm, EmbeddingRequest
from deployments.ingress.api.json_body import decode_json
from deployments.ingress.api.openai import ChatCompletionRequest, CompletionRequest
from deployments.ingress.api.openai_request import OpenAIRequest
from deployments.ingress.api_route import ApiRoute, RouteDoc
from deployments.ingress.base_paths import base_of, set_model
from deployments.ingress.chat_answers import ChatAnswers
from deployments.ingress.chat_prompt import encode_chat
from deployments.ingress.embedding import AT_ONCE, EmbeddingResponse, Form, plan_embeddings
from deployments.ingress.endpoint import Endpoint, Handler, note_place
from deployments.ingress.error_form import OPENAI_ERRORS, ErrorForm
from deployments.ingress.feedback import Feedback
from deployments.ingress.generation import Plan
from deployments.ingress.http_errors import invalid
from deployments.ingress.metering import Metering
from deployments.ingress.metrics import Metrics
from deployments.ingress.model_resolver import Models, Target
from deployments.ingress.own_text import ChatRenderer
from deployments.ingress.planning import Origin, plan_chat, plan_completion
from deployments.ingress.reply_form import OPENAI_CHAT, OPENAI_COMPLETION, ReplyForm
from deployments.ingress.request_body import read_body
from deployments.ingress.request_id import request_id
from deployments.ingress.runtime_adapters import RuntimeAdapters
from deployments.ingress.sessions import caller_of, in_session, session_of
from deployments.ingress.streaming import COMMENT, GenerationResponse
from deployments.ingress.tenant_limiter import Place, TenantLimiter
from deployments.ingress.urgency import urgency_of, urgent
from deployments.tenants.key_book import KeyBook
from deployments.tenants.tenant import Publisher, Tenant
from deployments.tenants.tenants import Tenants
from deployments.usage.meter import NoMeter

NO_DOC = RouteDoc()
RequestT = TypeVar("RequestT", ChatCompletionRequest, CompletionRequest, EmbeddingRequest)
TenantHandler = Callable[[HttpRequest, Tenant, Place], Awaitable[Response]]
AdminHandler = Callable[[HttpRequest, Publisher], Awaitable[Response]]


def system_origin() -> Origin:
    return Origin(
        new_id=lambda: secrets.token_hex(12),
        new_seed=lambda: secrets.randbits(63),
        now=time.time,
    )


@dataclass(frozen=True, slots=True)
class Surface:
    """What an answer's writer needs to know of the API that it belongs to."""

    route: str  # that the metrics name
    form: ReplyForm
    errors: ErrorForm = OPENAI_ERRORS
    keep_alive: bytes = COMMENT  # what a stream without news is kept open with


CHAT = Surface("/v1/chat/completions", OPENAI_CHAT)
COMPLETIONS = Surface("/v1/completions", OPENAI_COMPLETION)
EMBEDDINGS = "/v1/embeddings"


@dataclass(slots=True)
class Ingress:
    """`settings` may be replaced while requests run: each reads them as it goes."""

    models: Models
    texts: AdapterTexts
    tenants: Tenants
    limiter: TenantLimiter
    metrics: Metrics
    settings: IngressSection
    created: int  # when this ingress began to serve, for the model cards
    origin: Origin = field(default_factory=system_origin)
    adapters: RuntimeAdapters | None = None  # which clients load
    admin: Admin | None = None  # None: the admin API is off
    metering: Metering = field(default_factory=lambda: Metering(NoMeter(), time.time))
    key_book: KeyBook | None = None  # None: the adapter store holds no keys
    feedback: Feedback = field(init=False)

    def __post_init__(self) -> None:
        self.feedback = Feedback(self.metrics)

    # ---- routes --------------------------------------------------------------------------

    def route(
        self,
        method: str,
        path: str,
        handler: Handler,
        errors: ErrorForm = OPENAI_ERRORS,
        doc: RouteDoc = NO_DOC,
        needs_key: bool = False,
    ) -> ApiRoute:
        endpoint = Endpoint(path, handler, self.metrics, errors)
        return ApiRoute(method, path, endpoint, doc, errors, needs_key)

    def tenant_route(
        self,
        method: str,
        path: str,
        handler: TenantHandler,
        errors: ErrorForm = OPENAI_ERRORS,
        doc: RouteDoc = NO_DOC,
        takes_api_key: bool = False,
    ) -> ApiRoute:
        """Make a route whose handler is given the tenant that asks, and its place in the limits.

        `takes_api_key`: the key may be in the header x-api-key as well.
        """

        async def handle(http_request: HttpRequest, held: ExitStack) -> Response:
            headers = http_request.headers
            api_key = headers.get("x-api-key") if takes_api_key else None
            authorization = headers.get("authorization")
            tenant, place = await self.admit(http_request, held, authorization, api_key)
            return await handler(http_request, tenant, self.named(place, http_request, tenant))

        return self.route(method, path, handle, errors, doc, needs_key=True)

    def admin_route(self, method: str, path: str, handler: AdminHandler, doc: RouteDoc) -> ApiRoute:
        """Make a route whose handler is given who manages adapters."""

        async def handle(http_request: HttpRequest, held: ExitStack) -> Response:
            authorization = http_request.headers.get("authorization")
            return await handler(http_request, self.tenants.identify_publisher(authorization))

        return self.route(method, path, handle, doc=replace(doc, needs_admin_key=True))

    @staticmethod
    def named(place: Place, http_request: HttpRequest, tenant: Tenant) -> Place:
        """Return a request's place with what the request calls itself and its session, and how
        urgent it is. Raises ApiError."""
        place.session = session_of(http_request.headers)
        place.request_id = request_id(http_request.scope)
        place.urgency = urgency_of(http_request.headers, tenant)
        return place

    async def admit(
        self,
        http_request: HttpRequest,
        held: ExitStack,
        authorization: str | None,
        api_key: str | None = None,
    ) -> tuple[Tenant, Place]:
        """Count a request as its tenant's until `held` ends. Raises KeyRefused or ApiError."""
        tenant = self.tenants.identify(authorization, api_key)
        place = self.limiter.place(tenant.name, tenant.limits)
        note_place(http_request.scope, place)
        await place.enter()
        held.callback(place.leave)
        return tenant, place

    async def document(self, http_request: HttpRequest) -> object:
        """Read the body. Below a base's path its `model` is of that base. Raises ApiError."""
        document = await self.raw_document(http_request)
        set_model(document, base_of(http_request.scope))
        return document

    async def raw_document(self, http_request: HttpRequest) -> object:
        """Read a body that names no model. Raises ApiError."""
        return decode_json(await read_body(http_request, self.settings.max_body_bytes))

    # ---- generation ----------------------------------------------------------------------

    async def answer_chat(
        self, request: ChatCompletionRequest, tenant: Tenant, place: Place, surface: Surface = CHAT
    ) -> GenerationResponse:
        await place.hold(request.num_answers)
        target = await self._target(tenant, request, place)
        request = _as_answered(request, target)
        plan = await plan_chat(
            request,
            target,
            self.origin,
            self.settings.split_special_tokens is True,
            self.own_template(target, request),
            self.settings.lenient_schemas,
            surface.form,
        )
        return await self._answer(plan, request, surface, tenant, place)

    async def encode_chat(
        self, request: ChatCompletionRequest, tenant: Tenant
    ) -> tuple[Target, list[int]]:
        """Make the token ids of a chat's prompt, for which no engine is asked. Raises ApiError."""
        target = await self.target(tenant, request.model)
        template = self.own_template(target, request)
        answers = ChatAnswers(request, await target.syntax())
        splits = self.settings.split_special_tokens is True
        return target, (await encode_chat(answers, target, splits, template))[1]

    def own_template(self, target: Target, request: ChatCompletionRequest) -> ChatRenderer | None:
        """Find the request's template, or the adapter's; None for the base's. Raises ApiError."""
        if request.chat_template is not None:
            if not self.settings.request_chat_templates:
                raise invalid(
                    "chat_template: templates of requests are off (ingress.request_chat_templates "
                    "in the configuration); the model's own is used without this field.",
                    "chat_template",
                    "unsupported_field",
                )
            return self.texts.of_source(request.chat_template)
        templates = target.own.templates
        if len(templates) > 1:
            raise invalid("The adapters have different chat templates: use /v1/completions.")
        return templates[0] if templates else None

    async def answer_completion(
        self,
        request: CompletionRequest,
        tenant: Tenant,
        place: Place,
        surface: Surface = COMPLETIONS,
    ) -> GenerationResponse:
        await place.hold(request.num_answers)
        target = await self._target(tenant, request, place)
        request = _as_answered(request, target)
        is_lenient = self.settings.lenient_schemas
        plan = await plan_completion(request, target, self.origin, is_lenient, surface.form)
        return await self._answer(plan, request, surface, tenant, place)

    async def answer_embeddings(
        self,
        request: EmbeddingRequest,
        tenant: Tenant,
        place: Place,
        route: str = EMBEDDINGS,
        form: Form | None = None,
        errors: ErrorForm = OPENAI_ERRORS,
    ) -> EmbeddingResponse:
        """Answer with vectors; of many texts, a few at a time count as the tenant's answers."""
        most = tenant.limits.max_concurrent_requests or AT_ONCE
        at_once = min(len(request.input), AT_ONCE, most)
        await place.hold(at_once)
        caller = caller_of(place.session, place.request_id, request.user)
        target = await self.target(tenant, request.model, caller)
        request = _as_answered(request, target)
        form = form or EmbeddingForm(request)
        plan = await plan_embeddings(request, target, self.origin, at_once, form)
        submits = urgent(plan.submits, place.urgency)
        plan = plan if submits is plan.submits else replace(plan, submits=submits)
        num_tokens = sum(len(submit.request.prompt_token_ids) for submit in plan.submits)
        await place.reserve(num_tokens, (), is_open=False)
        charge = self.metering.opener(tenant, target, route, submits[0].request)
        return EmbeddingResponse(plan, self.metrics, route, errors, charge, place.settle)

    async def _target(self, tenant: Tenant, request: OpenAIRequest, place: Place) -> Target:
        wanted = request.adapter_set
        if wanted is None:
            users = (request.user, request.safety_identifier)
            caller = caller_of(place.session, place.request_id, *users)
            return await self.target(tenant, request.model, caller)
        return await self._ready(await self.models.resolve_set(tenant, wanted))

    async def target(self, tenant: Tenant, name: str, caller: str = "") -> Target:
        """Find what a name means to a caller, with all that the adapter brings.

        Waits for the model's first replica, if it has none. Raises ApiError, AdapterStoreError,
        ModelNotReady.
        """
        return await self._ready(await self.models.resolve(tenant, name, caller))

    async def _ready(self, target: Target) -> Target:
        held_s = target.held_s + await target.model.link.ready()
        return await self.texts.equip(replace(target, held_s=held_s))

    async def _answer(
        self, plan: Plan, request: OpenAIRequest, surface: Surface, tenant: Tenant, place: Place
    ) -> GenerationResponse:
        urgency = place.urgency.in_class(request.priority_class)
        submits = urgent(plan.submits, urgency)
        plan = plan if submits is plan.submits else replace(plan, submits=submits)
        await reserve(place, plan, request.wanted_max_tokens is None)
        target = plan.target
        if target.adapter_ref is not None:
            ids = (place.request_id, plan.answer_id)
            self.feedback.remember(target.tenant, filter(None, ids), target.label, target.arm)
        return GenerationResponse(
            replace(
                in_session(plan, place.session), headers={**plan.headers, **plan.target.headers}
            ),
            bool(request.stream),
            self.metrics,
            surface.route,
            self.settings.keep_alive_s,
            surface.errors,
            surface.keep_alive,
            self.metering.opener(tenant, plan.target, surface.route, submits[0].request),
            settle=place.settle,
        )


def _as_answered(request: RequestT, target: Target) -> RequestT:
    """Name the version that answers, where versions share the name that was asked for."""
    name = target.answered_name(request.model)
    return request if name == request.model else request.model_copy(update={"model": name})


async def reserve(place: Place, plan: Plan, is_open: bool) -> None:
    """Take the tokens that a plan may use. `is_open`: the client names no max_tokens."""
    requests = [submit.request for submit in plan.submits]
    num_prompt = sum(len(request.prompt_token_ids) for request in requests)
    most = [request.sampling.max_tokens for request in requests for _ in range(request.n)]
    await place.reserve(num_prompt, () if plan.is_prompt_only else most, is_open)
