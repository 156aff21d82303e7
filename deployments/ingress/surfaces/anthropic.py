"""Anthropic's Messages API."""

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deployments.ingress.api.anthropic import MessagesRequest, PromptRequest
from deployments.ingress.api.anthropic_answers import AnthropicMessage, TokenCount
from deployments.ingress.api.anthropic_errors import ANTHROPIC_ERRORS, OVERLOADED
from deployments.ingress.api.anthropic_replies import PING, MessagesReply
from deployments.ingress.api.openai_fields import parse_request
from deployments.ingress.api.own_names import own_names
from deployments.ingress.api_route import JSON, ApiRoute, RouteDoc
from deployments.ingress.http_errors import invalid
from deployments.ingress.ingress import Ingress, Surface, TenantHandler
from deployments.ingress.reply_form import ReplyForm, ReplyParts
from deployments.ingress.tenant_limiter import Place
from deployments.tenants.tenant import Tenant

MESSAGES = "/v1/messages"
CREATE = RouteDoc(
    "The model's answer to a chat, in Anthropic's form.",
    MessagesRequest,
    AnthropicMessage,
    streams=True,
    statuses={OVERLOADED: "The queue is full."},
)
COUNT = RouteDoc("How many tokens a prompt has.", PromptRequest, TokenCount)


def anthropic_routes(ingress: Ingress) -> list[ApiRoute]:
    async def create(http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        request = parse_request(MessagesRequest, await ingress.document(http_request))
        await _check_thinking(ingress, request, tenant)
        with own_names(request.names):
            return await ingress.answer_chat(request.chat(), tenant, place, _surface(request))

    async def count(http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        request = parse_request(PromptRequest, await ingress.document(http_request))
        await _check_thinking(ingress, request, tenant)
        with own_names(request.names):
            _, token_ids = await ingress.encode_chat(request.chat(), tenant)
        return Response(msgspec.json.encode({"input_tokens": len(token_ids)}), media_type=JSON)

    def route(path: str, handler: TenantHandler, doc: RouteDoc) -> ApiRoute:
        return ingress.tenant_route("POST", path, handler, ANTHROPIC_ERRORS, doc, True)

    return [route(MESSAGES, create, CREATE), route(f"{MESSAGES}/count_tokens", count, COUNT)]


async def _check_thinking(ingress: Ingress, request: PromptRequest, tenant: Tenant) -> None:
    """Refuse reasoning that is asked for where the model has none. Raises ApiError."""
    if not request.wants_thinking:
        return
    target = await ingress.target(tenant, request.model)
    if not (await target.syntax()).can_reason:
        raise invalid(
            "thinking.type: this model does not think: its chat template has no tags for it. "
            "Leave thinking out, or send 'adaptive'.",
            "thinking.type",
            "unsupported_field",
        )


def _surface(request: MessagesRequest) -> Surface:
    def make(parts: ReplyParts) -> MessagesReply:
        return MessagesReply(
            parts.head, parts.new_call_id, request.max_tokens, parts.shows_reasoning
        )

    return Surface(MESSAGES, ReplyForm("msg_", make), ANTHROPIC_ERRORS, PING)
