"""Write the API's OpenAPI document: from the routes, and from the models that check requests."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from deployments.ingress.api_route import JSON, AnswerDoc, ApiRoute
from deployments.ingress.error_form import ErrorForm
from deployments.ingress.http_errors import ApiError

Document = dict[str, Any]
EVENTS = "text/event-stream"
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_REF = "#/components/schemas/{model}"
_ALWAYS = {421: "An open server on loopback was asked by a stranger's Host.", 500: "A fault."}
_WITH_KEY = {
    400: "A parameter or field is wrong, unknown or not supported.",
    401: "No key, or one that is not valid.",
    403: "The key may not do this, or not so urgently.",
    404: "No such model for this key.",
    429: "A limit is reached.",
    503: "The model or the adapter store cannot answer now.",
}
_WITH_BODY = {
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON, or its encoding is not supported.",
}


def openapi(
    routes: Sequence[ApiRoute], base_ids: Sequence[str], asks_for_keys: bool, version: str
) -> Document:
    """Describe all routes. Below a base's id are those of tenants, which is said of each."""
    schemas = _Schemas(routes)
    paths: dict[str, Document] = {}
    for route in routes:
        operation = _operation(route, schemas, base_ids, asks_for_keys)
        paths.setdefault(documented_path(route), {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Reef", "version": version},
        "paths": paths,
        "components": {
            "schemas": schemas.all,
            "headers": {"x-request-id": {"schema": {"type": "string"}}},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def documented_path(route: ApiRoute) -> str:
    """Return the route's path as OpenAPI writes it."""
    return _PARAMETER.sub(r"{\1}", route.path)


class _Schemas:
    """The schemas of all models, and references to them."""

    def __init__(self, routes: Iterable[ApiRoute]) -> None:
        routes = list(routes)
        bodies = [(model, "validation") for route in routes for model in bodies_of(route)]
        answers = [(each, "serialization") for route in routes for each in answers_of(route)]
        models = [pair for pair in (*bodies, *answers) if isinstance(pair[0], type)]
        unique: Any = list(dict.fromkeys(models))
        self._refs, definitions = models_json_schema(unique, ref_template=_REF)
        forms = {route.errors.name: route.errors.schema() for route in routes}
        self.all: Document = {**definitions.get("$defs", {}), **forms}

    def body(self, model: type[BaseModel]) -> Any:
        return self._refs[model, "validation"]

    def answer(self, answer: AnswerDoc) -> Any:
        if isinstance(answer, type):
            return self._refs[answer, "serialization"]
        return {} if answer is None else dict(answer)


def bodies_of(route: ApiRoute) -> tuple[type[BaseModel], ...]:
    body = route.doc.body
    return body if isinstance(body, tuple) else () if body is None else (body,)


def answers_of(route: ApiRoute) -> tuple[AnswerDoc, ...]:
    answer = route.doc.answer
    return answer if isinstance(answer, tuple) else (answer,)


def _operation(
    route: ApiRoute, schemas: _Schemas, base_ids: Sequence[str], asks_for_keys: bool
) -> Document:
    operation: Document = {"summary": route.doc.summary, "responses": _responses(route, schemas)}
    parameters = [
        *(_parameter(name, "path", "") for name in _PARAMETER.findall(route.path)),
        *(_parameter(name, "query", text) for name, text in route.doc.query.items()),
    ]
    if parameters:
        operation["parameters"] = parameters
    if route.method == "POST":
        refs = [schemas.body(model) for model in bodies_of(route)]
        schema = refs[0] if len(refs) == 1 else {"anyOf": refs} if refs else {}
        content = {JSON: {"schema": schema}} if route.doc.upload is None else route.doc.upload
        operation["requestBody"] = {"required": True, "content": dict(content)}
    if route.needs_key:
        base = {"default": base_ids[0], "enum": list(base_ids)}
        operation["servers"] = [{"url": "/"}, {"url": "/{base}", "variables": {"base": base}}]
    if route.needs_key or route.doc.needs_metrics_key or route.doc.needs_admin_key:
        operation["security"] = [{"key": []}] if asks_for_keys else []
    return operation


def _parameter(name: str, place: str, text: str) -> Document:
    described = {"description": text} if text else {}
    required = {"required": True} if place == "path" else {}
    return {"name": name, "in": place, **required, **described, "schema": {"type": "string"}}


def _responses(route: ApiRoute, schemas: _Schemas) -> Document:
    doc = route.doc
    answers = [schemas.answer(each) for each in answers_of(route)]
    answer = answers[0] if len(answers) == 1 else {"anyOf": answers}
    content: Document = {doc.media_type: {"schema": answer}}
    if doc.streams:
        content[EVENTS] = {"schema": {}}  # of one event; those of a stream differ
    headers = {"x-request-id": {"$ref": "#/components/headers/x-request-id"}}
    responses: Document = {
        "200": {"description": "The answer.", "headers": headers, "content": content}
    }
    schema = {"$ref": _REF.format(model=route.errors.name)}
    for status, text in sorted(_errors(route).items()):
        error = {"description": text, "headers": headers, "content": {JSON: {"schema": schema}}}
        responses.setdefault(str(status), error)
    return responses


def _errors(route: ApiRoute) -> dict[int, str]:
    errors = {
        **_ALWAYS,
        **(_WITH_KEY if route.needs_key else {}),
        **(_WITH_BODY if route.method == "POST" else {}),
        **route.doc.statuses,
    }
    return {written_status(route.errors, status): text for status, text in errors.items()}


def written_status(form: ErrorForm, status: int) -> int:
    """Return the status that a form writes for one of ours."""
    return form.status(ApiError(status, ""))
