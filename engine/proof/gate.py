"""Gate: nothing of an adapter leaves the engine until a probe has shown that the adapter acts.

Its requests are computed beside the probe, so that they need not wait for it and then for
themselves; their outputs wait here for the verdict.
"""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from engine.lora.weights import LoraWeights
from engine.messages import (
    AdapterFolder,
    AdapterVerdict,
    ErrorKind,
    GenerateRequest,
    RequestError,
    RequestOutput,
)
from engine.proof.held import HeldOutputs
from engine.proof.probe import is_probe
from engine.proof.proofs import Proofs
from engine.proof.verdict import Proof
from engine.scheduler.request import InvalidRequest, Request
from engine.scheduler.scheduler import Scheduler

SLICE_S = 0.003  # of a reference between two steps, at least one of its parts

log = logging.getLogger(__name__)


class Host(Protocol):
    """What a gate needs of its engine."""

    scheduler: Scheduler

    def add_request(self, request: GenerateRequest) -> None: ...

    def end_requests(self, requests: Iterable[Request], error: RequestError | None) -> None:
        """Release what requests that the scheduler has dropped still hold, and report their end."""
        ...

    def drop_adapter(self, digest: str) -> None:
        """Take an adapter that no request uses from all memory."""
        ...


class Gate:
    """Used by the engine's thread alone, but for `keep`."""

    def __init__(self, host: Host, proofs: Proofs) -> None:
        self._host = host
        self._proofs = proofs
        self._held = HeldOutputs()
        self._due: list[RequestOutput] = []  # what clients get of this step
        self._verdicts: list[AdapterVerdict] = []
        self.find: Callable[[str], Proof | None] = proofs.find
        self.latest: Callable[[str], Proof | None] = proofs.latest
        self.keep: Callable[[AdapterFolder, LoraWeights], None] = proofs.keep
        self.forget: Callable[[Iterable[str]], None] = proofs.forget

    @property
    def is_holding(self) -> bool:
        """Whether any request awaits a verdict."""
        return self._held.is_holding

    def enter(self, first: Request, adapter_folder: AdapterFolder) -> None:
        """Hold back what a request that was added gets, unless its adapter is proven."""
        digest = adapter_folder.digest
        if is_probe(first.request_id):
            return
        if refusal := self._proofs.refusal(digest):
            self._refuse(digest, refusal)
        elif self._proofs.find(digest) is None:
            for choice in [first, *first.forks]:
                choice.awaits_proof = True
            self._held.hold(first.request_id, 1 + len(first.forks), digest)
            self.probe(digest)

    def probe(self, digest: str) -> None:
        """Start the proof of an adapter that was read, and of the base, unless it has been."""
        self._add(self._proofs.start(digest))

    def end_load(self, digest: str, error: RequestError) -> None:
        """Take note of an adapter that could not be loaded.

        What was wrong with its files on this machine is no verdict on it.
        """
        self._proofs.forget([digest])
        if error.kind != ErrorKind.ADAPTER_DAMAGED:
            self._verdicts.append(Proof(digest, 0.0, 0.0, 0.0, failure=error.message).verdict)

    def _add(self, probes: list[GenerateRequest]) -> None:
        for probe in probes:
            if not self._proofs.is_asking(probe.request_id):
                continue  # its adapter was given up
            try:
                self._host.add_request(probe)
            except InvalidRequest as error:  # memory that small holds no prompt of a client either
                digest = self._proofs.give_up(probe.request_id)
                log.warning("adapter %s is served without proof: %s", digest, error)
                self._accept(digest)

    def step(self, outputs: list[RequestOutput]) -> tuple[list[RequestOutput], bool]:
        """Take a step's outputs, and compute a part of what verdicts await.

        Returns the outputs of clients, and whether another step is due at once.
        """
        proofs = self._proofs
        if proofs.is_idle and not self._held.is_holding and not self._due:
            return outputs, False
        proofs.collect()
        taken = proofs.take(outputs)
        self._due += self._held.sort(taken.outputs)
        for probe in taken.broken:
            self._end(probe.digest, probe.error)
        self._add(taken.again)
        end = time.monotonic() + SLICE_S
        while proofs.has_work:
            proofs.advance()
            if time.monotonic() > end:
                break
        verdicts = proofs.verdicts()
        for proof in verdicts:
            self._conclude(proof)
        due, self._due = self._due, []
        return due, bool(verdicts or taken.again) or proofs.has_work

    def take_verdicts(self) -> tuple[AdapterVerdict, ...]:
        """Return the verdicts since the last call."""
        if not self._verdicts:
            return ()
        verdicts, self._verdicts = self._verdicts, []
        return tuple(verdicts)

    def _conclude(self, proof: Proof) -> None:
        self._verdicts.append(proof.verdict)
        if proof.failure:
            log.error("%s", proof.failure)
            self._refuse(proof.digest, proof.failure)
            self._host.drop_adapter(proof.digest)
            return
        if proof.warning:
            log.warning("%s", proof.warning)
        self._accept(proof.digest)

    def _accept(self, digest: str) -> None:
        self._host.scheduler.set_adapter_proven(digest)
        self._due += self._held.release(digest)

    def _refuse(self, digest: str, reason: str) -> None:
        self._end(digest, RequestError(ErrorKind.ADAPTER_INVALID, reason))

    def _end(self, digest: str, error: RequestError) -> None:
        self._due += self._held.refuse(digest, error)
        ended = self._host.scheduler.end_adapter_with_error(digest)
        self._host.end_requests(ended, error)
