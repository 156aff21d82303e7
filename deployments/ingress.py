"""The HTTP side: the routes of one ingress replica.

`build_api` makes a FastAPI application of an Ingress; nothing here imports Ray or touches a
tensor. Requests are parsed, resolved and planned here; `responses` runs them.
"""

import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deployments.api.models import adapter_card, base_card, model_list, record_card
from deployments.api.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    parse_request,
)
from deployments.errors import ApiError, body_too_large, internal, invalid
from deployments.metrics import CONTENT_TYPE, Metrics
from deployments.models import Models, ServedModel
from deployments.planning import Origin, plan_chat, plan_completion
from deployments.responses import CLIENT_GONE, ErrorResponse, GenerationResponse

Handler = Callable[[Request], Awaitable[Response]]

logger = logging.getLogger(__name__)


def system_origin() -> Origin:
    return Origin(
        new_id=lambda: secrets.token_hex(12),
        new_seed=lambda: secrets.randbits(63),
        now=time.time,
    )


@dataclass(frozen=True, slots=True)
class Ingress:
    """What the routes work with, and the routes."""

    models: Models
    metrics: Metrics
    max_body_bytes: int
    created: int  # when this ingress began to serve, for the model cards
    origin: Origin = field(default_factory=system_origin)

    # ---- generation ----------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        parsed = parse_request(ChatCompletionRequest, await self._document(request))
        target = await self.models.resolve(parsed.model)
        plan = await plan_chat(parsed, target, self.origin)
        return GenerationResponse(plan, bool(parsed.stream), self.metrics, request.url.path)

    async def completion(self, request: Request) -> Response:
        parsed = parse_request(CompletionRequest, await self._document(request))
        target = await self.models.resolve(parsed.model)
        plan = await plan_completion(parsed, target, self.origin)
        return GenerationResponse(plan, bool(parsed.stream), self.metrics, request.url.path)

    async def _document(self, request: Request) -> object:
        body = await read_body(request, self.max_body_bytes)
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise invalid(f"The body is not valid JSON: {error}") from None

    # ---- models --------------------------------------------------------------------------

    async def list_models(self, request: Request) -> Response:
        cards = [self._base_card(model) for model in self.models.by_id.values()]
        for record in await self.models.list_adapters():
            parent = self.models.base_id(record.base)
            assert parent is not None, "list_adapters keeps to the served bases"
            cards.append(record_card(record, parent))
        return _json(model_list(cards))

    async def show_model(self, request: Request) -> Response:
        name = request.path_params["model_id"]
        target = await self.models.resolve(name)
        if target.adapter is None:
            return _json(self._base_card(target.model))
        digest = target.adapter.digest
        return _json(adapter_card(name, target.model.id, digest, self.created))

    def _base_card(self, model: ServedModel) -> dict[str, Any]:
        hello = model.link.hello
        max_model_len = None if hello is None else hello.engine.max_model_len
        return base_card(model.id, self.created, max_model_len)

    # ---- operation -----------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        for model in self.models.by_id.values():
            if model.link.hello is None:
                raise model.link.unavailable()
        return _json({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        models = self.models.by_id.values()
        stats = {model.id: await model.link.refresh_stats() for model in models}
        return Response(self.metrics.render(stats), media_type=CONTENT_TYPE)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Stops reading at the limit, whatever the client announced."""
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise body_too_large(max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def build_api(ingress: Ingress) -> FastAPI:
    api = FastAPI(openapi_url=None, redirect_slashes=False)

    def route(method: str, path: str, handler: Handler) -> None:
        api.add_api_route(path, _guard(ingress, handler), methods=[method], response_model=None)

    route("POST", "/v1/chat/completions", ingress.chat)
    route("POST", "/v1/completions", ingress.completion)
    route("GET", "/v1/models", ingress.list_models)
    route("GET", "/v1/models/{model_id:path}", ingress.show_model)
    route("GET", "/health", ingress.health)
    route("GET", "/metrics", ingress.show_metrics)

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        ingress.metrics.count_answer("none", error.status_code)
        message = f"{error.detail}: {request.method} {request.url.path}"
        return ErrorResponse(ApiError(error.status_code, message))

    api.add_exception_handler(HTTPException, no_route)
    return api


def _guard(ingress: Ingress, handler: Handler) -> Handler:
    """Errors become answers, and every answer is counted."""

    async def guarded(request: Request) -> Response:
        route = request.scope["route"].path
        try:
            response = await handler(request)
        except ApiError as error:
            response = ErrorResponse(error)
        except ClientDisconnect:
            response = ErrorResponse(ApiError(CLIENT_GONE, "The client went away."))
        except Exception:
            logger.exception("%s failed", route)
            response = ErrorResponse(internal())
        if not isinstance(response, GenerationResponse):  # that one counts itself, at its end
            ingress.metrics.count_answer(route, response.status_code)
        return response

    return guarded


def _json(document: dict[str, Any]) -> Response:
    return Response(json.dumps(document, ensure_ascii=False), media_type="application/json")
