"""Proves one adapter in this process, with an engine for nothing else."""

import time
from typing import NamedTuple

from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import AdapterFolder, AdapterVerdict, GenerateRequest, describe_engine
from engine.proof.verdict import Proof
from engine.scheduler.request import SamplingParams

PAUSE_S = 0.001  # while the adapter is being read


class ProvenAlone(NamedTuple):
    """What a probe has shown; its `failure` also tells of an adapter that cannot be loaded."""

    proof: Proof
    verdict: AdapterVerdict | None  # None if the adapter is not the reason of a failure
    computer: str  # what has computed it


def prove_alone(config: EngineConfig, adapter_folder: AdapterFolder) -> ProvenAlone:
    """Load the base and the adapter, and probe it. Raises ConfigError, ModelError."""
    engine = Engine(config)
    assert engine.proofs is not None, "adapter_proof is off"
    try:
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        engine.add_request(GenerateRequest("", [0], sampling, adapter_folder=adapter_folder))
        outputs = engine.step()
        while not outputs:
            if engine.is_idle:
                time.sleep(PAUSE_S)
            outputs = engine.step()
        error = outputs[0].error
    finally:
        engine.close()
    proof = engine.proofs.latest(adapter_folder.digest)
    if proof is None:
        reason = "the request ended without a verdict" if error is None else error.message
        proof = Proof(adapter_folder.digest, 0.0, 0.0, 0.0, failure=reason)
    verdict = next(iter(engine.take_verdicts()), None)
    return ProvenAlone(proof, verdict, describe_engine(config, engine.info))
