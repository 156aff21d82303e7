"""LoRAX's routes: prompts without a chat template, adapters as a parameter."""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deployments.fleet.held_requests import ModelNotReady
from deployments.ingress.api.lorax import (
    LoraxAnswer,
    LoraxEmbedRequest,
    LoraxRequest,
    LoraxVector,
    as_completion,
    parse_lorax,
)
from deployments.ingress.api.lorax_replies import LORAX_ERRORS, Asked, LoraxEmbeddingForm
from deployments.ingress.api.openai_fields import MAX_STOPS, parse_request
from deployments.ingress.api_route import ApiRoute, RouteDoc
from deployments.ingress.base_paths import as_fields, base_of
from deployments.ingress.health import health_of
from deployments.ingress.ingress import Ingress, Surface
from deployments.ingress.model_resolver import ServedModel
from deployments.ingress.surfaces.operation import HEALTH_DOC
from deployments.ingress.tenant_limiter import Place
from deployments.tenants.tenant import Tenant
from deployments.tenants.tenants import KeyRefused
from engine.messages import EngineInfo
from engine.validate import MAX_CHOICES

Clock = Callable[[], float]


WHOLE = RouteDoc("LoRAX's answer to a prompt that is taken as it is.", LoraxRequest, LoraxAnswer)
LISTED = RouteDoc(
    "LoRAX's answer to a prompt that is taken as it is, in a list of one.",
    LoraxRequest,
    {"type": "array", "items": {"type": "object"}},
    streams=True,
)
STREAM = RouteDoc(
    "LoRAX's answer to a prompt that is taken as it is, an event for each token.",
    LoraxRequest,
    media_type="text/event-stream",
)
EMBED = RouteDoc("LoRAX's vector of a text.", LoraxEmbedRequest, LoraxVector)
INFO = RouteDoc("A base model and its limits, as LoRAX describes one.", answer={"type": "object"})


def lorax_routes(ingress: Ingress, clock: Clock = time.monotonic) -> list[ApiRoute]:
    def generation(path: str, stream: bool | None, doc: RouteDoc) -> ApiRoute:
        async def generate(http_request: HttpRequest, held: ExitStack) -> Response:
            began_s = clock()
            document, tenant, place = await _identified(ingress, http_request, held)
            request = parse_lorax(document, stream)
            seed = request.asked.seed
            seed = ingress.origin.new_seed() if seed is None else seed
            asked = Asked(request, seed, stream is None, began_s, clock)
            surface = Surface(path, asked.form(), LORAX_ERRORS)
            completion = as_completion(request, _base(ingress).id, seed)
            return await ingress.answer_completion(completion, tenant, place, surface)

        return ingress.route("POST", path, generate, LORAX_ERRORS, doc, needs_key=True)

    async def embed(http_request: HttpRequest, held: ExitStack) -> Response:
        document, tenant, place = await _identified(ingress, http_request, held)
        request = parse_request(LoraxEmbedRequest, document).as_embedding(_base(ingress).id)
        form = LoraxEmbeddingForm(request)
        return await ingress.answer_embeddings(request, tenant, place, "/embed", form, LORAX_ERRORS)

    async def info(http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        return _json(_describe(_base(ingress, base_of(http_request.scope))))

    async def health(http_request: HttpRequest, held: ExitStack) -> Response:
        models = ingress.models
        return health_of(list(models.by_id), models.outages, models.asleep)

    return [
        generation("/", None, LISTED),
        generation("/invocations", None, LISTED),
        generation("/generate", False, WHOLE),
        generation("/generate_stream", True, STREAM),
        ingress.route("POST", "/embed", embed, LORAX_ERRORS, EMBED, needs_key=True),
        ingress.tenant_route("GET", "/info", info, LORAX_ERRORS, INFO),
        *(
            ingress.route("GET", path, health, doc=HEALTH_DOC)
            for path in ("/", "/ping", "/startup")
        ),
    ]


async def _identified(
    ingress: Ingress, http_request: HttpRequest, held: ExitStack
) -> tuple[object, Tenant, Place]:
    """Read the body, and find out who asks: by the header, or else by its `api_token`.

    Raises KeyRefused, ApiError.
    """
    authorization = http_request.headers.get("authorization")
    try:
        tenant, place = await ingress.admit(http_request, held, authorization)
    except KeyRefused:
        if authorization is not None:
            raise
        document = await ingress.document(http_request)
        tenant, place = await ingress.admit(http_request, held, _bearer(document))
        return document, tenant, ingress.named(place, http_request, tenant)
    return await ingress.document(http_request), tenant, ingress.named(place, http_request, tenant)


def _bearer(document: object) -> str | None:
    """Write the header that a body's `api_token` stands for."""
    token = as_fields(as_fields(document).get("parameters")).get("api_token")
    return f"Bearer {token}" if isinstance(token, str) else None


def _base(ingress: Ingress, named: str | None = None) -> ServedModel:
    """Find the base model of requests that name none: the first one of the configuration."""
    models = ingress.models.by_id
    return next(iter(models.values())) if named is None else models[named]


def _info(model: ServedModel) -> EngineInfo:
    if model.link.hello is None:
        raise ModelNotReady
    return model.link.hello.engine


def _describe(model: ServedModel) -> dict[str, Any]:
    """Write /info. What LoRAX's batching alone knows has the value that means nothing waits."""
    info = _info(model)
    assert model.link.hello is not None, "_info raises without it"
    return {
        "model_id": model.id,
        "model_sha": model.link.hello.base_fingerprint,
        "model_dtype": info.dtype,
        "model_device_type": info.device,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": model.max_answers,
        "max_best_of": MAX_CHOICES,
        "max_stop_sequences": MAX_STOPS,
        "max_input_length": info.max_model_len - 1,
        "max_total_tokens": info.max_model_len,
        "waiting_served_ratio": 0.0,
        "max_batch_total_tokens": info.num_blocks * info.block_size,
        "max_waiting_tokens": 0,
        "validation_workers": 1,
        "eager_prefill": True,
        "version": version("reef"),
        "sha": None,
        "docker_label": None,
        "request_logger_url": None,
    }


def _json(document: object) -> Response:
    return Response(json.dumps(document, ensure_ascii=False), media_type="application/json")
