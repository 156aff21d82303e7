"""OpenAI's Responses API, without a store."""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deployments.ingress.api.openai_fields import parse_request
from deployments.ingress.api.openai_replies import TokenWriter
from deployments.ingress.api.own_names import own_names
from deployments.ingress.api.responses import ResponsesRequest
from deployments.ingress.api.responses_answers import ResponseAnswer
from deployments.ingress.api.responses_echo import echoed
from deployments.ingress.api.responses_replies import ResponsesReply
from deployments.ingress.api_route import ApiRoute, RouteDoc
from deployments.ingress.http_errors import ApiError
from deployments.ingress.ingress import Ingress, Surface
from deployments.ingress.reply_form import ReplyForm, ReplyParts
from deployments.ingress.tenant_limiter import Place
from deployments.tenants.tenant import Tenant

RESPONSES = "/v1/responses"
TOO_LONG = "context_length_exceeded"
DOC = RouteDoc("The model's answer, as items.", ResponsesRequest, ResponseAnswer, streams=True)


def responses_routes(ingress: Ingress) -> list[ApiRoute]:
    async def create(http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        document = await ingress.document(http_request)
        request = parse_request(ResponsesRequest, document)
        surface = _surface(request, document)

        async def answer(num_dropped: int) -> Response:
            shortened = request.without_oldest(num_dropped) if num_dropped else request
            with own_names(shortened.names):
                return await ingress.answer_chat(shortened.chat(), tenant, place, surface)

        if request.truncation != "auto":
            return await answer(0)
        return await _truncated(answer, request.num_turns)

    return [ingress.tenant_route("POST", RESPONSES, create, doc=DOC)]


def _surface(request: ResponsesRequest, document: Any) -> Surface:
    repeated = echoed(request, document)

    def make(parts: ReplyParts) -> ResponsesReply:
        vocabulary = parts.vocabulary
        tokens = TokenWriter(vocabulary.token_text, vocabulary.token_bytes)
        return ResponsesReply(parts.head, parts.new_call_id, repeated, tokens)

    return Surface(RESPONSES, ReplyForm("resp_", make))


async def _truncated(answer: Callable[[int], Awaitable[Response]], num_turns: int) -> Response:
    """Answer with as few of the oldest turns dropped as the context needs. The last one stays.

    Raises ApiError if that alone is too long. Nothing is generated before the response is called,
    and a conversation is planned a few times: half of the turns that are left decide each time.
    """
    try:
        return await answer(0)
    except ApiError as error:
        if error.code != TOO_LONG or num_turns < 2:
            raise
    too_few, enough = 0, num_turns - 1
    best = await answer(enough)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        try:
            best = await answer(middle)
            enough = middle
        except ApiError as error:
            if error.code != TOO_LONG:
                raise
            too_few = middle
    return best
