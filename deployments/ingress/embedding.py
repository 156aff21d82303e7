"""Embed the texts of one request: plan, submit a few at a time, write each vector as it comes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.fleet.protocol import Submit
from deployments.ingress.api.embeddings import EmbeddingRequest, Vector
from deployments.ingress.api.openai_fields import short
from deployments.ingress.error_form import OPENAI_ERRORS, ErrorForm
from deployments.ingress.http_errors import as_api_error, from_engine, internal, invalid
from deployments.ingress.metering import OpenCharge, free_of_charge
from deployments.ingress.metrics import Metrics
from deployments.ingress.model_resolver import Target
from deployments.ingress.planning import Origin, check_token_ids
from deployments.ingress.prompt_texts import encode_prompts, kept_tokens, text_too_long
from deployments.ingress.streaming import EngineResponse, ErrorResponse, Settle, keep_reserved
from engine.messages import EngineInfo, GenerateRequest, Item, RequestOutput
from engine.scheduler.request import SamplingParams

AT_ONCE = 32  # texts of one request that are in the engines at a time
MAX_VALUES = 2**22  # numbers in one answer


class Form(Protocol):
    """Writes a surface's answer."""

    def part(self, index: int, vector: Vector) -> bytes: ...

    def whole(
        self, reply_id: str, created: int, parts: Sequence[bytes], num_tokens: int
    ) -> bytes: ...


@dataclass(frozen=True, slots=True)
class EmbeddingPlan:
    """What to submit, and what becomes of the hidden states that come back."""

    model_name: str
    target: Target
    submits: Sequence[Submit]
    at_once: int
    dimensions: int
    normalize: bool
    form: Form
    reply_id: str
    created: int

    def vector(self, embedding: bytes) -> Vector:
        """Cut a pooled hidden state to `dimensions`, and normalise what is left."""
        values = np.frombuffer(embedding, "<f4")[: self.dimensions].astype(np.float64)
        if self.normalize:
            values = values / max(float(np.linalg.norm(values)), 1e-12)
        return values.astype(np.float32)


async def plan_embeddings(
    request: EmbeddingRequest, target: Target, origin: Origin, at_once: int, form: Form
) -> EmbeddingPlan:
    """Check everything that can be checked without the engine. Raises ApiError, ModelNotReady."""
    use = target.model.embeddings
    if use.pooling is None:
        message = f"The model {target.model.id!r} is not served for embeddings: {use.refusal}."
        raise invalid(message, "model")
    info = target.engine
    dimensions = _dimensions(request, info)
    prompts = await _prompts(request, target, info)
    reply_id = f"embd-{origin.new_id()}"
    sampling = SamplingParams(max_tokens=1, pooling=use.pooling)
    submits = [
        Submit(
            GenerateRequest(
                request_id=f"{reply_id}-{at}",
                prompt_token_ids=prompt,
                sampling=sampling,
                tenant=target.tenant,
                cache_salt=request.cache_salt or "",
                priority=request.priority or 0,
                weight=target.weight,
            ),
            target.adapter_ref,
        )
        for at, prompt in enumerate(prompts)
    ]
    return EmbeddingPlan(
        request.model,
        target,
        submits,
        min(at_once, target.model.max_answers),
        dimensions,
        use.normalize if request.normalize is None else request.normalize,
        form,
        reply_id,
        int(origin.now()),
    )


def _dimensions(request: EmbeddingRequest, info: EngineInfo) -> int:
    most, num = info.hidden_size, len(request.input)
    dimensions = most if request.dimensions is None else request.dimensions
    if dimensions > most:
        raise invalid(f"dimensions must be in [1, {most}], not {short(dimensions)}.", "dimensions")
    if num * dimensions > MAX_VALUES:
        raise invalid(
            f"{num} vectors of {dimensions} dimensions are {num * dimensions} numbers; an answer "
            f"has at most {MAX_VALUES}, so ask for at most {MAX_VALUES // dimensions} at a time.",
            "input",
        )
    return dimensions


