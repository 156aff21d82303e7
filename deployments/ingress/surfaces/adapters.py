"""Load and unload adapters while the server runs, as vLLM's and SGLang's clients do."""

import json

from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deployments.ingress.api.adapters import (
    SGLANG_ERRORS,
    VLLM_ERRORS,
    SglangAnswer,
    SglangLoad,
    SglangUnload,
    VllmLoad,
    VllmUnload,
    loaded,
    unloaded,
)
from deployments.ingress.api.openai_fields import parse_request
from deployments.ingress.api_route import JSON, ApiRoute, RouteDoc
from deployments.ingress.base_paths import base_of
from deployments.ingress.error_form import ErrorForm
from deployments.ingress.http_errors import ApiError, invalid, model_not_found, models_not_ready
from deployments.ingress.ingress import Ingress, TenantHandler
from deployments.ingress.runtime_adapters import LoadedBase, RuntimeAdapters
from deployments.ingress.tenant_limiter import Place
from deployments.tenants.tenant import Tenant

MAX_LISTED = 1000  # names in SGLang's answers
TEXT = "text/plain"
_LOAD = "Publish an adapter that lies where the server allows it."
_UNLOAD = "Retire an adapter of one's own."
_STATUSES = {403: "Adapters cannot be loaded here, or not with this key."}


def adapter_routes(ingress: Ingress) -> list[ApiRoute]:
    async def load(http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        adapters = _allowed(ingress, tenant)
        request = parse_request(VllmLoad, await ingress.raw_document(http_request))
        base = loaded_base(ingress, base_of(http_request.scope) or request.base_model_name)
        only_new = request.load_inplace is not True
        name, path = request.lora_name, request.lora_path
        await adapters.load(tenant.name, name, path, base, only_new)
        return Response(loaded(request.lora_name), media_type=TEXT)

    async def unload(http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        adapters = _allowed(ingress, tenant)
        request = parse_request(VllmUnload, await ingress.raw_document(http_request))
        await adapters.unload(tenant.name, request.lora_name)
        return Response(unloaded(request.lora_name), media_type=TEXT)

    async def sglang_load(http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        adapters = _allowed(ingress, tenant)
        request = parse_request(SglangLoad, await ingress.raw_document(http_request))
        base = loaded_base(ingress, base_of(http_request.scope) or request.base_model_name)
        name, path = request.lora_name, request.lora_path
        await adapters.load(tenant.name, name, path, base, True)
        return await _success(adapters, tenant)

    async def sglang_unload(http_request: HttpRequest, tenant: Tenant, place: Place) -> Response:
        adapters = _allowed(ingress, tenant)
        request = parse_request(SglangUnload, await ingress.raw_document(http_request))
        await adapters.unload(tenant.name, request.lora_name)
        return await _success(adapters, tenant)

    def route(path: str, handler: TenantHandler, errors: ErrorForm, doc: RouteDoc) -> ApiRoute:
        return ingress.tenant_route("POST", path, handler, errors, doc)

    return [
        route("/v1/load_lora_adapter", load, VLLM_ERRORS, _doc(_LOAD, VllmLoad)),
        route("/v1/unload_lora_adapter", unload, VLLM_ERRORS, _doc(_UNLOAD, VllmUnload)),
        route("/load_lora_adapter", sglang_load, SGLANG_ERRORS, _doc(_LOAD, SglangLoad)),
        route("/unload_lora_adapter", sglang_unload, SGLANG_ERRORS, _doc(_UNLOAD, SglangUnload)),
    ]


def _doc(summary: str, body: type[BaseModel]) -> RouteDoc:
    if body in (SglangLoad, SglangUnload):
        return RouteDoc(summary, body, SglangAnswer, statuses=_STATUSES)
    return RouteDoc(summary, body, {"type": "string"}, TEXT, statuses=_STATUSES)


def _allowed(ingress: Ingress, tenant: Tenant) -> RuntimeAdapters:
    """Return what loads adapters, if this tenant may use it. Raises ApiError."""
    adapters = ingress.adapters
    if adapters is None or not adapters.is_on:
        raise ApiError(403, "This server loads no adapters for clients (adapters.load_from).")
    if not tenant.may_publish:
        raise ApiError(403, "This key may not publish adapters (may_publish in the keys file).")
    return adapters


def loaded_base(ingress: Ingress, base: str | None, param: str = "base_model_name") -> LoadedBase:
    """Return the base that is meant, or the only one; `param` named it. Raises ApiError."""
    models = ingress.models.by_id
    if base is None and len(models) > 1:
        names = ", ".join(models)
        raise invalid(f"{param} is required: the bases are {names}.", param)
    model = next(iter(models.values())) if base is None else models.get(base)
    if model is None:
        raise model_not_found(str(base))
    if model.link.hello is None:
        raise models_not_ready([model.id])
    return LoadedBase(model.link.hello.base_fingerprint, model.folder)


async def _success(adapters: RuntimeAdapters, tenant: Tenant) -> Response:
    """List the tenant's own adapters; the newest version comes last."""
    records = await adapters.names(tenant.name, MAX_LISTED)
    names = {record.name: record.digest for record in records}
    fields = {"success": True, "error_message": "", "loaded_adapters": names}
    return Response(json.dumps(fields), media_type=JSON)
