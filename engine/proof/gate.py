"""Gate: holds an adapter's requests back until a probe has shown that the adapter acts."""

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
from engine.proof.probe import is_probe
from engine.proof.proofs import Proofs
from engine.proof.verdict import Proof
from engine.scheduler.request import InvalidRequest, Request
from engine.scheduler.scheduler import Scheduler

SLICE_S = 0.008  # of a reference between two steps, at least a layer

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
        self._verdicts: list[AdapterVerdict] = []
        self.find: Callable[[str], Proof | None] = proofs.find
        self.latest: Callable[[str], Proof | None] = proofs.latest
        self.keep: Callable[[AdapterFolder, LoraWeights], None] = proofs.keep
        self.forget: Callable[[Iterable[str]], None] = proofs.forget

    def enter(self, first: Request, adapter_folder: AdapterFolder) -> None:
        """Hold back a request (and its forks) that was added, unless its adapter is proven."""
        digest = adapter_folder.digest
        if is_probe(first.request_id):
            return
        if refusal := self._proofs.refusal(digest):
            self._refuse(digest, refusal)
        elif self._proofs.find(digest) is None:
            for choice in [first, *first.forks]:
                choice.awaits_proof = True
            self.probe(digest)

    def probe(self, digest: str) -> None:
        """Start the proof of an adapter that was read, and of the base, unless it has been."""
        self._add(self._proofs.start(digest))

    def _add(self, probes: list[GenerateRequest]) -> None:
        for probe in probes:
            if not self._proofs.is_asking(probe.request_id):
                continue  # its adapter was given up
            try:
                self._host.add_request(probe)
            except InvalidRequest as error:  # memory that small holds no prompt of a client either
                digest = self._proofs.give_up(probe.request_id)
                log.warning("adapter %s is served without proof: %s", digest, error)
                self._host.scheduler.set_adapter_proven(digest)

    def step(self, outputs: list[RequestOutput]) -> tuple[list[RequestOutput], bool]:
        """Take a step's outputs, and compute a part of what verdicts await.

        Returns the outputs of clients, and whether another step is due at once.
        """
        proofs = self._proofs
        if proofs.is_idle:
            return outputs, False
        proofs.collect()
        taken = proofs.take(outputs)
        for probe in taken.broken:
            ended = self._host.scheduler.end_adapter_with_error(probe.digest)
            self._host.end_requests(ended, probe.error)
        self._add(taken.again)
        end = time.monotonic() + SLICE_S
        while proofs.has_work:
            proofs.advance()
            if time.monotonic() > end:
                break
        verdicts = proofs.verdicts()
        for proof in verdicts:
            self._conclude(proof)
        return taken.outputs, bool(verdicts or taken.again) or proofs.has_work

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
        self._host.scheduler.set_adapter_proven(proof.digest)

    def _refuse(self, digest: str, reason: str) -> None:
        error = RequestError(ErrorKind.ADAPTER_INVALID, reason)
        ended = self._host.scheduler.end_adapter_with_error(digest)
        self._host.end_requests(ended, error)
