"""Translate our exceptions to HTTP: a status and an OpenAI error body.

The only file that knows which status an error has. Lower floors raise their own exceptions, which
`as_api_error` translates; `from_engine` translates an engine's reason for ending a request.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapter_store.errors import AdapterInvalid, AdapterStoreError
from deployments.fleet.held_requests import ModelNotReady
from deployments.policy.admission import Refusal
from deployments.tenants.tenants import KeyRefused, RightMissing
from engine.messages import ErrorKind, RequestError

MAX_NAME = 200  # characters of a name that an error repeats

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is an error. `type` and `code` are OpenAI's if it has one for the case."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None
    authenticate: str | None = None  # which credentials are wanted
    allow: str | None = None  # which methods there are
    accept_encoding: str | None = None  # which encodings a body may have

    def __str__(self) -> str:
        return self.message

    def document(self) -> dict[str, Any]:
        fields = {"message": self.message, "type": self.type, "param": self.param}
        return {"error": {**fields, "code": self.code}}

    def body(self) -> bytes:
        return json.dumps(self.document(), ensure_ascii=False).encode()

    def headers(self) -> dict[str, str]:
        after = None if self.retry_after_s is None else str(self.retry_after_s)
        named = {
            "retry-after": after,
            "www-authenticate": self.authenticate,
            "allow": self.allow,
            "accept-encoding": self.accept_encoding,
        }
        return {name: value for name, value in named.items() if value is not None}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def model_not_found(name: str) -> ApiError:
    name = name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}..."
    return ApiError(
        404,
        f"The model {name!r} does not exist or you do not have access to it.",
        param="model",
        code="model_not_found",
    )


def body_too_large(max_bytes: int) -> ApiError:
    message = f"The request body is larger than the limit of {max_bytes} bytes."
    return ApiError(413, message, code="request_too_large")


def body_too_slow(seconds: float) -> ApiError:
    return ApiError(408, f"The request body did not arrive within {seconds:.0f} s.")


def misdirected(host: str) -> ApiError:
    name = host if len(host) <= 200 else f"{host[:200]}..."
    return ApiError(
        421,
        f"This server is not asked as {name!r}: it serves its own machine without keys. Ask it as "
        "localhost, or name the host in the configuration (ingress.hosts).",
        code="misdirected_request",
    )


def not_json() -> ApiError:
    message = "The Content-Type must be application/json."
    return ApiError(415, message, code="unsupported_media_type")


def unknown_encoding(name: str) -> ApiError:
    return ApiError(
        415,
        f"The Content-Encoding {name[:80]!r} is not supported: send the body as it is, or as gzip.",
        code="unsupported_media_type",
        accept_encoding="gzip",
    )


def bad_key(message: str) -> ApiError:
    """Repeats nothing of the key: it may be right but for a letter."""
    return ApiError(401, message, code="invalid_api_key", authenticate='Bearer realm="reef"')


def forbidden(message: str) -> ApiError:
    return ApiError(403, message, "permission_error", code="permission_denied")


def rate_limited(refusal: Refusal) -> ApiError:
    after, what = refusal.retry_after_s, refusal.limit.replace("_", " ")
    message = f"The limit of {refusal.value} {what} is reached. Retry after {after} s."
    code = "rate_limit_exceeded"
    return ApiError(429, message, "rate_limit_error", code=code, retry_after_s=after)


def too_many_answers(num: int, most: int) -> ApiError:
    """Refuse what no retry can bring: more answers than may ever run at a time."""
    return invalid(
        f"The request asks for {num} answers (prompts x n), and at most {most} may run at a time.",
        "n",
    )


def too_many_tokens(num: int, limit: str, most: int) -> ApiError:
    """Refuse what no retry can bring: more tokens than there ever are at a time."""
    return invalid(
        f"The request may take {num} tokens, prompt and max_tokens together, and {limit} lets at "
        f"most {most} be used at a time.",
        "max_tokens",
    )


def overloaded(message: str, after_s: int | None = None) -> ApiError:
    after_s = 1 if after_s is None else after_s
    return ApiError(429, message, "rate_limit_error", code="overloaded", retry_after_s=after_s)


def unavailable(message: str, after_s: int = 2) -> ApiError:
    return ApiError(503, message, "server_error", code="unavailable", retry_after_s=after_s)


def too_late(message: str, after_s: int | None = None) -> ApiError:
    after_s = 1 if after_s is None else after_s
    return ApiError(503, message, "server_error", code="deadline_exceeded", retry_after_s=after_s)


def store_unavailable(error: AdapterStoreError) -> ApiError:
    """Make the answer; where the store is, and what is wrong with it, is for the log alone."""
    logger.error("the adapter store cannot be read: %s", error)
    return unavailable("The adapter store cannot be read now. Retry soon.")


def models_not_ready(model_ids: Sequence[str]) -> ApiError:
    which = ", ".join(map(repr, model_ids))
    return unavailable(f"Not ready, being loaded or restarted: {which}. Retry soon.")


def internal(message: str = "The server failed to process the request.") -> ApiError:
    return ApiError(500, message, "server_error", code="internal_error")


def from_engine(error: RequestError, model: str) -> ApiError:
    """Translate why the engine, or the replica around it, ended a request."""
    if error.kind == ErrorKind.INVALID_REQUEST:
        return invalid(error.message)
    if error.kind == ErrorKind.ADAPTER_NOT_FOUND:
        return model_not_found(model)
    if error.kind == ErrorKind.ADAPTER_INVALID:
        return invalid(f"The adapter {model!r} cannot be served: {error.message}", "model")
    if error.kind == ErrorKind.OVERLOADED:
        return overloaded(error.message, error.retry_after_s)
    if error.kind == ErrorKind.TOO_LATE:
        return too_late(error.message, error.retry_after_s)
    if error.kind in (
        ErrorKind.ENGINE_DIED,
        ErrorKind.ADAPTER_DAMAGED,
        ErrorKind.ADAPTER_UNAVAILABLE,
    ):
        return unavailable(error.message)
    logger.error("a request of %r ended with %s: %s", model, error.kind, error.message)
    return internal()  # what failed inside is for the log alone


def as_api_error(error: Exception, what: str) -> ApiError:
    """Translate what a lower floor raised. An unexpected exception is logged and becomes a 500.

    `what` names for the log what has failed.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, KeyRefused):
        return bad_key(str(error))
    if isinstance(error, RightMissing):
        return forbidden(str(error))
    if isinstance(error, AdapterInvalid):  # of a plain folder, which nobody has checked before
        return invalid(f"The adapter cannot be served: {error}.", "model")
    if isinstance(error, AdapterStoreError):
        return store_unavailable(error)
    if isinstance(error, ModelNotReady):
        return unavailable(str(error), error.retry_after_s)
    logger.error("%s failed", what, exc_info=error)
    return internal()
