"""Scores that clients give to answers."""

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deployments.ingress.api.feedback import FeedbackAnswer, FeedbackRequest
from deployments.ingress.api.openai_fields import parse_request
from deployments.ingress.api_route import ApiRoute, RouteDoc, json_answer
from deployments.ingress.http_errors import ApiError
from deployments.ingress.ingress import Ingress
from deployments.ingress.tenant_limiter import Place
from deployments.tenants.tenant import Tenant

DOC = RouteDoc(
    "Score an answer that was given a short time ago.",
    FeedbackRequest,
    FeedbackAnswer,
    statuses={404: "No such answer of yours in the last hour."},
)


def feedback_routes(ingress: Ingress) -> list[ApiRoute]:
    async def rate(http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        request = parse_request(FeedbackRequest, await ingress.raw_document(http_request))
        comment = request.comment or ""
        counted = await ingress.feedback.rate(
            tenant.name, request.answer_id, request.score, comment
        )
        if counted is None:
            param = "request_id" if request.id is None else "id"
            message = f"You have had no answer {request.answer_id!r} in the last hour."
            raise ApiError(404, message, param=param, code="answer_not_found")
        answer = FeedbackAnswer(id=request.answer_id, counted=counted)
        return json_answer(answer)

    return [ingress.tenant_route("POST", "/v1/feedback", rate, doc=DOC)]
