"""Converts uploads of other methods, and compares what an engine serves with transformers."""

from pathlib import Path

import pytest
import torch

from adapter_store.bases import describe_base
from adapter_store.conversion.record import ConversionRecord
from engine.messages import AdapterFolder, GenerateRequest
from tests.adapter_store.training import convert_and_check
from tests.engine.support.driver import greedy, make_engine, prompt_of, run
from tests.engine.support.tiny import VOCAB_SIZE

SOME = [2, 9, VOCAB_SIZE - 1]  # token ids


def extract(tuned: Path, base: Path, target: Path) -> tuple[ConversionRecord, AdapterFolder]:
    """Convert, and check what comes out as an upload of its own."""
    described = describe_base(base, target.parent / "hashes", lambda _: None)
    record, prepared = convert_and_check(tuned, target, described, lora_rank=2, base_folder=base)
    manifest = prepared.manifest
    return record, AdapterFolder(manifest.digest, str(target), manifest.vocab_size)


@torch.inference_mode()
def check(base: Path, adapter: AdapterFolder, model: torch.nn.Module, vocab_size: int) -> None:
    """Compare log probabilities of the prompt and of greedy tokens with those of transformers."""
    prompt = [*prompt_of(8, seed=3), *SOME, vocab_size - 1, 7]
    sampling = greedy(3, logprobs=20, prompt_logprobs=20)
    engine = make_engine(base)
    result = run(engine, [GenerateRequest("r", prompt, sampling, adapter_folder=adapter)])["r", 0]
    assert result.first and result.last and result.last.error is None, result.last
    assert engine.proofs and (proof := engine.proofs.find(adapter.digest))
    assert not proof.failure
    token_ids = prompt + result.token_ids
    expected = model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    entries = [*(result.first.prompt_logprobs or [])[1:], *result.logprobs]
    assert len(entries) == len(token_ids) - 1
    for at, entry in enumerate(entries):
        assert entry is not None
        for token_id, value in [(token_ids[at + 1], entry.logprob), *entry.top]:
            assert value == pytest.approx(expected[at, token_id].item(), abs=1e-4)
    assert token_ids[-3:] == expected[-4:-1].argmax(-1).tolist()
