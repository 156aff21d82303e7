"""vLLM's /tokenize and /detokenize: text to the model's token ids and back; LoRAX's /tokenize."""

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deployments.ingress.api.openai_fields import parse_request
from deployments.ingress.api.tokens import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeChatRequest,
    TokenizeInputsRequest,
    TokenizeRequest,
    write,
)
from deployments.ingress.api_route import JSON, ApiRoute, RouteDoc
from deployments.ingress.base_paths import as_fields, set_model
from deployments.ingress.http_errors import invalid
from deployments.ingress.ingress import Ingress
from deployments.ingress.model_resolver import Target
from deployments.ingress.planning import check_token_ids
from deployments.ingress.prompt_texts import check_length, encode_texts, in_thread, prompt_too_long
from deployments.ingress.tenant_limiter import Place
from deployments.tenants.tenant import Tenant

TOKENIZE = RouteDoc(
    "The token ids of a text, or of the prompt that a chat becomes.",
    (TokenizeRequest, TokenizeChatRequest, TokenizeInputsRequest),
    (TokenizeAnswer, {"type": "array", "items": {"type": "object"}}),
)
DETOKENIZE = RouteDoc("The text of token ids.", DetokenizeRequest, DetokenizeAnswer)


def token_routes(ingress: Ingress) -> list[ApiRoute]:
    async def tokenize(http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        document = await _document(ingress, http_request)
        if "messages" in as_fields(document):
            request = parse_request(TokenizeChatRequest, document)
            return await _tokenize_chat(ingress, request, tenant)
        if "inputs" in as_fields(document):
            request = parse_request(TokenizeInputsRequest, document)
            return await _tokenize_inputs(ingress, request, tenant)
        return await _tokenize(ingress, parse_request(TokenizeRequest, document), tenant)

    async def detokenize(http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        request = parse_request(DetokenizeRequest, await _document(ingress, http_request))
        return await _detokenize(ingress, request, tenant)

    return [
        ingress.tenant_route("POST", "/tokenize", tokenize, doc=TOKENIZE),
        ingress.tenant_route("POST", "/detokenize", detokenize, doc=DETOKENIZE),
    ]


async def _document(ingress: Ingress, http_request: HttpRequest) -> object:
    """Read the body. Its model may be left out where there is one base alone."""
    document = await ingress.document(http_request)
    base_ids = list(ingress.models.by_id)
    if as_fields(document).get("model") in (None, ""):
        if len(base_ids) > 1:
            raise invalid(f"model is required: the base models are {', '.join(base_ids)}.", "model")
        set_model(document, base_ids[0])
    return document


async def _tokenize(ingress: Ingress, request: TokenizeRequest, tenant: Tenant) -> Response:
    target = await ingress.target(tenant, request.model)
    limit = target.engine.max_model_len
    add_special = request.add_special_tokens is not False
    texts = {"prompt": [request.prompt]}
    [token_ids] = await encode_texts(target.vocabulary, texts, add_special, limit)
    return await _tokens(target, "prompt", token_ids, request.return_token_strs is True)


async def _tokenize_chat(
    ingress: Ingress, request: TokenizeChatRequest, tenant: Tenant
) -> Response:
    target, token_ids = await ingress.encode_chat(request, tenant)
    return await _tokens(target, "messages", token_ids, request.return_token_strs is True)


async def _tokenize_inputs(
    ingress: Ingress, request: TokenizeInputsRequest, tenant: Tenant
) -> Response:
    """Answer LoRAX's form: a list of tokens, each with its first character and the one after."""
    target = await ingress.target(tenant, request.model)
    vocabulary, limit = target.vocabulary, target.engine.max_model_len
    check_length(vocabulary, "inputs", [request.inputs], limit)

    def body() -> bytes:
        return write(vocabulary.spans(request.inputs, request.add_special_tokens is not False))

    return Response(await in_thread(body, len(request.inputs)), media_type=JSON)


async def _tokens(target: Target, path: str, token_ids: list[int], with_texts: bool) -> Response:
    vocabulary, limit = target.vocabulary, target.engine.max_model_len
    if len(token_ids) > limit:
        raise prompt_too_long(path, len(token_ids), limit)

    def body() -> bytes:
        texts = [vocabulary.token(token_id) for token_id in token_ids] if with_texts else None
        fields = {"count": len(token_ids), "max_model_len": limit}
        return write({**fields, "tokens": token_ids, "token_strs": texts})

    return Response(await in_thread(body, len(token_ids)), media_type=JSON)


async def _detokenize(ingress: Ingress, request: DetokenizeRequest, tenant: Tenant) -> Response:
    target = await ingress.target(tenant, request.model)
    limit, token_ids = target.engine.max_model_len, request.tokens
    if len(token_ids) > limit:
        raise invalid(
            f"tokens: must have at most {limit} token ids, not {len(token_ids)}.", "tokens"
        )
    check_token_ids("tokens", token_ids, target.vocab_size)

    def body() -> bytes:
        return write({"prompt": target.vocabulary.decode(token_ids, False)})

    return Response(await in_thread(body, len(token_ids)), media_type=JSON)
