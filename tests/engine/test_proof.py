"""Tests that no adapter answers before a probe has shown that it acts as its weights say."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.engine import Engine
from engine.lora.load import load_lora
from engine.lora.weights import LoraWeights
from engine.messages import (
    AdapterFolder,
    ErrorKind,
    GenerateRequest,
    RequestError,
    RequestOutput,
)
from engine.model.base_weights import BaseWeights
from engine.proof import gate
from engine.proof.probe import is_probe, make_probe
from engine.proof.reference import expect
from engine.proof.verdict import Proof
from tests.engine.support.driver import finish, greedy, make_engine, prompt_of, run, write_adapter
from tests.engine.support.tiny import Tiny, write_tiny

BACKENDS = {
    "torch float32": {"dtype": "float32"},
    "torch bfloat16": {"dtype": "bfloat16", "kernels": "torch"},
    "native": {"dtype": "bfloat16", "block_size": 16},
    "native int8 KV": {
        "dtype": "bfloat16",
        "block_size": 16,
        "kv_dtype": "int8",
        "quantization": "int8",
    },
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("base"), "qwen2")


@pytest.fixture(scope="module")
def adapter(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> AdapterFolder:
    return write_adapter(tiny.folder, tmp_path_factory.mktemp("adapters") / "a")


def ask(name: str, adapter: AdapterFolder | None, **changes: Any) -> GenerateRequest:
    return GenerateRequest(name, prompt_of(9), greedy(6), adapter_folder=adapter, **changes)


def proof_of(engine: Engine, adapter: AdapterFolder) -> Proof:
    assert engine.proofs is not None
    proof = engine.proofs.find(adapter.digest)
    assert proof is not None
    return proof


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_that_acts_is_proven_once(
    tiny: Tiny, adapter: AdapterFolder, backend: str
) -> None:
    engine = make_engine(tiny.folder, **BACKENDS[backend])
    results = run(engine, [ask("r", adapter), ask("base", None)])
    assert {r.last and r.last.finish_reason for r in results.values()} == {"length"}
    assert results.keys() == {("r", 0), ("base", 0)}  # nothing of probes
    proof = proof_of(engine, adapter)
    assert not proof.failure and not proof.warning
    assert proof.effect > 5 * proof.margin / 2 and proof.error < proof.margin / 2
    steps = engine.stats.total_steps
    run(engine, [ask("again", adapter)])
    assert engine.stats.total_steps == steps + 6  # a step for each token
    assert engine.stats.total_output_tokens == 18


def test_a_proof_changes_no_answer(tiny: Tiny, adapter: AdapterFolder) -> None:
    answers = [
        run(make_engine(tiny.folder, adapter_proof=how), [ask("r", adapter)])["r", 0].token_ids
        for how in ("auto", "off")
    ]
    assert answers[0] == answers[1]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "activated": {"alora_invocation_tokens": [9, 8], "task_type": "CAUSAL_LM"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_references_are_pefts(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    engine = make_engine(tiny.folder, dtype="float32")
    adapter = write_adapter(tiny.folder, tmp_path / "a", **KINDS[kind])
    assert len(run(engine, [ask("r", adapter)])["r", 0].token_ids) == 6
    assert proof_of(engine, adapter).effect > 0.1 and not proof_of(engine, adapter).warning
    open_base = partial(BaseWeights, tiny.folder, "none", torch.float32)
    weights = load_lora(adapter, engine.model.lora_sites, torch.float32, open_base)
    probe = make_probe(weights, 256, 64, decodes_apart=False)
    tokens = list(probe.token_ids)
    work = expect(engine.model.decoder, weights, tokens, probe.start, with_base=True)
    *_, (adapted, base) = _all(work)
    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32).eval()
    torch.testing.assert_close(base, _scores(model, tokens), atol=1e-4, rtol=0)
    peft = PeftModel.from_pretrained(model, adapter.path).eval()
    torch.testing.assert_close(adapted, _scores(peft, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2", "phi3"])
def test_native_layers_give_the_same_reference(model_type: str, tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", model_type).folder
    engine = make_engine(base, dtype="bfloat16", block_size=16)
    decoder, layers = engine.model.decoder, engine.model.plain_layers
    if layers is None:
        pytest.skip("there are no native kernels")
    open_base = partial(BaseWeights, base, "none", torch.bfloat16)
    adapter = write_adapter(base, tmp_path / "a", target_modules="all-linear")
    weights = load_lora(adapter, engine.model.lora_sites, torch.bfloat16, open_base)
    for tokens, start in (prompt_of(9), 4), (prompt_of(17), 0):
        *_, (slow, slow_base) = _all(expect(decoder, weights, tokens, start, with_base=True))
        known = expect(decoder, weights, tokens, start, with_base=True, layers=layers)
        *_, (fast, fast_base) = _all(known)
        assert fast == pytest.approx(slow, abs=0.1) and fast_base == pytest.approx(
            slow_base, abs=0.1
        )
        assert max(abs(a - b) for a, b in zip(fast, fast_base, strict=True)) > 0.5
    assert layers(prompt_of(65), 1, weights, 0) is None


def _all(work: Any) -> Sequence[Any]:
    results: list[Any] = []
    while True:
        try:
            results.append(next(work))
        except StopIteration as end:
            return [*results, end.value]


@torch.inference_mode()
def _scores(model: torch.nn.Module, tokens: list[int]) -> list[float]:
    logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return [logprobs[i, token].item() for i, token in enumerate(tokens[1:])]


def zero_b(weights: LoraWeights) -> LoraWeights:
    return _changed(weights, lambda b: torch.zeros_like(b))


def half_of_b(weights: LoraWeights) -> LoraWeights:
    return _changed(weights, lambda b: b / 2)


def first_layer_alone(weights: LoraWeights) -> LoraWeights:
    return replace(weights, sites={k: s for k, s in weights.sites.items() if k[0] == 0})


def other_order_of_ranks(weights: LoraWeights) -> LoraWeights:
    return _changed(weights, lambda b: b.flip(0))


def _changed(weights: LoraWeights, change: Callable[[Tensor], Tensor]) -> LoraWeights:
    sites = {
        key: replace(site, expands=tuple((*e[:4], change(e[4]).contiguous()) for e in site.expands))
        for key, site in weights.sites.items()
    }
    return replace(weights, sites=sites)


FAULTS = [zero_b, half_of_b, first_layer_alone, other_order_of_ranks]


@pytest.mark.parametrize("backend", ["torch float32", "native"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_lost_after_the_reading_is_noticed(
    tiny: Tiny,
    adapter: AdapterFolder,
    backend: str,
    fault: Callable[[LoraWeights], LoraWeights],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(tiny.folder, **BACKENDS[backend])
    pack = engine.model.pack_adapter
    _replace_packing(engine, monkeypatch, lambda weights: pack(fault(weights)))
    results = run(engine, [ask("r", adapter), ask("base", None)])
    refused = results["r", 0].last
    assert refused is not None and refused.error is not None and refused.token_ids == []
    assert refused.error.kind == ErrorKind.ADAPTER_INVALID
    assert "does not act as its weights say" in refused.error.message
    assert len(results["base", 0].token_ids) == 6
    again = run(engine, [ask("s", adapter)])["s", 0].last
    assert again is not None and again.error == refused.error


def _replace_packing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, pack: Callable[[LoraWeights], Any]
) -> None:
    monkeypatch.setattr(engine.loader, "model", replace(engine.model, pack_adapter=pack))


def test_decodes_without_the_adapter_are_noticed(
    tiny: Tiny, adapter: AdapterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a graph that was captured without adapters."""
    engine = make_engine(tiny.folder)
    launch = engine.runner.launch

    def without_adapters(batch: Any, *rest: Any) -> Any:
        rows = [r._replace(adapter_slot=0) if len(r.token_ids) == 1 else r for r in batch.requests]
        return launch(replace(batch, requests=tuple(rows)), *rest)

    monkeypatch.setattr(engine.runner, "launch", without_adapters)
    last = run(engine, [ask("r", adapter)])["r", 0].last
    assert last is not None and last.error is not None
    assert "does not act as its weights say" in last.error.message


