"""Tests FlashInfer's prefills with a stand-in that computes in plain torch."""

import importlib.util
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.backends.cuda import assembly as triton_runner
from engine.backends.cuda.assembly import AdapterLimits, make_triton_runner
from engine.backends.cuda.checks import is_interpreting
from engine.backends.cuda.flashinfer import (
    FlashInferPrefill,
    PrefillShape,
    Scores,
    choose_flashinfer,
    workspace_bytes,
)
from engine.backends.cuda.forward import StepLimits
from engine.backends.cuda.memory import _flashinfer_bytes
from engine.backends.cuda.positions import DevicePositions, copy_positions, prefill_pages
from engine.backends.cuda.streams import HostDevice
from engine.backends.cuda.triton.attention import TritonAttention
from engine.backends.cuda.weight_ops import cuda_build
from engine.backends.torch.ops import torch_build
from engine.config import EngineConfig
from engine.model.families import read_spec
from engine.model.loader import load_decoder
from engine.settle import Demand
from tests.engine.cuda.attention_batch import Batch, Request, make_batch, oracle
from tests.engine.support.generations import drive, expected, generations_of, greedy
from tests.engine.support.tiny import Tiny

pytestmark = pytest.mark.skipif(not is_interpreting(), reason="needs Triton's interpreter")

CPU = torch.device("cpu")
SCALE = 0.3
SHAPE = PrefillShape(4, 2, 16, 16, torch.float32, CPU)
MIXED = [Request(20), Request(7), Request(35, 35), Request(33, 3), Request(48, 2)]
KINDS = [Scores(SCALE, None, None), Scores(SCALE, 9, None), Scores(SCALE, 1, 2.0)]


class Wrapper:
    """Computes batch prefill over pages as FlashInfer specifies it, without workspace."""

    def __init__(self, workspace: Tensor, kv_layout: str) -> None:
        assert kv_layout == "NHD"
        assert workspace.dtype == torch.uint8
        self.plans: list[dict[str, Any]] = []
        self.num_runs = 0

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float | None,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        numbers = qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        assert all(n.dtype == torch.int32 and n.device.type == "cpu" for n in numbers)
        self.plans.append({k: v for k, v in locals().items() if k not in ("self", "numbers")})

    def run(self, q: Tensor, paged_kv_cache: Tensor, *, out: Tensor) -> Tensor:
        p = self.plans[-1]
        assert q.shape == (int(p["qo_indptr"][-1]), p["num_qo_heads"], p["head_dim_qk"])
        assert paged_kv_cache.shape[1:] == (2, p["page_size"], p["num_kv_heads"], p["head_dim_qk"])
        assert (q.dtype, paged_kv_cache.dtype) == (p["q_data_type"], p["kv_data_type"])
        assert out.shape == q.shape and out.is_contiguous()
        self.num_runs += 1
        for i, last_page_len in enumerate(p["paged_kv_last_page_len"].tolist()):
            rows = slice(*p["qo_indptr"][i : i + 2].tolist())
            pages = p["paged_kv_indices"][slice(*p["paged_kv_indptr"][i : i + 2].tolist())]
            length = (len(pages) - 1) * p["page_size"] + last_page_len
            kv = paged_kv_cache[pages.long()].float().transpose(0, 1).flatten(1, 2)[:, :length]
            out[rows] = self._attend(q[rows].float(), *kv).to(out.dtype)
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p, group = self.plans[-1], q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        scores = q.transpose(0, 1) @ keys.transpose(1, 2) * p["sm_scale"]
        if p["logits_soft_cap"]:
            scores = p["logits_soft_cap"] * torch.tanh(scores / p["logits_soft_cap"])
        query = torch.arange(len(k) - len(q), len(k))[:, None]
        key, seen = torch.arange(len(k)), torch.ones(len(q), len(k), dtype=torch.bool)
        if p["causal"]:
            seen &= key <= query
        if p["window_left"] >= 0:
            seen &= key >= query - p["window_left"]
        return (scores.masked_fill(~seen, -math.inf).softmax(-1) @ values).transpose(0, 1)


def module_of(wrapper: type[Wrapper]) -> Any:
    return SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=wrapper)


