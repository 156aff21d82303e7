"""ErrorForm: how a surface writes errors."""

from deployments.ingress.http_errors import ApiError


class ErrorForm:
    """OpenAI's form. Another surface overrides what it writes otherwise."""

    def status(self, error: ApiError) -> int:
        return error.status

    def body(self, error: ApiError) -> bytes:
        return error.body()

    def event(self, error: ApiError) -> bytes:
        """Write the last event of a stream that an error ends."""
        return b"data: " + self.body(error) + b"\n\n"


OPENAI_ERRORS = ErrorForm()
