"""What the API says of itself: an OpenAPI document, and the same as a page."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from importlib.metadata import version

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deployments.ingress.api.docs_page import docs_page
from deployments.ingress.api.openapi import Document, openapi
from deployments.ingress.api_route import JSON, ApiRoute, RouteDoc
from deployments.ingress.ingress import Ingress

HTML = "text/html"
_PAGE_HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}


def document_routes(ingress: Ingress, routes: Callable[[], Sequence[ApiRoute]]) -> list[ApiRoute]:
    """Make the routes. `routes` gives all of the API's, these among them."""

    @cache
    def document() -> Document:
        base_ids = list(ingress.models.by_id)
        return openapi(routes(), base_ids, ingress.tenants.asks_for_keys, version("reef"))

    @cache
    def as_json() -> bytes:
        return msgspec.json.encode(document())

    @cache
    def as_page() -> str:
        return docs_page(document())

    async def show_json(http_request: HttpRequest, held: ExitStack) -> Response:
        return Response(await asyncio.to_thread(as_json), media_type=JSON)

    async def show_page(http_request: HttpRequest, held: ExitStack) -> Response:
        page = await asyncio.to_thread(as_page)
        return Response(page, headers=_PAGE_HEADERS, media_type=HTML)

    json_doc = RouteDoc("This document.", answer={"type": "object"})
    page_doc = RouteDoc("This document as a page.", answer={"type": "string"}, media_type=HTML)
    return [
        ingress.route("GET", "/openapi.json", show_json, doc=json_doc),
        ingress.route("GET", "/docs", show_page, doc=page_doc),
    ]