def attention_with(flashinfer: FlashInferPrefill | None) -> TritonAttention:
    return TritonAttention(
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_decodes=8,
        max_context_len=64,
        num_sms=1,
        device=CPU,
        flashinfer=flashinfer,
    )


def positions_of(batch: Batch) -> DevicePositions:
    positions = copy_positions(batch.scheduled, 8, CPU, 64)
    return replace(positions, prefill_pages=prefill_pages(batch.scheduled, 16))


def settings_of(kind: Scores) -> dict[str, Any]:
    return {"scale": kind.scale, "window": kind.window, "soft_cap": kind.soft_cap}


def wrappers_of(flashinfer: FlashInferPrefill) -> list[Wrapper]:
    return list(flashinfer._wrappers.values())  # pyright: ignore[reportPrivateUsage]


# ==== arguments ====


def test_flashinfer_computes_the_prefills_and_triton_the_decodes() -> None:
    batch = make_batch(MIXED)
    rows = len(batch.q)
    wide = torch.randn(rows, 8, 16)
    wide[:, :4] = batch.q
    flashinfer = FlashInferPrefill(module_of(Wrapper), SHAPE, KINDS)
    attention, positions = attention_with(flashinfer), positions_of(batch)
    for kind in KINDS:
        settings = settings_of(kind)
        out = torch.full((rows, 4, 16), torch.nan)
        attention(wide[:, :4], batch.kv_layer, positions, out=out, **settings)
        expected = oracle(batch, **settings)
        torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)
    assert [w.num_runs for w in wrappers_of(flashinfer)] == [1, 1, 1]


def test_blocks_allocated_in_advance_are_not_read_as_keys() -> None:
    batch = make_batch([Request(16, 16), Request(33, 3)])
    batch.scheduled[0] = batch.scheduled[0]._replace(
        block_table=(*batch.scheduled[0].block_table, *batch.scheduled[1].block_table)
    )
    pages = prefill_pages(batch.scheduled, 16)
    assert pages.cu_seqlens_q.tolist() == [0, 16, 19]
    assert pages.page_starts.tolist() == [0, 1, 4]
    assert pages.last_page_lens.tolist() == [16, 1]
    first, *others = batch.scheduled[0].block_table
    assert pages.pages.tolist() == [first, *others]


def test_every_step_is_planned_once() -> None:
    flashinfer = FlashInferPrefill(module_of(Wrapper), SHAPE, KINDS[:2])
    attention, batch = attention_with(flashinfer), make_batch([Request(5, 5)])
    for num_steps in (1, 2):
        positions = positions_of(batch)
        for _layer in range(3):
            attention(batch.q, batch.kv_layer, positions, **settings_of(KINDS[1]))
        assert [len(w.plans) for w in wrappers_of(flashinfer)] == [num_steps] * 2
    assert [w.num_runs for w in wrappers_of(flashinfer)] == [0, 6]


def test_steps_without_prefill_pages_are_not_planned() -> None:
    flashinfer = FlashInferPrefill(module_of(Wrapper), SHAPE, KINDS[:1])
    batch = make_batch([Request(9, 3)])
    positions = replace(positions_of(batch), prefill_pages=None)
    out = attention_with(flashinfer)(batch.q, batch.kv_layer, positions, **settings_of(KINDS[0]))
    torch.testing.assert_close(out, oracle(batch, scale=SCALE), rtol=2e-5, atol=2e-5)
    assert not wrappers_of(flashinfer)[0].plans


def test_triton_computes_a_step_that_cannot_be_planned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class TooSmall(Wrapper):
        def plan(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("no room in the workspace")

    flashinfer = FlashInferPrefill(module_of(TooSmall), SHAPE, KINDS[:1])
    batch = make_batch([Request(9, 3)])
    attention, positions = attention_with(flashinfer), positions_of(batch)
    for _layer in range(2):
        out = attention(batch.q, batch.kv_layer, positions, **settings_of(KINDS[0]))
        torch.testing.assert_close(out, oracle(batch, scale=SCALE), rtol=2e-5, atol=2e-5)
    assert caplog.text.count("no room in the workspace") == 1


# ==== self-test ====

BFLOAT16 = replace(SHAPE, dtype=torch.bfloat16)


def install(monkeypatch: pytest.MonkeyPatch, wrapper: type[Wrapper]) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", module_of(wrapper))


def test_flashinfer_is_used_if_it_agrees_with_our_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, Wrapper)
    caplog.set_level(logging.INFO)
    kinds = [Scores(0.25, None, None), Scores(0.25, 4096, 50.0)]
    made = choose_flashinfer(BFLOAT16, kinds)
    assert made is not None
    assert len(wrappers_of(made)) == 2
    assert "FlashInfer computes prefills" in caplog.text


