"""Send answers as bare ASGI messages: whole documents, event streams, errors.

Starlette's own streaming costs a task group and several awaits per chunk; this is one await.
"""

import asyncio
from collections.abc import Callable
from typing import cast

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.ingress.error_form import OPENAI_ERRORS, ErrorForm
from deployments.ingress.generation import Generation, Plan
from deployments.ingress.http_errors import ApiError, as_api_error
from deployments.ingress.metering import OpenCharge, free_of_charge
from deployments.ingress.metrics import Metrics
from deployments.ingress.request_id import request_id
from deployments.usage.meter import NO_CHARGE, Charge

CLIENT_GONE = 499  # only the metrics show it

COMMENT = b": keep-alive\n\n"
_EVENT_STREAM = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


Settle = Callable[[int, int], None]  # given the tokens of prompts and answers


def keep_reserved(num_prompt: int, num_output: int) -> None:
    """Nothing was reserved."""


class ErrorResponse(Response):
    def __init__(self, error: ApiError, form: ErrorForm = OPENAI_ERRORS) -> None:
        super().__init__(form.body(error), form.status(error), error.headers(), "application/json")


class EngineResponse(Response):
    """Has an engine work for an answer, sends it, counts it and charges for it.

    If the client goes away meanwhile the work is cancelled at once, whether the server cancels
    this call or only reports it through `receive`.
    """

    def __init__(
        self, metrics: Metrics, route: str, open_charge: OpenCharge = free_of_charge
    ) -> None:
        super().__init__()
        self._metrics = metrics
        self._route = route
        self._open_charge = open_charge
        self._charge: Charge = NO_CHARGE
        self._reasons: set[str] = set()  # why the answer's choices have ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.current_task()
        assert work is not None
        is_gone = False

        def give_up(watch: asyncio.Task[None]) -> None:
            nonlocal is_gone
            is_gone = True
            work.cancel()
            if not watch.cancelled():
                watch.exception()  # how it ended makes no difference

        watch = asyncio.ensure_future(_disconnect(receive))
        watch.add_done_callback(give_up)
        status = CLIENT_GONE
        self._charge = self._open_charge(request_id(scope))
        try:
            status = await self._answer(scope, receive, send)
        except asyncio.CancelledError:
            # From `give_up`, unless the server has cancelled this call as well.
            if not is_gone or work.uncancel() > 0:
                raise
        finally:
            watch.remove_done_callback(give_up)
            watch.cancel()
            self._metrics.count_answer(self._route, status)
            if status >= 400:
                self._reasons.add("abort" if status == CLIENT_GONE else "error")
            self._charge.end(status, self._reasons)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> int:
        """Send everything. Returns the status."""
        raise NotImplementedError


class GenerationResponse(EngineResponse):
    """Runs a plan and sends its answer."""

    def __init__(
        self,
        plan: Plan,
        stream: bool,
        metrics: Metrics,
        route: str,
        keep_alive_s: float = 0.0,
        errors: ErrorForm = OPENAI_ERRORS,
        keep_alive: bytes = COMMENT,
        open_charge: OpenCharge = free_of_charge,
        settle: Settle = keep_reserved,
    ) -> None:
        super().__init__(metrics, route, open_charge)
        self._settle = settle
        self._errors = errors
        self._keep_alive_s = keep_alive_s
        self._keep_alive = keep_alive
        self._plan = plan
        self._stream = stream

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> int:
        try:
            generation = Generation(self._plan, self._metrics, charge=self._charge)
            try:
                if self._stream:
                    with KeepAlive(generation, self._keep_alive_s, self._keep_alive) as keep_alive:
                        await generation.start()
                        return await self._send_events(generation, keep_alive, scope, send)
                await generation.start()
                body = await generation.whole()
                response = Response(body, 200, generation.headers_of_whole(), "application/json")
            except asyncio.CancelledError:  # a client that leaves has had its prompt computed
                generation.leave()
                raise
            finally:
                self._reasons = generation.finish_reasons
                generation.close()
                self._settle(*generation.num_used)
        except Exception as error:
            self._charge.waive()
            response = ErrorResponse(as_api_error(error, _what(scope)), self._errors)
            await response(scope, receive, send)
        else:
            await response(scope, receive, send)
            generation.note_all_sent()
        return response.status_code

    async def _send_events(
        self, generation: Generation, keep_alive: "KeepAlive", scope: Scope, send: Send
    ) -> int:
        """Send an event stream. An error in it is its last event, in place of the usual one."""
        status = 200
        # A list of its own: middleware appends to it.
        more = ((name.encode(), value.encode()) for name, value in generation.headers().items())
        headers = [*_EVENT_STREAM, *more]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        try:
            events = generation.first_events() or keep_alive.take()
            while generation.is_open:
                if events:
                    await send({"type": "http.response.body", "body": events, "more_body": True})
                    generation.note_sent()
                events = await generation.next_events() or keep_alive.take()
        except Exception as error:
            failure = as_api_error(error, _what(scope))
            status = self._errors.status(failure)
            events = self._plan.reply.failing(failure, self._errors)
        await send({"type": "http.response.body", "body": events, "more_body": False})
        generation.note_sent()
        return status


class KeepAlive:
    """Wakes the reader of a stream each time that nothing has been heard for a while.

    One timer per stream, none per token.
    """

    def __init__(self, generation: Generation, period_s: float, news: bytes = COMMENT) -> None:
        self._generation = generation
        self._period_s = period_s
        self._news = news
        self._timer: asyncio.TimerHandle | None = None
        self._is_due = False

    def __enter__(self) -> "KeepAlive":
        if self._period_s:
            self._wait(self._period_s)
        return self

    def __exit__(self, *raised: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def take(self) -> bytes:
        """Return what keeps the stream open if it is due, else nothing."""
        is_due, self._is_due = self._is_due, False
        return self._news if is_due else b""

    def _wait(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        rest_s = self._period_s - self._generation.quiet_s % self._period_s
        self._is_due = self._generation.quiet_s >= self._period_s
        if self._is_due:
            self._generation.wake()
        self._wait(rest_s)


def _what(scope: Scope) -> str:
    return f"the generation of request {request_id(scope)}"


async def _disconnect(receive: Receive) -> None:
    while cast(str, (await receive())["type"]) != "http.disconnect":
        pass
