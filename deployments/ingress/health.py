"""Answer whether models can answer, for load balancers, probes and people."""

import json
from collections.abc import Collection, Mapping, Sequence

from starlette.responses import Response

from deployments.ingress.http_errors import models_not_ready

ASLEEP = {"status": "asleep"}


def health_of(
    model_ids: Sequence[str], outages: Mapping[str, str], asleep: Collection[str] = ()
) -> Response:
    """Write the state of each model. 503 if none of them can answer.

    One that is asleep has no replica and can answer, since a request starts one.
    """
    models = {
        model_id: ASLEEP if model_id in asleep else _state(outages.get(model_id))
        for model_id in model_ids
    }
    if len(outages) < len(model_ids):
        status = "degraded" if outages else "ok"
        return _json(200, {"status": status, "models": models}, {})
    error = models_not_ready(model_ids)
    document = {**error.document(), "status": "unavailable", "models": models}
    return _json(error.status, document, error.headers())


def _state(outage: str | None) -> dict[str, str]:
    return {"status": "ok"} if outage is None else {"status": "unavailable", "reason": outage}


def _json(status: int, document: Mapping[str, object], headers: Mapping[str, str]) -> Response:
    body = json.dumps(document, ensure_ascii=False)
    return Response(body, status, headers, "application/json")
