"""Parse and answer vLLM's and SGLang's requests that load and unload adapters."""

import json
from typing import Any, Literal

from pydantic import BaseModel, Field

from deployments.ingress.api.openai_fields import Model
from deployments.ingress.error_form import ErrorForm
from deployments.ingress.http_errors import ApiError

_VLLM_TYPES = {401: "AuthenticationError", 403: "PermissionDeniedError", 404: "NotFoundError"}
_INPUT_ERRORS = (400, 409)
_NOT_SGLANGS = (403, 404, 409)  # statuses that SGLang's clients get as 400


class VllmLoad(Model):
    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool | None = None
    base_model_name: str | None = None
    is_3d_lora_weight: Literal[False] | None = None  # of mixtures of experts


class VllmUnload(Model):
    lora_name: str = Field(min_length=1)
    lora_int_id: int | None = None  # names alone count


class SglangLoad(Model):
    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1, max_length=4096)
    pinned: Literal[False] | None = None  # adapters come and go with their requests
    base_model_name: str | None = None


class SglangUnload(Model):
    lora_name: str = Field(min_length=1)


class SglangAnswer(BaseModel):
    """`loaded_adapters` are the caller's own, by name, with the digest of the newest version."""

    success: bool
    error_message: str
    loaded_adapters: dict[str, str]


def loaded(name: str) -> str:
    return f"Success: LoRA adapter '{name}' added successfully."


def unloaded(name: str) -> str:
    return f"Success: LoRA adapter '{name}' removed successfully."


class VllmErrors(ErrorForm):
    """vLLM's body: the status is the code. A name that is taken is wrong input."""

    name = "VllmError"

    def status(self, error: ApiError) -> int:
        return 400 if error.status in _INPUT_ERRORS else error.status

    def body(self, error: ApiError) -> bytes:
        status = self.status(error)
        kind = "InvalidUserInput" if status == 400 else _VLLM_TYPES.get(status, error.type)
        fields = {"message": error.message, "type": kind, "param": error.param, "code": status}
        return json.dumps({"error": fields}, ensure_ascii=False).encode()

    def schema(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"message": {"type": "string"}, "type": {"type": "string"}}
        fields |= {"param": {"type": ["string", "null"]}, "code": {"type": "integer"}}
        error = {"type": "object", "properties": fields, "required": list(fields)}
        return {"type": "object", "properties": {"error": error}, "required": ["error"]}


class SglangErrors(ErrorForm):
    """SGLang's body of what did not succeed."""

    name = "SglangError"

    def status(self, error: ApiError) -> int:
        return 400 if error.status in _NOT_SGLANGS else error.status

    def body(self, error: ApiError) -> bytes:
        answer = SglangAnswer(success=False, error_message=error.message, loaded_adapters={})
        return json.dumps(answer.model_dump(), ensure_ascii=False).encode()

    def schema(self) -> dict[str, Any]:
        return SglangAnswer.model_json_schema()


VLLM_ERRORS = VllmErrors()
SGLANG_ERRORS = SglangErrors()
