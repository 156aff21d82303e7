"""OpenAI's Responses API, without a store."""

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deployments.ingress.api.openai_fields import parse_request
from deployments.ingress.api.own_names import own_names
from deployments.ingress.api.responses import ResponsesRequest
from deployments.ingress.api.responses_replies import ResponsesReply
from deployments.ingress.api_route import ApiRoute, RouteDoc
from deployments.ingress.ingress import Ingress, Surface
from deployments.ingress.reply_form import ReplyForm, ReplyParts
from deployments.ingress.tenant_limiter import Place
from deployments.tenants.tenant import Tenant

RESPONSES = "/v1/responses"
DOC = RouteDoc("The model's answer, as items.", ResponsesRequest, {"type": "object"}, streams=True)


def responses_routes(ingress: Ingress) -> list[ApiRoute]:
    async def create(http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        document = await ingress.document(http_request)
        request = parse_request(ResponsesRequest, document)
        with own_names(request.names):
            surface = _surface(request, document)
            return await ingress.answer_chat(request.chat(), tenant, place, surface)

    return [ingress.tenant_route("POST", RESPONSES, create, doc=DOC)]


def _surface(request: ResponsesRequest, document: Any) -> Surface:
    def make(parts: ReplyParts) -> ResponsesReply:
        return ResponsesReply(parts.head, parts.new_call_id, _echoed(request, document))

    return Surface(RESPONSES, ReplyForm("resp_", make))


def _echoed(request: ResponsesRequest, document: Any) -> dict[str, Any]:
    """Repeat what the request asked for, as it was sent or with what holds without it."""
    defaults: dict[str, Any] = {
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "reasoning": {"effort": None, "summary": None},
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "user": None,
    }
    given = {name: document.get(name) for name in defaults}
    sent = {name: value for name, value in given.items() if value is not None}
    fixed = {"truncation": "disabled", "store": False, "background": False}
    return {**defaults, **sent, **fixed, "previous_response_id": None}
