"""An engine, an adapter store and a client that run in the test's own event loop.

Deterministic and steered by the test: the engine answers what it is told to, a step at a time,
stops when paused and dies on request.
"""

import asyncio
import json
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from adapter_store.chat_template import AdapterTemplate
from adapter_store.errors import AdapterNotFound
from adapter_store.names import AdapterRecord, AdapterRef
from adapter_store.own_files import NO_OWN_FILES, OwnFiles
from adapter_store.verdict import Verdict
from deployments.config_sections import IngressSection
from deployments.fleet.engine_link import EngineLink
from deployments.fleet.timing import Timing
from deployments.ingress.adapter_texts import AdapterTexts
from deployments.ingress.admin import Admin
from deployments.ingress.asgi import Api
from deployments.ingress.ingress import Ingress
from deployments.ingress.metering import Metering
from deployments.ingress.metrics import Metrics
from deployments.ingress.model_resolver import Models, ServedModel
from deployments.ingress.planning import Origin
from deployments.ingress.rollouts import Rollouts
from deployments.ingress.routes import build_api
from deployments.ingress.runtime_adapters import RuntimeAdapters
from deployments.ingress.tenant_limiter import TenantLimiter
from deployments.policy.backlog import QueueLimits
from deployments.replica.replica import EngineReplica, ReplicaSettings
from deployments.tenants.key_book import KeyBook
from deployments.tenants.tenants import Everybody, Tenants
from deployments.text.answer_syntax import find_syntax
from deployments.text.embedding_use import NO_EMBEDDINGS, EmbeddingUse
from deployments.text.vocabulary import Vocabulary
from deployments.usage.meter import Meter, NoMeter
from engine.client import EngineUnavailable
from engine.messages import (
    EngineInfo,
    EngineStats,
    ErrorKind,
    FlowTokens,
    GenerateRequest,
    RequestError,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from tests.deployments.support.fleet import LocalFleet

BASE = "b" * 64
HANG_S = 120.0  # pytest's own limit may end another task than the one that hangs
EOS = 256  # after the 256 bytes
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
INFO = EngineInfo(
    max_model_len=128,
    vocab_size=258,
    num_blocks=64,
    block_size=16,
    eos_token_ids=(EOS,),
    device="cpu",
    dtype="float32",
    kernels="torch",
    weight_bytes=1,
    hidden_size=4,
)


def byte_tokenizer() -> Tokenizer:
    """One token per byte, id = the byte; then <eos> and <pad>."""
    by_byte = {byte: char for char, byte in _alphabet().items()}
    vocabulary = {by_byte[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    return tokenizer


def _alphabet() -> dict[str, int]:
    """tokenizers' own: each byte that is a character by itself, then the rest in order."""
    own = [b for b in range(256) if chr(b) in set(pre_tokenizers.ByteLevel.alphabet())]
    rest = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + n): b for n, b in enumerate(rest)}


def byte_vocabulary(template: str | None = TEMPLATE) -> Vocabulary:
    return Vocabulary(byte_tokenizer(), {"eos_token": "<eos>"}, template)


def encode(text: str) -> list[int]:
    return list(text.encode())


# ---- the engine ----------------------------------------------------------------------------


@dataclass
class Live:
    request: GenerateRequest
    answers: dict[int, list[int]]  # of the choices that have not ended
    num_sent: int  # by this engine or by one before it


Answer = Callable[[GenerateRequest], list[int]]


def shout(request: GenerateRequest) -> list[int]:
    """The prompt in capitals, behind the adapter's first letters; then the end."""
    name = "" if request.adapter_folder is None else request.adapter_folder.digest[:3] + ":"
    prompt = bytes(i for i in request.prompt_token_ids if i < 256)
    return [*encode(name), *prompt.upper(), EOS]


class FakeEngine:
    """Gives every choice of every live request one token per step. `answer` says which, and is
    told the choice's own seed, as a real sampler is; a resumed request goes on where it was."""

    def __init__(self, answer: Answer = shout) -> None:
        self.on_frame: Callable[[list[RequestOutput]], None] = lambda outputs: None
        self.answer = answer
        self.info = INFO
        self.failure: str | None = None
        self.is_up = True
        self.requests: list[GenerateRequest] = []
        self.totals = EngineStats()
        self.aborted: list[str] = []
        self.elsewhere: list[FlowTokens] = []
        self.aborted_choices: list[tuple[str, int]] = []
        self.num_cached = 2  # tokens of every prompt
        self.load_bytes = 0  # of every request
        self.drafted = (0, 0)  # tokens drafted and accepted, of every choice
        self.held: set[str] = set()  # digests of adapters that are being loaded
        self.refused: dict[str, str] = {}  # why adapters cannot be served, by digest
        self.running = asyncio.Event()
        self.running.set()
        self._live: dict[str, Live] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def outage(self) -> str | None:
        return None if self.is_up else "the engine is being started again, since 1 s"

    @property
    def trouble(self) -> str | None:
        return None if self.is_up else f"{self.outage}; it had ended: killed"

    @property
    def stats(self) -> EngineStats:
        return replace(self.totals, num_running=len(self._live), num_blocks_total=64)

    async def start(self) -> EngineInfo:
        self._task = asyncio.create_task(self._run())
        return self.info

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def submit(self, request: GenerateRequest) -> None:
        if not self.is_up:
            raise EngineUnavailable("the engine is being started again")
        self.requests.append(request)
        seeds = [request.sampling.seed + index for index in range(request.n)]
        single = [replace(request, sampling=replace(request.sampling, seed=s)) for s in seeds]
        answers = {index: self.answer(choice) for index, choice in enumerate(single)}
        self._live[request.request_id] = Live(request, answers, len(request.output_token_ids))

    def count_elsewhere(self, served: Sequence[FlowTokens]) -> None:
        self.elsewhere.extend(served)

    def abort(self, request_id: str, index: int | None = None) -> None:
        if index is not None:
            self._abort_choice(request_id, index)
            return
        self.aborted.append(request_id)
        self._live.pop(request_id, None)

    def _abort_choice(self, request_id: str, index: int) -> None:
        self.aborted_choices.append((request_id, index))
        live = self._live.get(request_id)
        if live is not None and live.answers.pop(index, None) is not None:
            if not live.answers:
                del self._live[request_id]
            self.on_frame([RequestOutput(request_id, index, [], finish_reason="abort")])

    def die(self) -> None:
        """As a killed process: every live request ends with an error."""
        self.is_up = False
        error = RequestError(ErrorKind.ENGINE_DIED, "the engine died")
        lost, self._live = self._live, {}
        self.on_frame(
            [
                RequestOutput(request_id, index, [], finish_reason="error", error=error)
                for request_id, live in lost.items()
                for index in live.answers
            ]
        )

    async def _run(self) -> None:
        while True:
            await self.running.wait()
            await asyncio.sleep(0)
            self.step()

    def step(self) -> None:
        outputs = [o for live in list(self._live.values()) for o in self._advance(live)]
        if outputs:
            self.on_frame(outputs)

    def _advance(self, live: Live) -> list[RequestOutput]:
        folder = live.request.adapter_folder
        digest = "" if folder is None else folder.digest
        if digest in self.held:
            return []
        if digest in self.refused:
            del self._live[live.request.request_id]
            error = RequestError(ErrorKind.ADAPTER_INVALID, self.refused[digest])
            name = live.request.request_id
            return [
                RequestOutput(name, index, [], finish_reason="error", error=error)
                for index in live.answers
            ]
        if live.request.sampling.pooling is not None:
            del self._live[live.request.request_id]
            return [self._pooled(live)]
        outputs = [self._output(live, index) for index in list(live.answers)]
        live.num_sent += 1
        if not live.answers:
            del self._live[live.request.request_id]
        return outputs

    def _output(self, live: Live, index: int) -> RequestOutput:
        request, at = live.request, live.num_sent
        sampling = request.sampling
        answer = live.answers[index]
        token_id = answer[min(at, len(answer) - 1)]  # its end again and again, if it is ignored
        reason, stop = None, None
        if token_id in sampling.end_token_ids((EOS,)):
            reason, stop = "stop", token_id
        elif at + 1 == sampling.max_tokens:
            reason = "length"
        if reason is not None:
            del live.answers[index]
        is_first = at == len(request.output_token_ids) and index == 0
        return RequestOutput(
            request.request_id,
            index,
            [token_id],
            logprobs=None if sampling.logprobs is None else [_logprobs(token_id, sampling)],
            prompt_logprobs=_prompt_logprobs(request) if is_first else None,
            finish_reason=reason,
            stop_token_id=stop,
            metrics=self._metrics(live) if reason is not None or is_first else None,
        )

    def _pooled(self, live: Live) -> RequestOutput:
        """Make a vector of the prompt's length, its first and last token and the adapter's name."""
        request = live.request
        ids, folder = request.prompt_token_ids, request.adapter_folder
        values = (len(ids), ids[0], ids[-1], 0 if folder is None else len(folder.digest))
        return RequestOutput(
            request.request_id,
            0,
            [],
            finish_reason="stop",
            metrics=self._metrics(live),
            embedding=struct.pack("<4f", *values),
        )

    def _metrics(self, live: Live) -> RequestMetrics:
        num_prompt = len(live.request.prompt_token_ids)
        drafted, accepted = self.drafted
        metrics = RequestMetrics(0.01, num_prompt, self.num_cached, 1, drafted, accepted)
        return replace(metrics, load_bytes=self.load_bytes)


def _logprobs(token_id: int, sampling: Any) -> TokenLogprobs:
    top = tuple(((token_id + k) % 256, -0.5 - k) for k in range(sampling.logprobs))
    return TokenLogprobs(-0.5, top)


def _prompt_logprobs(request: GenerateRequest) -> list[TokenLogprobs | None] | None:
    if request.sampling.prompt_logprobs is None:
        return None
    return [None, *(TokenLogprobs(-2.0, ()) for _ in request.prompt_token_ids[1:])]


# ---- the adapter store ---------------------------------------------------------------------


class FakeStore:
    """Adapters by name; `fetch` stands for the download and may block or raise."""

    def __init__(self, *names: str) -> None:
        digests = {name: f"{name}-digest" for name in names}
        self.refs = {n: AdapterRef("public", n, 1, digest, BASE) for n, digest in digests.items()}
        self.pins: dict[str, int] = {}
        self.distrusted: list[str] = []
        self.fetched: list[str] = []
        self.templates: dict[str, AdapterTemplate | Exception] = {}  # by name or digest
        self.brought: dict[str, OwnFiles] = {}  # beside the templates, by name or digest
        self.own_files_read: list[str] = []
        self.verdicts: dict[str, Verdict] = {}  # by name
        self.fetch: Callable[[AdapterRef], None] = lambda ref: None

    def resolve(self, tenant: str, full_name: str, base: str | None = None) -> AdapterRef:
        name, _, version = full_name.partition("@")
        if name not in self.refs or version not in ("", "1", "latest"):
            raise AdapterNotFound(full_name)
        return self.refs[name]

    def resolve_first(self, places: Sequence[tuple[str, str | None]], full_name: str) -> AdapterRef:
        return self.resolve("public", full_name)

    def resolve_known(
        self, places: Sequence[tuple[str, str | None]], full_name: str
    ) -> AdapterRef | None:
        return None

    def list_from(self, tenant: str, first_name: str, num_names: int) -> Sequence[AdapterRecord]:
        return [
            AdapterRecord(
                *("public", ref.name, 1, ref.digest, ref.base, 8, 100, 1e9, ("latest",)),
                verdict=self.verdicts.get(ref.name),
            )
            for _, ref in sorted(self.refs.items())
            if ref.name >= first_name
        ][:num_names]

    def is_bare(self, ref: AdapterRef | str) -> bool:
        return False

    def own_files(self, ref: AdapterRef | str) -> OwnFiles:
        name = ref if isinstance(ref, str) else ref.name
        self.own_files_read.append(name)
        found = self.templates.get(name)
        if isinstance(found, Exception):
            raise found
        return replace(self.brought.get(name, NO_OWN_FILES), template=found)

    def find_local(self, ref: AdapterRef) -> Path | None:
        return None

    def distrust(self, digest: str) -> None:
        self.distrusted.append(digest)

    def ensure_local(self, ref: AdapterRef, is_wanted: object = None) -> Path:
        self.fetch(ref)
        self.fetched.append(ref.name)
        return Path("/adapters") / ref.digest

    def pin(self, digest: str) -> None:
        self.pins[digest] = self.pins.get(digest, 0) + 1

    def unpin(self, digest: str) -> None:
        self.pins[digest] -= 1


# ---- everything together -------------------------------------------------------------------


@dataclass
class Server:
    """One ingress in front of one replica, both in this process."""

    engine: FakeEngine
    store: FakeStore
    replica: EngineReplica
    connection: LocalFleet
    link: EngineLink
    api: Api
    metrics: Metrics
    ingress: Ingress

    async def call(
        self, method: str, path: str, body: object = None, key: str | None = None
    ) -> "Answered":
        raw = b"" if body is None else json.dumps(body).encode()
        return await call(self.api, method, path, raw, key)

    async def post(self, path: str, key: str | None = None, **body: Any) -> "Answered":
        return await self.call("POST", path, {"model": "base", **body}, key)


@asynccontextmanager
async def serving(
    engine: FakeEngine | None = None,
    store: FakeStore | None = None,
    vocabulary: Vocabulary | None = None,
    max_requests: int = 100,
    renew_s: float = 2.0,
    silence_s: float = 10.0,
    patience_s: float = 1.0,
    hello_s: float = 10.0,
    clock: Callable[[], float] | None = None,
    tenants: Tenants | None = None,
    clock_ns: Callable[[], int] = time.monotonic_ns,
    max_adapter_series: int = 200,
    ingress_settings: IngressSection | None = None,
    base_id: str = "base",
    base_fingerprint: str = BASE,
    adapters: RuntimeAdapters | None = None,
    admin: Admin | None = None,
    key_book: KeyBook | None = None,
    embeddings: EmbeddingUse = NO_EMBEDDINGS,
    max_held: int | None = None,
    hold_s: float = 5.0,
    rollouts: Rollouts | None = None,
    meter: Meter | None = None,
) -> AsyncIterator[Server]:
    """The clock, if given, is the link's and the replica's. With `max_held` the replica is not
    looked for before there is a request."""
    engine = engine or FakeEngine()
    store = store or FakeStore("red", "blue")
    clock = clock or asyncio.get_running_loop().time

    def make_engine(on_frame: Callable[[list[RequestOutput]], None]) -> FakeEngine:
        engine.on_frame = on_frame
        return engine

    settings = ReplicaSettings("replica", base_fingerprint, 64, QueueLimits(max_requests))
    replica = EngineReplica(make_engine, store, settings, clock)
    await replica.start()
    connection = LocalFleet({"replica": replica})
    timing = Timing(
        renew_s,
        silence_s,
        retry_s=0.001,
        max_retry_s=0.01,
        patience_s=patience_s,
        hello_s=hello_s,
        hold_s=hold_s,
        clock=clock,
    )
    link = EngineLink(connection, "ingress", timing, max_held)
    link.start()
    settings = ingress_settings or IngressSection(max_body_bytes=10_000)
    metrics = Metrics(max_adapter_series, [base_id], settings.vllm_metrics)
    vocabulary = vocabulary or byte_vocabulary()
    syntax = find_syntax(vocabulary, base_id)
    served = ServedModel(base_id, vocabulary, link, max_requests, syntax, embeddings, 64)
    numbers = iter(range(10**6))
    origin = Origin(lambda: str(next(numbers)), lambda: 1000 + next(numbers), lambda: 1e9)
    limiter = TenantLimiter(metrics, clock_ns)
    models = Models([served], store, rollouts)
    texts = AdapterTexts(store)
    ingress = Ingress(
        models,
        texts,
        tenants or Everybody(),
        limiter,
        metrics,
        settings,
        10**9,
        origin,
        adapters,
        admin,
        Metering(meter or NoMeter(), origin.now),
        key_book,
    )
    server = Server(engine, store, replica, connection, link, build_api(ingress), metrics, ingress)
    try:
        await until(lambda: link.hello is not None or max_held is not None)
        yield server
    finally:
        await link.close()
        await replica.close()
        texts.close()


def in_server(test: Callable[[Server], Awaitable[None]], **how: Any) -> None:
    """Runs the test with a server of its own."""

    async def run() -> None:
        async with asyncio.timeout(HANG_S), serving(**how) as server:
            await test(server)

    asyncio.run(run())


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Lets the event loop turn until it is so; fails after a while."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it never became so"
        await asyncio.sleep(0.001)


# ---- a client ------------------------------------------------------------------------------


@dataclass
class Answered:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The JSON of each server-sent event; `[DONE]` as that string."""
        lines = self.body.decode().split("\n\n")
        assert lines.pop() == ""
        texts = [line.removeprefix("data: ") for line in lines]
        return [text if text == "[DONE]" else json.loads(text) for text in texts]

    @property
    def chunks(self) -> list[Any]:
        assert self.events[-1] == "[DONE]"
        return self.events[:-1]

    def text(self, index: int = 0) -> str:
        """What a streaming client would have put together for one choice."""
        choices = [c for chunk in self.chunks for c in chunk["choices"] if c["index"] == index]
        return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)


class Client:
    """One ASGI call, running in the background until its answer is complete."""

    def __init__(
        self,
        api: ASGIApp,
        method: str,
        path: str,
        body: bytes,
        key: str | None = None,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        credentials = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
        self.answered = Answered()
        path, _, query = path.partition("?")
        self._parts = [body[:100], body[100:]]
        self._gone = asyncio.Event()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": query.encode(),
            "headers": [(b"content-type", b"application/json"), *credentials, *headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self.done = asyncio.ensure_future(api(scope, self._receive, self._send))

    def hang_up(self) -> None:
        self._gone.set()

    async def _receive(self) -> dict[str, Any]:
        if self._parts:
            part = self._parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self._parts)}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            assert self.answered.status == 0, "two answers to one request"
            self.answered.status = message["status"]
            self.answered.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            assert "x-added" not in self.answered.headers, "headers of an answer before"
            message["headers"].append((b"x-added", b"by middleware"))
        else:
            self.answered.body += message.get("body", b"")


async def call(api: Api, method: str, path: str, body: bytes, key: str | None = None) -> Answered:
    client = Client(api, method, path, body, key)
    await asyncio.wait_for(client.done, 10)
    return client.answered
