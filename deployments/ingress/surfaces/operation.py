"""What operators ask: health and metrics."""

from contextlib import ExitStack

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deployments.ingress.api.answers import Health
from deployments.ingress.api_route import ApiRoute, RouteDoc
from deployments.ingress.engine_metrics import LinkFigures
from deployments.ingress.health import health_of
from deployments.ingress.http_errors import model_not_found
from deployments.ingress.ingress import Ingress
from deployments.ingress.metrics import CONTENT_TYPE
from deployments.ingress.model_resolver import ServedModel

_DOWN = {503: "No model can answer now."}
HEALTH_DOC = RouteDoc("Whether any model can answer.", answer=Health, statuses=_DOWN)
MODEL_DOC = RouteDoc(
    "Whether one base model can answer.",
    answer=Health,
    statuses={**_DOWN, 404: "No such base model."},
)
METRICS_DOC = RouteDoc(
    "Figures for Prometheus.",
    answer={"type": "string"},
    media_type="text/plain",
    statuses={401: "No metrics key, or one that is not valid."},
    needs_metrics_key=True,
)


def operation_routes(ingress: Ingress) -> list[ApiRoute]:
    models = ingress.models

    async def health(http_request: HttpRequest, held: ExitStack) -> Response:
        """Answer 200 while any model can answer, and name the state of each."""
        return health_of(list(models.by_id), models.outages, models.asleep)

    async def model_health(http_request: HttpRequest, held: ExitStack) -> Response:
        model_id = http_request.path_params["model_id"]
        model = models.by_id.get(model_id)
        if model is None:
            raise model_not_found(model_id)
        outage = model.outage
        outages = {} if outage is None else {model_id: outage}
        return health_of([model_id], outages, models.asleep)

    async def metrics(http_request: HttpRequest, held: ExitStack) -> Response:
        ingress.tenants.check_metrics(http_request.headers.get("authorization"))
        served = models.by_id.values()
        stats = {model.id: await model.link.refresh_stats() for model in served}
        links = {model.id: _figures(model) for model in served}
        return Response(await ingress.metrics.render(stats, links), media_type=CONTENT_TYPE)

    return [
        ingress.route("GET", "/health", health, doc=HEALTH_DOC),
        ingress.route("GET", "/health/{model_id:path}", model_health, doc=MODEL_DOC),
        ingress.route("GET", "/metrics", metrics, doc=METRICS_DOC),
    ]


def _figures(model: ServedModel) -> LinkFigures:
    link = model.link
    block_size = 0 if link.hello is None else link.hello.engine.block_size
    held = link.held
    starts = (0, 0, 0.0) if held is None else (held.num, held.num_starts, held.total_start_s)
    return LinkFigures(link.num_live, link.num_held, block_size, model.max_adapters, *starts)
