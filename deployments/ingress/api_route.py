"""ApiRoute: a route, and what the API's document says of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from deployments.ingress.error_form import OPENAI_ERRORS, ErrorForm

JSON = "application/json"
AnswerDoc = type[BaseModel] | Mapping[str, Any] | None


def json_answer(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type=JSON)


@dataclass(frozen=True, slots=True)
class RouteDoc:
    """What a route takes and gives.

    `body` may be several models, of which a request is one. `answer` is the JSON schema of a 200,
    or the model of one, or several of these. `statuses` are those of its own errors, beside what
    every route with the same kind of key and body may answer.
    """

    summary: str = ""
    body: type[BaseModel] | tuple[type[BaseModel], ...] | None = None
    answer: "AnswerDoc | tuple[AnswerDoc, ...]" = None
    media_type: str = JSON  # of a 200
    streams: bool = False  # with `stream` a 200 is a stream of events
    statuses: Mapping[int, str] = field(default_factory=dict[int, str])
    query: Mapping[str, str] = field(default_factory=dict[str, str])  # parameters, and what for
    needs_metrics_key: bool = False
    needs_admin_key: bool = False
    upload: Mapping[str, Any] | None = None  # a body that is not JSON: schemas by media type


class ApiRoute(Route):
    """One method of one path. `needs_key`: its requests belong to a tenant.

    Such a route is also found below a base model's id, which is then the model that is meant.
    """

    def __init__(
        self,
        method: str,
        path: str,
        app: ASGIApp,
        doc: RouteDoc,
        errors: ErrorForm = OPENAI_ERRORS,
        needs_key: bool = False,
    ) -> None:
        super().__init__(path, app, methods=[method])
        self.method = method
        self.doc = doc
        self.errors = errors
        self.needs_key = needs_key
