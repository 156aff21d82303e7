"""Routes: all APIs of an ingress replica as one ASGI application."""

from collections.abc import Sequence
from http import HTTPStatus

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Scope

from deployments.ingress.asgi import Api
from deployments.ingress.base_paths import BasePaths, route_path
from deployments.ingress.browser_guard import BrowserGuard
from deployments.ingress.error_form import OPENAI_ERRORS
from deployments.ingress.http_errors import ApiError
from deployments.ingress.ingress import Ingress
from deployments.ingress.streaming import ErrorResponse
from deployments.ingress.surfaces.adapters import adapter_routes
from deployments.ingress.surfaces.admin import admin_routes
from deployments.ingress.surfaces.anthropic import anthropic_routes
from deployments.ingress.surfaces.document import document_routes
from deployments.ingress.surfaces.feedback import feedback_routes
from deployments.ingress.surfaces.keys import key_routes
from deployments.ingress.surfaces.lorax import lorax_routes
from deployments.ingress.surfaces.models import model_routes
from deployments.ingress.surfaces.openai import openai_routes
from deployments.ingress.surfaces.operation import operation_routes
from deployments.ingress.surfaces.responses import responses_routes
from deployments.ingress.surfaces.tokens import token_routes

SURFACES = (
    openai_routes,
    responses_routes,
    anthropic_routes,
    lorax_routes,
    token_routes,
    feedback_routes,
    adapter_routes,
    admin_routes,
    key_routes,
    model_routes,
    operation_routes,
)


def build_api(
    ingress: Ingress, guard: BrowserGuard | None = None, sends_request_id: bool = True
) -> Api:
    routes = [route for surface in SURFACES for route in surface(ingress)]
    routes += document_routes(ingress, lambda: routes)
    forms = {route.path: route.errors for route in routes}
    bases = BasePaths(ingress.models.by_id)

    def no_route(scope: Scope, methods: Sequence[str]) -> Response:
        path = HttpRequest(scope).url.path
        allow = ", ".join(sorted({*methods, "OPTIONS"})) if methods else None
        if allow is not None and scope["method"] == "OPTIONS":
            ingress.metrics.count_answer("none", 204)
            return Response(status_code=204, headers={"allow": allow})
        status = 405 if methods else 404
        message = f"{HTTPStatus(status).phrase}: {scope['method']} {path}"
        error = ApiError(status, message, allow=allow)
        stranger = None if methods else bases.stranger(path)
        return answer(error if stranger is None else stranger, path)

    def refuse(scope: Scope) -> Response | None:
        refusal = None if guard is None else guard.refusal(scope)
        return None if refusal is None else answer(refusal, scope["path"])

    def answer(error: ApiError, path: str) -> Response:
        ingress.metrics.count_answer("none", error.status)
        return ErrorResponse(error, forms.get(route_path(path), OPENAI_ERRORS))

    origins = ingress.settings.cors_origins or ()
    return Api(
        routes, no_route, origins, None if guard is None else refuse, bases, sends_request_id
    )