def test_an_adapter_of_zeros_is_served_with_a_warning(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zeros = write_adapter(tiny.folder, tmp_path / "zeros", lora_alpha=0)
    with caplog.at_level(logging.WARNING):
        last = run(engine := make_engine(tiny.folder), [ask("r", zeros)])["r", 0].last
    assert last is not None and last.finish_reason == "length"
    assert "every B is zero" in proof_of(engine, zeros).warning
    assert "every B is zero" in caplog.text


def test_a_refused_adapter_is_proven_anew_after_a_while(
    tiny: Tiny, adapter: AdapterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    engine = make_engine(tiny.folder, clock=lambda: now[0])
    pack = engine.model.pack_adapter
    _replace_packing(engine, monkeypatch, lambda weights: pack(zero_b(weights)))
    assert _error(engine, adapter)
    _replace_packing(engine, monkeypatch, pack)
    assert _error(engine, adapter)
    now[0] += 61
    assert not _error(engine, adapter)


def _error(engine: Engine, adapter: AdapterFolder) -> str:
    last = run(engine, [ask("r", adapter)])["r", 0].last
    assert last is not None
    return "" if last.error is None else last.error.message


def test_several_choices_and_requests_wait_for_one_proof(
    tiny: Tiny, adapter: AdapterFolder
) -> None:
    engine = make_engine(tiny.folder)
    results = run(engine, [ask("r", adapter, n=3), ask("s", adapter)])
    assert len(results) == 4
    assert all(result.token_ids == results["s", 0].token_ids for result in results.values())


HELD: dict[str, list[dict[str, Any]]] = {
    "of several choices": [{"n": 3}],
    "that have ended": [{"sampling": replace(greedy(1), ignore_eos=True)}],
    "of several requests": [{}, {"sampling": greedy(1)}],
}


@pytest.mark.parametrize("requests", HELD.values(), ids=HELD)
@pytest.mark.parametrize("acts", [True, False], ids=["acts", "does not act"])
def test_answers_are_held_until_the_verdict(
    tiny: Tiny,
    adapter: AdapterFolder,
    requests: list[dict[str, Any]],
    acts: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also those that end before it: with the adapter's error, if it does not act."""
    engine = make_engine(tiny.folder, dtype="float32")
    pack = engine.model.pack_adapter
    if not acts:
        _replace_packing(engine, monkeypatch, lambda weights: pack(zero_b(weights)))
    assert engine.proofs is not None
    proofs = engine.proofs._proofs
    with monkeypatch.context() as patch:
        patch.setattr(proofs, "advance", lambda: None)
        patch.setattr(gate, "SLICE_S", 0.0)
        asked = [replace(ask(str(i), adapter), **changes) for i, changes in enumerate(requests)]
        for request in asked:
            engine.add_request(request)
        while engine.scheduler.has_unfinished:
            assert engine.step() == []
    results = finish(engine)
    assert len(results) == sum(request.n for request in asked)
    for (name, _), result in results.items():
        last, count = result.last, asked[int(name)].sampling.max_tokens
        assert last is not None
        if acts:
            assert last.error is None and len(result.token_ids) == count
        else:
            assert last.error is not None and last.error.kind == ErrorKind.ADAPTER_INVALID
            assert result.token_ids == []
    engine.scheduler.check_integrity()
    assert engine.stats.num_blocks_used == 0 and not engine.proofs.is_holding


def test_what_a_refused_adapter_has_computed_is_never_read(
    tiny: Tiny, adapter: AdapterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    engine = make_engine(tiny.folder, dtype="float32", clock=lambda: now[0])
    pack = engine.model.pack_adapter
    _replace_packing(engine, monkeypatch, lambda weights: pack(half_of_b(weights)))
    assert _error(engine, adapter)
    _replace_packing(engine, monkeypatch, pack)
    now[0] += 61
    last = run(engine, [ask("r", adapter)])["r", 0].last
    assert last is not None and last.metrics is not None and not last.metrics.num_cached_tokens


def test_an_adapter_that_cannot_be_loaded_has_failed(tiny: Tiny, adapter: AdapterFolder) -> None:
    engine = make_engine(tiny.folder, adapter_memory_bytes=1)
    assert "adapter_memory_bytes is 1" in _error(engine, adapter)
    (verdict,) = engine.take_verdicts()
    assert (verdict.digest, verdict.outcome, verdict.probe) == (adapter.digest, "failed", "")
    assert "adapter_memory_bytes is 1" in verdict.reason


def test_files_that_cannot_be_read_are_no_verdict(tiny: Tiny, tmp_path: Path) -> None:
    engine = make_engine(tiny.folder)
    assert "cannot be read" in _error(engine, AdapterFolder("gone", str(tmp_path)))
    assert engine.take_verdicts() == ()


def test_requests_that_are_aborted_while_they_wait_leave_nothing(
    tiny: Tiny, adapter: AdapterFolder
) -> None:
    engine = make_engine(tiny.folder)
    engine.add_request(ask("r", adapter))
    while not any(r.adapter_digest for r in engine.scheduler.running):
        engine.step()
    engine.abort("r")
    finish(engine)
    assert run(engine, [ask("s", adapter)])["s", 0].token_ids
    engine.scheduler.check_integrity()
    assert engine.stats.num_blocks_used == 0


def test_a_step_that_fails_under_a_probe_refuses_the_adapter_no_longer(
    tiny: Tiny, adapter: AdapterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny.folder)
    launch = engine.runner.launch

    def fail(*_: Any) -> Any:
        raise RuntimeError("broken step")

    def outputs_until_end(name: str) -> RequestOutput:
        last = run(engine, [ask(name, adapter)])[name, 0].last
        assert last is not None
        return last

    monkeypatch.setattr(engine.runner, "launch", fail)
    error = outputs_until_end("r").error
    assert error is not None and error.kind == ErrorKind.ENGINE_ERROR
    monkeypatch.setattr(engine.runner, "launch", launch)
    assert outputs_until_end("s").finish_reason == "length"


@pytest.mark.parametrize("failing", [0, 1])
def test_one_failed_step_under_probes_refuses_no_adapter(
    tiny: Tiny, adapter: AdapterFolder, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny.folder)
    launch, count = engine.runner.launch, iter(range(100))

    def fail_once(*step: Any) -> Any:
        if next(count) == failing:
            raise RuntimeError("another's fault")
        return launch(*step)

    monkeypatch.setattr(engine.runner, "launch", fail_once)
    last = run(engine, [ask("r", adapter)])["r", 0].last
    assert last is not None and (last.error is None) == (failing == 0)  # it was in the second step
    assert len(run(engine, [ask("s", adapter)])["s", 0].token_ids) == 6
    assert proof_of(engine, adapter).effect > 0


def fail_bases_probe(engine: Engine, error: RequestError) -> None:
    requests = [*engine.scheduler.running, *engine.scheduler.waiting]
    ids = [r.request_id for r in requests if not r.adapter_digest and is_probe(r.request_id)]
    assert ids
    for request_id in ids:
        engine.end_requests(engine.scheduler.abort(request_id), error)


def test_nothing_of_probes_reaches_clients_if_the_bases_ends_before_the_adapters(
    tiny: Tiny, adapter: AdapterFolder
) -> None:
    engine = make_engine(tiny.folder, max_num_batched_tokens=3, max_num_seqs=3)
    engine.add_request(ask("r", adapter))
    error = RequestError(ErrorKind.ENGINE_ERROR, "another's fault")
    assert engine.step() == []  # the base's, and the adapter is being read
    loading = engine.host._entries[adapter.digest].future
    assert loading is not None and loading.result()
    assert engine.step() == []
    fail_bases_probe(engine, error)
    assert engine.step() == []  # the base's is to run again
    assert any(r.adapter_digest for r in engine.scheduler.running)
    fail_bases_probe(engine, error)
    results = finish(engine)
    assert results.keys() == {("r", 0)}
    last = results["r", 0].last
    assert last is not None and last.error == error