async def _prompts(request: EmbeddingRequest, target: Target, info: EngineInfo) -> list[list[int]]:
    """Take the token ids that were given, or encode the texts, and cut them."""
    limit, one = info.max_model_len, len(request.input) == 1
    paths = ["input" if one else f"input[{at}]" for at in range(len(request.input))]
    prompts = await encode_prompts(
        target.vocabulary,
        dict(zip(paths, request.input, strict=True)),
        request.add_special_tokens is not False,
        limit,
        kept_tokens(request.truncate_prompt_tokens, limit),
        text_too_long,
    )
    for path, prompt in zip(paths, prompts, strict=True):
        if not prompt:
            raise invalid("The text is empty: it has no tokens.", path)
        if len(prompt) > limit:
            raise text_too_long(path, len(prompt), limit)
        check_token_ids(path, prompt, target.vocab_size)
    return prompts


class EmbeddingResponse(EngineResponse):
    """Runs a plan and sends its answer."""

    def __init__(
        self,
        plan: EmbeddingPlan,
        metrics: Metrics,
        route: str,
        errors: ErrorForm = OPENAI_ERRORS,
        open_charge: OpenCharge = free_of_charge,
        settle: Settle = keep_reserved,
    ) -> None:
        super().__init__(metrics, route, open_charge)
        self._settle = settle
        self._plan = plan
        self._errors = errors
        self._num_prompt = self._num_cached = 0  # tokens of the texts that have their vectors
        self._load_bytes = 0
        self._queue_s = 0.0

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> int:
        try:
            headers = self._plan.target.headers
            response = Response(await self._whole(), 200, headers, "application/json")
        except Exception as error:
            self._charge.waive()
            self._settle(0, 0)
            response = ErrorResponse(as_api_error(error, "an embedding"), self._errors)
        await response(scope, receive, send)
        return response.status_code

    async def _whole(self) -> bytes:
        """Have all texts embedded, a few at a time. Raises ApiError."""
        plan = self._plan
        parts: list[bytes] = [b""] * len(plan.submits)
        for start in range(0, len(plan.submits), plan.at_once):
            few = plan.submits[start : start + plan.at_once]
            places = {submit.request.request_id: start + at for at, submit in enumerate(few)}
            queue = plan.target.model.link.open(few)
            try:
                while places:
                    for output in _outputs(await queue.next_batch()):
                        at = places.pop(output.request_id)
                        parts[at] = plan.form.part(at, self._vector_of(output, plan.submits[at]))
            finally:
                plan.target.model.link.release(queue)
        num_tokens = sum(len(submit.request.prompt_token_ids) for submit in plan.submits)
        return plan.form.whole(plan.reply_id, plan.created, parts, num_tokens)

    def _vector_of(self, output: RequestOutput, submit: Submit) -> Vector:
        plan, metrics = self._plan, output.metrics
        if output.error is not None:
            raise from_engine(output.error, plan.model_name)
        if output.embedding is None:
            raise internal()
        label, num_prompt = plan.target.label, len(submit.request.prompt_token_ids)
        num_cached = 0 if metrics is None else metrics.num_cached_tokens
        self._metrics.count_tokens(label, num_prompt, num_cached, 0)
        self._metrics.vllm.count_tokens(plan.target.model.id, num_prompt, 0)
        if metrics is not None:
            self._metrics.observe_queue(label, metrics.queue_s)
            self._queue_s = max(self._queue_s, metrics.queue_s)
            self._load_bytes += metrics.load_bytes
        self._num_prompt += num_prompt
        self._num_cached += num_cached
        read = self._num_prompt, self._num_cached, self._load_bytes
        self._charge.read(*read, self._queue_s, None)
        return plan.vector(output.embedding)


def _outputs(items: Sequence[Item]) -> Iterator[RequestOutput]:
    """Walk through outputs; requests with pooling have one each, and no tokens."""
    return (item for item in items if not isinstance(item, tuple))
