"""Endpoint: one route as an ASGI application."""

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Protocol, cast

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.ingress.error_form import OPENAI_ERRORS, ErrorForm
from deployments.ingress.http_errors import ApiError, as_api_error
from deployments.ingress.metrics import Metrics
from deployments.ingress.rate_headers import with_headers
from deployments.ingress.request_id import request_id
from deployments.ingress.streaming import CLIENT_GONE, EngineResponse, ErrorResponse

_PLACE = "reef.place"
Handler = Callable[[HttpRequest, ExitStack], Awaitable[Response]]


class Limited(Protocol):
    """What is known of the limits that a request counts against."""

    is_limited: bool

    def headers(self) -> dict[str, str]: ...


def note_place(scope: Scope, place: Limited) -> None:
    """Have the answer, whatever it will be, say what is left of the limits."""
    scope[_PLACE] = place


class Endpoint:
    """Errors become answers, and every answer is counted under the path.

    What a handler enters into `held` is exited once the answer is sent or the client is gone.
    """

    def __init__(
        self, path: str, handler: Handler, metrics: Metrics, errors: ErrorForm = OPENAI_ERRORS
    ) -> None:
        self._path = path
        self._handler = handler
        self._metrics = metrics
        self._errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as held:
            response = await self._respond(HttpRequest(scope, receive), held)
            place = cast(Limited | None, scope.get(_PLACE))
            if place is not None and place.is_limited:
                send = with_headers(send, place.headers)
            await response(scope, receive, send)

    async def _respond(self, http_request: HttpRequest, held: ExitStack) -> Response:
        try:
            response = await self._handler(http_request, held)
        except ClientDisconnect:
            gone = ApiError(CLIENT_GONE, "The client went away.")
            response = ErrorResponse(gone, self._errors)
        except Exception as error:
            what = f"{self._path}, request {request_id(http_request.scope)},"
            response = ErrorResponse(as_api_error(error, what), self._errors)
        if not isinstance(response, EngineResponse):  # that one counts itself, at its end
            self._metrics.count_answer(self._path, response.status_code)
        return response