def with_other(name: str, change: Callable[[Any], Any]) -> type[Wrapper]:
    class Other(Wrapper):
        def plan(self, *args: Any, **kwargs: Any) -> None:
            super().plan(*args, **kwargs)
            self.plans[-1][name] = change(self.plans[-1][name])

    return Other


WRONG = {
    "window": ("window_left", lambda left: left + 1),
    "causal": ("causal", lambda causal: not causal),
    "scale": ("sm_scale", lambda scale: scale * 1.1),
    "soft cap": ("logits_soft_cap", lambda cap: None),
    "pages": ("paged_kv_indices", lambda pages: pages.flip(0)),
    "last page": ("paged_kv_last_page_len", lambda lengths: lengths + 1),
}


@pytest.mark.parametrize("what", WRONG)
def test_flashinfer_is_not_used_if_it_disagrees(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    install(monkeypatch, with_other(*WRONG[what]))
    assert choose_flashinfer(BFLOAT16, [Scores(0.25, 32, 2.0)]) is None
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "off by" in caplog.text


def test_flashinfer_is_not_used_if_it_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class NoCompiler(Wrapper):
        def run(self, q: Tensor, paged_kv_cache: Tensor, *, out: Tensor) -> Tensor:
            raise OSError("nvcc is not there")

    install(monkeypatch, NoCompiler)
    assert choose_flashinfer(BFLOAT16, KINDS) is None
    assert choose_flashinfer(SHAPE, KINDS) is None
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2
    assert "nvcc is not there" in caplog.text
    assert "float32" in caplog.text


def test_without_flashinfer_our_kernel_computes_prefills(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    caplog.set_level(logging.INFO)
    assert choose_flashinfer(BFLOAT16, KINDS) is None
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert "does not import" in caplog.text


def test_the_config_turns_flashinfer_off(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Tiny]
) -> None:
    folder = tiny_model("llama").folder
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    kept: dict[str, int] = {}
    for flashinfer in ("auto", "off"):
        config = EngineConfig(str(folder), flashinfer=flashinfer)
        spec = read_spec(folder, None)
        demand = Demand(config, spec, torch.bfloat16, "none", torch.device("cuda"), 16, 0)
        kept[flashinfer] = _flashinfer_bytes(demand)
    assert kept == {"auto": workspace_bytes(1), "off": 0}
    assert kept["auto"] > 2**27


# ==== in the runner ====


def test_a_runners_text_is_the_same_with_flashinfer(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Tiny]
) -> None:
    """Run in float32, which the self-test would refuse, with decodes in graphs."""
    made: list[FlashInferPrefill] = []

    def choose(shape: PrefillShape, scores: set[Scores]) -> FlashInferPrefill:
        made.append(FlashInferPrefill(module_of(Wrapper), shape, scores))
        return made[0]

    monkeypatch.setattr(triton_runner, "choose_flashinfer", choose)
    folder = tiny_model("llama", num_hidden_layers=1).folder
    runner = make_triton_runner(
        HostDevice(),
        load_decoder(folder, cuda_build(CPU, torch.float32), max_model_len=64),
        torch.zeros(2**20, dtype=torch.uint8),
        StepLimits(2, 40, 64, 16),
        AdapterLimits(max_slots=1, max_lora_rank=8),
        {}.__getitem__,
        uses_graphs=True,
        tries_flashinfer=True,
    ).runner
    generations = generations_of([greedy(3), greedy(4)], [0, 0], 16)
    drive(runner, generations, budget=40, depth=1, seed=2)
    plain = load_decoder(folder, torch_build(CPU, torch.float32), max_model_len=64)
    for g in generations:
        assert g.output == [token.token_id for token in expected(plain, g, None)]
    (wrapper,) = wrappers_of(made[0])
    assert wrapper.num_runs == len(wrapper.plans) > 0
