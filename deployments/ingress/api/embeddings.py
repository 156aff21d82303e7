"""Requests for embeddings, as OpenAI has them, with vLLM's extras; and their answers."""

import base64
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from deployments.ingress.api.openai_fields import Inputs, Model, Priority

Vector = NDArray[np.float32]


class EmbeddingRequest(Model):
    model: str
    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)

    # vLLM's extras
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    add_special_tokens: bool | None = None
    normalize: bool | None = None
    cache_salt: str | None = Field(None, max_length=1024)

    # Accepted and ignored: they do not change the vectors.
    user: Any = None
    metadata: Any = None
    priority: Priority | None = None


class EmbeddingForm:
    """Writes OpenAI's answer, a part for each vector as it comes."""

    def __init__(self, request: EmbeddingRequest) -> None:
        self._request = request

    def part(self, index: int, vector: Vector) -> bytes:
        """Write one vector, float32 [dimensions]; base64 is of its bytes in little-endian order."""
        if self._request.encoding_format == "base64":
            value = b'"' + base64.b64encode(vector.astype("<f4").tobytes()) + b'"'
        else:
            value = msgspec.json.encode(vector.tolist())
        return b'{"object":"embedding","index":%d,"embedding":%b}' % (index, value)

    def whole(self, reply_id: str, created: int, parts: Sequence[bytes], num_tokens: int) -> bytes:
        head = {"id": reply_id, "object": "list", "created": created, "model": self._request.model}
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        start = msgspec.json.encode(head)[:-1]
        end = b'],"usage":%b}' % msgspec.json.encode(usage)
        return b"".join((start, b',"data":[', b",".join(parts), end))
