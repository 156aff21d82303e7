"""Routes: all APIs of an ingress replica as one ASGI application."""

from collections.abc import Sequence
from http import HTTPStatus

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Scope

from deployments.ingress.asgi import Api
from deployments.ingress.browser_guard import BrowserGuard
from deployments.ingress.http_errors import ApiError
from deployments.ingress.ingress import Ingress
from deployments.ingress.streaming import ErrorResponse
from deployments.ingress.surfaces.models import model_routes
from deployments.ingress.surfaces.openai import openai_routes
from deployments.ingress.surfaces.operation import operation_routes

SURFACES = (openai_routes, model_routes, operation_routes)


def build_api(ingress: Ingress, guard: BrowserGuard | None = None) -> Api:
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

    routes = [route for surface in SURFACES for route in surface(ingress)]
    origins = ingress.settings.cors_origins or ()
    return Api(routes, no_route, origins, None if guard is None else refuse)
