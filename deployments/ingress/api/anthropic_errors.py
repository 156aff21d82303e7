"""Write errors as Anthropic's API does."""

import json
from typing import Any

from deployments.ingress.error_form import ErrorForm
from deployments.ingress.http_errors import ApiError

OVERLOADED = 529  # Anthropic's status for a full queue
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    OVERLOADED: "overloaded_error",
}


class AnthropicErrors(ErrorForm):
    name = "AnthropicError"

    def schema(self) -> dict[str, Any]:
        fields = {"type": {"type": "string"}, "message": {"type": "string"}}
        error = {"type": "object", "properties": fields, "required": list(fields)}
        whole = {"type": {"const": "error"}, "error": error}
        return {"type": "object", "properties": whole, "required": list(whole)}

    def status(self, error: ApiError) -> int:
        return OVERLOADED if error.code == "overloaded" else error.status

    def body(self, error: ApiError) -> bytes:
        fields = {"type": self._type(self.status(error)), "message": error.message}
        return json.dumps({"type": "error", "error": fields}, ensure_ascii=False).encode()

    def event(self, error: ApiError) -> bytes:
        return b"event: error\ndata: " + self.body(error) + b"\n\n"

    def _type(self, status: int) -> str:
        return _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")


ANTHROPIC_ERRORS = AnthropicErrors()
