"""Proofs: what is known of each adapter's effect, and the probes that are on their way.

    loaded -> a probe runs as a request among the others -> its reference is computed -> a verdict

An engine holds back an adapter's requests until the verdict. The reference runs a layer at a time,
between steps, so that nobody waits for it longer than for a small step.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field, replace

import torch

from engine.lora.weights import LoraWeights
from engine.messages import (
    AdapterFolder,
    ErrorKind,
    GenerateRequest,
    RequestError,
    RequestOutput,
)
from engine.model.decoder import Decoder
from engine.proof.probe import is_probe, probe_prompt, probe_request, take_logprobs
from engine.proof.reference import Expected, expect
from engine.proof.verdict import FLOOR, MAX_NOISE, Proof, difference, judge
from engine.scheduler.activation import adapter_start

RETRY_S = 60.0  # a refused adapter may be proven anew after this time
BASE = ""  # its "digest": the base is probed once, for the noise of its own logprobs

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Probe:
    digest: str
    prompt: list[int]
    outputs: list[RequestOutput] = field(default_factory=list[RequestOutput])
    served: list[float] = field(default_factory=list[float])
    reference: Generator[None, None, Expected] | None = None


@dataclass(frozen=True, slots=True)
class Broken:
    """A probe that ended without an answer, for a reason that says nothing of the adapter."""

    digest: str
    error: RequestError


@dataclass(slots=True)
class Taken:
    """What a step's outputs were: clients' own, probes to run again, and probes that broke."""

    outputs: list[RequestOutput]
    again: list[GenerateRequest] = field(default_factory=list[GenerateRequest])
    broken: list[Broken] = field(default_factory=list[Broken])


class Proofs:
    """Used by the engine's thread alone, but for `keep`."""

    def __init__(
        self, decoder: Decoder, dtype: torch.dtype, max_model_len: int, clock: Callable[[], float]
    ) -> None:
        self._decoder = decoder
        self._floor = FLOOR[str(dtype).removeprefix("torch.")]
        self._max_model_len = max_model_len
        self._clock = clock
        self._noise: float | None = None
        self._proven: dict[str, Proof] = {}
        self._refused: dict[str, tuple[Proof, float]] = {}  # with the time
        self._loaded: dict[str, tuple[AdapterFolder, LoraWeights]] = {}  # and not proven
        self._probes: dict[str, _Probe] = {}  # by request id, until their outputs have ended
        self._broken: set[str] = set()  # digests whose last probe was in a step that failed
        self._due: deque[_Probe] = deque()  # ended; their references are to be computed

    def keep(self, adapter_folder: AdapterFolder, weights: LoraWeights) -> None:
        """Keep an adapter's weights, as they were read, until it is proven. Thread-safe."""
        if weights.digest not in self._proven:
            self._loaded[weights.digest] = adapter_folder, weights

    def forget(self, digests: Iterable[str]) -> None:
        """Let go of adapters that are no longer in memory, unless they are being proven."""
        for digest in {*digests} - self._being_proven():
            self._loaded.pop(digest, None)

    def _being_proven(self) -> set[str]:
        return {probe.digest for probe in (*self._probes.values(), *self._due)}

    def find(self, digest: str) -> Proof | None:
        """Return the verdict on an adapter that may be served; None if there is none yet."""
        return self._proven.get(digest)

    def refusal(self, digest: str) -> str:
        """Why requests of the adapter end at once; empty if they do not."""
        proof, since = self._refused.get(digest, (None, 0.0))
        if proof is None or self._clock() >= since + RETRY_S:
            return ""
        return proof.failure

    # ==== probes ====

    def start(self, digest: str) -> list[GenerateRequest]:
        """Return the requests that prove a loaded adapter; none if they are on their way."""
        busy = self._being_proven()
        if digest not in self._loaded or digest in busy:
            return []
        requests = [self._probe(digest, *self._loaded[digest])]
        if self._noise is None and BASE not in busy:
            requests.insert(0, self._probe(BASE, None, None))
        return requests

    def give_up(self, request_id: str) -> str:
        """Forget a probe that cannot run: its adapter counts as proven; return its digest."""
        digest = self._probes.pop(request_id).digest
        self._loaded.pop(digest, None)
        self._proven[digest] = Proof(digest, 0.0, 0.0, 0.0, warning="there is no room for a probe")
        return digest

    def _probe(
        self, digest: str, adapter_folder: AdapterFolder | None, weights: LoraWeights | None
    ) -> GenerateRequest:
        vocab_size = self._decoder.spec.vocab_size
        if adapter_folder is not None and weights is not None:
            adapter_folder = replace(adapter_folder, vocab_size=weights.vocab_size)
        prompt = probe_prompt(weights, vocab_size)[: self._max_model_len - 1]
        request = probe_request(digest, prompt, adapter_folder, self._max_model_len)
        self._probes[request.request_id] = _Probe(digest, prompt)
        return request

    def take(self, outputs: list[RequestOutput]) -> Taken:
        """Sort out the outputs of probes.

        A probe whose step failed, perhaps by another's fault, runs again; not a second time.
        """
        taken = Taken([])
        if not self._probes:
            return Taken(outputs)
        for output in outputs:
            if not is_probe(output.request_id):
                taken.outputs.append(output)
            elif output.request_id in self._probes:
                self._take_one(output, taken)
        return taken

    def _take_one(self, output: RequestOutput, taken: Taken) -> None:
        probe = self._probes[output.request_id]
        probe.outputs.append(output)
        if output.finish_reason is None:
            return
        del self._probes[output.request_id]
        if output.error is None:
            self._broken.discard(probe.digest)
            self._finish(probe)
        elif self._may_run_again(probe.digest, output.error):
            folder, weights = self._loaded.get(probe.digest, (None, None))
            taken.again.append(self._probe(probe.digest, folder, weights))
        else:
            taken.broken += self._break(probe, output.error)

    def _may_run_again(self, digest: str, error: RequestError) -> bool:
        if error.kind != ErrorKind.ENGINE_ERROR or digest in self._broken:
            self._broken.discard(digest)
            return False
        self._broken.add(digest)
        return digest == BASE or digest in self._loaded

    def _break(self, probe: _Probe, error: RequestError) -> list[Broken]:
        """Return what ends with the probe: without the base's, no adapter can be judged."""
        if probe.digest != BASE:
            return [Broken(probe.digest, error)]
        others = [*self._probes.values(), *self._due]
        self._probes.clear()
        self._due.clear()
        return [Broken(other.digest, error) for other in others]

    def _finish(self, probe: _Probe) -> None:
        sampled, probe.served = take_logprobs(probe.outputs)
        nothing = LoraWeights(BASE, {}, 0)
        weights = nothing if probe.digest == BASE else self._loaded[probe.digest][1]
        start = adapter_start(probe.prompt, weights.invocation_token_ids)
        probe.reference = expect(self._decoder, weights, [*probe.prompt, *sampled], start)
        self._due.appendleft(probe) if probe.digest == BASE else self._due.append(probe)

    # ==== references ====

    @property
    def has_work(self) -> bool:
        """Whether `advance` would do anything."""
        return bool(self._due) and (self._noise is not None or self._due[0].digest == BASE)

    def advance(self) -> Proof | None:
        """Compute a layer of the oldest reference; return the verdict if that was the last one."""
        if not self.has_work:
            return None
        probe = self._due[0]
        assert probe.reference is not None
        try:
            next(probe.reference)
        except StopIteration as end:
            self._due.popleft()
            return self._judge(probe, *end.value)
        return None

    def _judge(self, probe: _Probe, base: list[float], adapted: list[float]) -> Proof | None:
        if probe.digest == BASE:
            self._noise = difference(probe.served, base)
            if self._noise > MAX_NOISE:
                log.error("the base's own probe differs by %.3g from its reference", self._noise)
            return None
        _, weights = self._loaded.pop(probe.digest)
        proof = judge(
            probe.digest,
            probe.served,
            base,
            adapted,
            floor=self._floor,
            noise=self._noise or 0.0,
            is_zero=_is_zero(weights),
        )
        if proof.failure:
            self._refused[probe.digest] = proof, self._clock()
        else:
            self._proven[probe.digest] = proof
        return proof


def _is_zero(weights: LoraWeights) -> bool:
    """Check that an adapter, by its weights alone, adds nothing."""
    if weights.norms or weights.embedding is not None or weights.head is not None:
        return False
    sites = weights.sites.values()
    has_affine = any(site.scale is not None or site.shift is not None for site in sites)
    return not has_affine and not any(b.any() for site in sites for *_, b in site.expands)
