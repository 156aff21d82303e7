"""ErrorForm: how a surface writes errors."""

from typing import Any

from deployments.ingress.http_errors import ApiError

_TEXT_OR_NULL = {"type": ["string", "null"]}


class ErrorForm:
    """OpenAI's form. Another surface overrides what it writes otherwise.

    `name` and `schema` are what the API's document says of the body.
    """

    name = "Error"

    def schema(self) -> dict[str, Any]:
        fields = {"message": {"type": "string"}, "type": {"type": "string"}}
        fields |= {"param": _TEXT_OR_NULL, "code": _TEXT_OR_NULL}
        error = {"type": "object", "properties": fields, "required": list(fields)}
        return {"type": "object", "properties": {"error": error}, "required": ["error"]}

    def status(self, error: ApiError) -> int:
        return error.status

    def body(self, error: ApiError) -> bytes:
        return error.body()

    def event(self, error: ApiError) -> bytes:
        """Write the last event of a stream that an error ends."""
        return b"data: " + self.body(error) + b"\n\n"


OPENAI_ERRORS = ErrorForm()
