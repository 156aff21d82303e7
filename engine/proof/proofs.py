"""Proofs: what is known of each adapter's effect, and the probes that are on their way.

    read -> its reference is computed, while the adapter is packed -> a verdict
         -> loaded -> a probe runs as requests among the others   ->

An engine holds back an adapter's requests until the verdict. The reference runs in parts,
between steps, so that nobody waits for it longer than for a small step. What the base makes of the
probe is computed and probed once.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch

from engine.lora.compute_layers import ComputeLayers
from engine.lora.weights import LoraWeights
from engine.messages import (
    AdapterFolder,
    ErrorKind,
    GenerateRequest,
    RequestError,
    RequestOutput,
)
from engine.model.decoder import Decoder
from engine.proof.probe import Probe, is_probe, make_probe, probe_requests, take_logprobs
from engine.proof.reference import Expected, expect
from engine.proof.verdict import FAULTY_NOISE, Proof, difference, judge, probe_digest

RETRY_S = 60.0  # a refused adapter may be proven anew after this time
BASE = ""  # its "digest": the base is probed once, for the noise of its own logprobs

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Case:
    """An adapter that is being proven, or the base."""

    weights: LoraWeights
    adapter_folder: AdapterFolder | None
    probe: Probe
    reference: Generator[None, None, Expected] | None  # None once it is computed
    expected: Expected | None = None
    asked: dict[str, list[RequestOutput]] = field(default_factory=dict[str, list[RequestOutput]])
    num_open: int = 0  # of the requests that were asked
    served: list[float] = field(default_factory=list[float])  # once all of these have ended
    has_failed: bool = False  # a request was in a step that failed, and it was asked again

    @property
    def digest(self) -> str:
        return self.weights.digest

    def forget_requests(self) -> None:
        self.asked, self.num_open = {}, 0


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
    """Used by the engine's thread alone, but for `keep`.

    `decodes_apart`: decodes of this engine are computed otherwise if nothing else is in their step.
    `wake` is called, in any thread, when there is work again.
    """

    def __init__(
        self,
        decoder: Decoder,
        dtype: torch.dtype,
        max_model_len: int,
        clock: Callable[[], float],
        *,
        decodes_apart: bool = False,
        layers: ComputeLayers | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._decoder, self._layers = decoder, layers
        self._dtype = str(dtype).removeprefix("torch.")
        self._max_model_len = max_model_len
        self._clock = clock
        self._decodes_apart = decodes_apart
        self._wake = wake
        self._num_asked = 0
        self._noise: float | None = None
        self._proven: dict[str, Proof] = {}
        self._refused: dict[str, tuple[Proof, float]] = {}  # with the time
        self._base = self._case(LoraWeights(BASE, {}, 0), None)
        self._read: deque[tuple[AdapterFolder, LoraWeights]] = deque()  # to become cases
        self._cases: dict[str, _Case] = {}  # adapters that are neither proven nor refused
        self._asking: dict[str, _Case] = {}  # by request id, until it has ended

    def keep(self, adapter_folder: AdapterFolder, weights: LoraWeights) -> None:
        """Keep an adapter's weights, as they were read, until it is proven. Thread-safe."""
        if weights.digest not in self._proven:
            self._read.append((adapter_folder, weights))
            self._wake()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being proven, nor about to be: as nearly always."""
        return not (self._read or self._cases or self._asking or self._base.asked)

    def collect(self) -> None:
        """Begin with the adapters that were read."""
        while self._read:
            folder, weights = self._read.popleft()
            if weights.digest not in self._proven and weights.digest not in self._cases:
                own_folder = replace(folder, vocab_size=weights.vocab_size)
                self._cases[weights.digest] = self._case(weights, own_folder)

    def _case(self, weights: LoraWeights, adapter_folder: AdapterFolder | None) -> _Case:
        spec, length = self._decoder.spec, self._max_model_len
        probe = make_probe(weights, spec.vocab_size, length, decodes_apart=self._decodes_apart)
        is_own = adapter_folder is not None and probe != self._base.probe
        tokens, start = probe.token_ids, probe.start
        reference = expect(
            self._decoder, weights, tokens, start, with_base=is_own, layers=self._layers
        )
        return _Case(weights, adapter_folder, probe, reference)

    def forget(self, digests: Iterable[str]) -> None:
        """Let go of adapters that are no longer in memory, unless they are being proven."""
        self.collect()
        for digest in digests:
            case = self._cases.get(digest)
            if case is not None and not case.asked:
                del self._cases[digest]

    def find(self, digest: str) -> Proof | None:
        """Return the verdict on an adapter that may be served; None if there is none yet."""
        return self._proven.get(digest)

    def latest(self, digest: str) -> Proof | None:
        """Return the latest verdict, also one of an adapter that may not be served."""
        return self._proven.get(digest) or self._refused.get(digest, (None, 0.0))[0]

    def refusal(self, digest: str) -> str:
        """Why requests of the adapter end at once; empty if they do not."""
        proof, since = self._refused.get(digest, (None, 0.0))
        if proof is None or self._clock() >= since + RETRY_S:
            return ""
        return proof.failure

    # ==== probes ====

    def start(self, digest: str = BASE) -> list[GenerateRequest]:
        """Return the requests that prove a loaded adapter; none if they are on their way.

        Those of the base come first if they have not been asked.
        """
        self.collect()
        cases = [self._base] if self._noise is None else []
        cases += [self._cases[digest]] if digest in self._cases else []
        return [request for case in cases if not case.asked for request in self._ask(case)]

    def _ask(self, case: _Case) -> list[GenerateRequest]:
        self._num_asked += 1  # an id is not used twice: the last one's request may still run
        name = f"{self._num_asked} {case.digest}"
        requests = probe_requests(case.probe, name, case.adapter_folder)
        case.asked = {request.request_id: [] for request in requests}
        case.num_open = len(requests)
        self._asking |= dict.fromkeys(case.asked, case)
        return requests

    def is_asking(self, request_id: str) -> bool:
        return request_id in self._asking

    def give_up(self, request_id: str) -> str:
        """Forget a probe that cannot run: its adapter counts as proven; return its digest."""
        case = self._asking[request_id]
        self._drop(case)
        self._cases.pop(case.digest, None)
        warning = "there is no room for a probe"
        self._proven[case.digest] = Proof(case.digest, 0.0, 0.0, 0.0, warning=warning)
        return case.digest

    def _drop(self, case: _Case) -> None:
        for request_id in case.asked:
            self._asking.pop(request_id, None)
        case.forget_requests()

    def take(self, outputs: list[RequestOutput]) -> Taken:
        """Sort out the outputs of probes.

        A probe whose step failed, perhaps by another's fault, runs again; not a second time.
        """
        taken = Taken([])
        if not self._asking:
            return Taken(outputs)
        for output in outputs:
            if not is_probe(output.request_id):
                taken.outputs.append(output)
            elif output.request_id in self._asking:
                self._take_one(self._asking[output.request_id], output, taken)
        return taken

    def _take_one(self, case: _Case, output: RequestOutput, taken: Taken) -> None:
        case.asked[output.request_id].append(output)
        if output.finish_reason is None:
            return
        del self._asking[output.request_id]
        case.num_open -= 1
        if output.error is not None:
            self._drop(case)
            if output.error.kind != ErrorKind.ENGINE_ERROR or case.has_failed:
                taken.broken += self._break(case, output.error)
            else:
                case.has_failed = True
                taken.again += self._ask(case)
        elif not case.num_open:
            case.has_failed = False
            case.served = [x for part in case.asked.values() for x in take_logprobs(part)]

    def _break(self, case: _Case, error: RequestError) -> list[Broken]:
        """Return what ends with the probe: without the base's, no adapter can be judged."""
        ended = [c for c in self._cases.values() if c.asked] if case is self._base else [case]
        for each in (case, *ended):
            self._drop(each)
            each.has_failed = False
            if error.kind != ErrorKind.ENGINE_ERROR:  # it was not loaded
                self._cases.pop(each.digest, None)
        return [Broken(each.digest, error) for each in ended]

    # ==== references and verdicts ====

    @property
    def has_work(self) -> bool:
        """Whether `advance` would do anything."""
        return next(self._unknown(), None) is not None

    def _unknown(self) -> Iterator[_Case]:
        if not self._cases and not self._base.asked:
            return
        yield from (c for c in (self._base, *self._cases.values()) if c.reference is not None)

    def advance(self) -> None:
        """Compute a part of the oldest reference."""
        case = next(self._unknown(), None)
        if case is None or case.reference is None:
            return
        try:
            next(case.reference)
        except StopIteration as end:
            case.expected, case.reference = end.value, None

    def verdicts(self) -> list[Proof]:
        """Judge the adapters of which everything is known by now."""
        base = self._base
        if self._noise is None and base.served and base.expected is not None:
            self._noise = difference(base.served, _each(base.probe, base.expected.adapted))
            base.forget_requests()
            if self._noise > FAULTY_NOISE:
                log.error("the base's own probe differs by %.3g from its reference", self._noise)
        if self._noise is None:
            return []
        done = [c for c in self._cases.values() if c.served and c.expected is not None]
        return [self._judge(case, self._noise) for case in done]

    def _judge(self, case: _Case, noise: float) -> Proof:
        del self._cases[case.digest]
        assert case.expected is not None and self._base.expected is not None
        adapted, base = case.expected
        proof = judge(
            case.digest,
            probe_digest(case.probe.token_ids, case.served),
            case.served,
            _each(case.probe, self._base.expected.adapted if base is None else base),
            _each(case.probe, adapted),
            num_decoded=case.probe.num_decoded,
            dtype=self._dtype,
            noise=noise,
            is_zero=_is_zero(case.weights),
        )
        if proof.failure:
            self._refused[case.digest] = proof, self._clock()
        else:
            self._proven[case.digest] = proof
        return proof


def _each(probe: Probe, expected: list[float]) -> list[float]:
    """Return what each logprob of a probe's requests should be."""
    return [*expected, *(expected[:1] if probe.decodes_first else [])]


def _is_zero(weights: LoraWeights) -> bool:
    """Check that an adapter, by its weights alone, adds nothing."""
    if weights.norms or weights.embedding is not None or weights.head is not None:
        return False
    sites = weights.sites.values()
    has_affine = any(site.scale is not None or site.shift is not None for site in sites)
    return not has_affine and not any(b.any() for site in sites for *_, b in site.expands)
