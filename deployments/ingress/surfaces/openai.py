"""OpenAI's chats, completions and embeddings."""

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deployments.ingress.api.answers import ChatCompletion, Completion, Embeddings
from deployments.ingress.api.embeddings import EmbeddingRequest
from deployments.ingress.api.openai import ChatCompletionRequest, CompletionRequest
from deployments.ingress.api.openai_fields import parse_request
from deployments.ingress.api_route import ApiRoute, RouteDoc
from deployments.ingress.ingress import CHAT, COMPLETIONS, EMBEDDINGS, Ingress
from deployments.ingress.tenant_limiter import Place
from deployments.tenants.tenant import Tenant

CHAT_DOC = RouteDoc(
    "The model's answer to a chat.", ChatCompletionRequest, ChatCompletion, streams=True
)
COMPLETIONS_DOC = RouteDoc(
    "The model's continuations of prompts.", CompletionRequest, Completion, streams=True
)

EMBEDDINGS_DOC = RouteDoc("The embeddings of texts.", EmbeddingRequest, Embeddings)


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
        ingress.tenant_route("POST", CHAT.route, chat, doc=CHAT_DOC),
        ingress.tenant_route("POST", COMPLETIONS.route, completion, doc=COMPLETIONS_DOC),
        ingress.tenant_route("POST", EMBEDDINGS, embeddings, doc=EMBEDDINGS_DOC),
    ]
