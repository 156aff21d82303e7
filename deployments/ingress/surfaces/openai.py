"""OpenAI's chats, completions and embeddings."""

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deployments.ingress.api.embeddings import EmbeddingRequest
from deployments.ingress.api.openai import ChatCompletionRequest, CompletionRequest
from deployments.ingress.api.openai_fields import parse_request
from deployments.ingress.api_route import ApiRoute
from deployments.ingress.ingress import CHAT, COMPLETIONS, EMBEDDINGS, Ingress
from deployments.ingress.tenant_limiter import Place
from deployments.tenants.tenant import Tenant


def openai_routes(ingress: Ingress) -> list[ApiRoute]:
    async def chat(http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        request = parse_request(ChatCompletionRequest, await ingress.document(http_request))
        return await ingress.answer_chat(request, tenant, place)

    async def completion(http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        request = parse_request(CompletionRequest, await ingress.document(http_request))
        return await ingress.answer_completion(request, tenant, place)

    async def embeddings(http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        request = parse_request(EmbeddingRequest, await ingress.document(http_request))
        return await ingress.answer_embeddings(request, tenant, place)

    return [
        ingress.tenant_route("POST", CHAT.route, chat),
        ingress.tenant_route("POST", COMPLETIONS.route, completion),
        ingress.tenant_route("POST", EMBEDDINGS, embeddings),
    ]
