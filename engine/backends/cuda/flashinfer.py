"""Computes the prefills of a step with FlashInfer, if it is installed and its results match ours.

Prefills are computed eagerly, so its `plan` can run on the host before the first layer. Decodes are
in CUDA graphs and use our kernels. Written for the interface of flashinfer-python 0.7.2; tests use
a stand-in with that interface, and it has not run on real hardware yet. FlashInfer decides how to
split long contexts, so the last bits of a row may depend on its batch mates.
"""

import importlib
import importlib.util
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.backends.cuda.positions import (
    DevicePositions,
    PrefillPages,
    copy_positions,
    prefill_pages,
    prefill_tile_tokens,
)
from engine.scheduler.batch import ScheduledRequest
from engine.scheduler.request import SamplingParams

WORKSPACE_BYTES = 128 * 2**20  # recommended by FlashInfer, for the parts of split keys
WRAPPER_BYTES = 9 * 2**20  # allocated by each wrapper itself
TOLERANCE = 2**-6  # both kernels round weights and results to bfloat16

# For the self-test: no multiples of a block or a tile; the second request is a later chunk
_CONTEXTS, _NEW_TOKENS = (70, 37), (70, 5)
_TEST_WINDOW, _TEST_SOFT_CAP = 24, 2.0  # short and low enough to change the results

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer computes attention weights from q and k; `window` includes the query itself."""

    scale: float
    window: int | None
    soft_cap: float | None


@dataclass(frozen=True, slots=True)
class PrefillShape:
    """The shape that all layers share."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    device: torch.device


class FlashInferPrefill:
    """Holds one wrapper for each kind of `scores`. All share a workspace, so only one stream and
    one step at a time may use it."""

    def __init__(self, module: Any, shape: PrefillShape, scores: Collection[Scores]) -> None:
        self._shape = shape
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=shape.device)
        make = module.BatchPrefillWithPagedKVCacheWrapper
        self._wrappers = {kind: make(workspace, kv_layout="NHD") for kind in scores}
        self._pages: PrefillPages | None = None
        self._is_planned = False
        self._copied: torch.cuda.Event | None = None
        if shape.device.type == "cuda":
            self._copied = torch.cuda.Event()

    def plan(self, pages: PrefillPages) -> bool:
        """Plan a step and return if `run` can compute it; further calls for it do nothing."""
        if pages is not self._pages:
            self._pages, self._is_planned = pages, self._plan(pages)
        return self._is_planned

    def run(
        self,
        q: Tensor,
        kv_layer: Tensor,
        out: Tensor,
        *,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> None:
        """Write attention of q [N, H, D], the planned step's prefill rows alone, to out [N, H, D].

        kv_layer [blocks, 2, block_size, H_kv, D] may have other layers between its blocks, and q
        other data between its rows, but `out` must be contiguous.
        """
        self._wrappers[Scores(scale, window, soft_cap)].run(q, kv_layer, out=out)

    def _plan(self, pages: PrefillPages) -> bool:
        if self._copied is not None:
            self._copied.synchronize()  # each plan overwrites the pinned memory of the last one
        try:
            for scores, wrapper in self._wrappers.items():
                self._plan_one(wrapper, scores, pages)
        except Exception as error:
            log.warning("FlashInfer cannot plan a step, so our own kernel computes it: %s", error)
            return False
        finally:
            if self._copied is not None:
                self._copied.record()
        return True

    def _plan_one(self, wrapper: Any, scores: Scores, pages: PrefillPages) -> None:
        shape = self._shape
        wrapper.plan(
            pages.cu_seqlens_q,
            pages.page_starts,
            pages.pages,
            pages.last_page_lens,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.block_size,
            causal=True,
            sm_scale=scores.scale,
            window_left=-1 if scores.window is None else scores.window - 1,
            logits_soft_cap=scores.soft_cap,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
        )


def workspace_bytes(num_kinds: int) -> int:
    """Bytes of a FlashInferPrefill with `num_kinds` of scores; 0 if FlashInfer is not installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return 0
    return WORKSPACE_BYTES + num_kinds * WRAPPER_BYTES


def choose_flashinfer(shape: PrefillShape, scores: Collection[Scores]) -> FlashInferPrefill | None:
    """Set up FlashInfer; if our own kernel must compute prefills, log why and return None.

    The self-test also has FlashInfer compile what the model needs, long before its first step.
    """
    try:
        module = importlib.import_module("flashinfer")
    except Exception as error:
        log.info("our own kernel computes prefills: flashinfer does not import (%s)", error)
        return None
    try:
        _self_test(module, shape, scores)
        made = FlashInferPrefill(module, shape, scores)
    except Exception as error:
        log.warning("our own kernel computes prefills: FlashInfer failed its test: %s", error)
        return None
    log.info("FlashInfer computes prefills")
    return made


# ==== self-test ====


def _self_test(module: Any, shape: PrefillShape, scores: Collection[Scores]) -> None:
    """Raise unless two requests of different lengths give the results of our own kernel."""
    if shape.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"{shape.dtype}; it computes in bfloat16 and float16")
    kinds = {_for_test(kind) for kind in scores}
    tested = FlashInferPrefill(module, shape, kinds)
    requests = _test_requests(shape.block_size)
    q, kv_layer = _test_tensors(shape, requests)
    positions = copy_positions(
        requests,
        prefill_tile_tokens(shape.num_heads, shape.num_kv_heads, shape.head_dim),
        shape.device,
        max(_CONTEXTS),
    )
    if not tested.plan(prefill_pages(requests, shape.block_size)):
        raise RuntimeError("two short requests cannot be planned")
    for kind in kinds:
        settings = {"scale": kind.scale, "window": kind.window, "soft_cap": kind.soft_cap}
        out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device)
        tested.run(q, kv_layer, out, **settings)
        _check_close(out, _ours(q, kv_layer, positions, **settings), kind)


def _for_test(scores: Scores) -> Scores:
    window, soft_cap = scores.window, scores.soft_cap
    return Scores(
        scores.scale,
        None if window is None else min(window, _TEST_WINDOW),
        None if soft_cap is None else min(soft_cap, _TEST_SOFT_CAP),
    )


def _test_requests(block_size: int) -> list[ScheduledRequest]:
    """Make the requests, with blocks from 0 on in mixed order."""
    counts = [-(-context // block_size) for context in _CONTEXTS]
    blocks = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).tolist()
    tables = blocks[: counts[0]], blocks[counts[0] :]
    return [
        ScheduledRequest(
            request_id="",
            choice=0,
            token_ids=[0] * new,
            start=context - new,
            block_table=tuple(table),
            adapter_slot=0,
            sampling=SamplingParams(),
            samples=True,
        )
        for context, new, table in zip(_CONTEXTS, _NEW_TOKENS, tables, strict=True)
    ]


def _test_tensors(shape: PrefillShape, requests: list[ScheduledRequest]) -> tuple[Tensor, Tensor]:
    """Make q and a KV layer with a model's strides; slots without a value are NaN, as another
    request may have left them."""
    random = torch.Generator().manual_seed(0)
    num_rows, heads = sum(_NEW_TOKENS), shape.num_heads + 2 * shape.num_kv_heads
    qkv = torch.randn(num_rows, heads, shape.head_dim, generator=random)
    num_blocks = sum(len(r.block_table) for r in requests)
    layer_shape = (2, shape.block_size, shape.num_kv_heads, shape.head_dim)
    kv_cache = torch.full((num_blocks, 2, *layer_shape), torch.nan)
    for request in requests:
        position = torch.arange(request.end)
        block = torch.tensor(request.block_table)[position // shape.block_size]
        kv = torch.randn(request.end, 2, *layer_shape[2:], generator=random)
        kv_cache[block, 1, :, position % shape.block_size] = kv
    q = qkv.to(shape.device, shape.dtype)[:, : shape.num_heads]
    return q, kv_cache.to(shape.device, shape.dtype)[:, 1]


def _ours(q: Tensor, kv_layer: Tensor, positions: DevicePositions, **settings: Any) -> Tensor:
    from engine.backends.cuda.triton.attention_prefill import paged_prefill

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    paged_prefill(
        q,
        kv_layer,
        positions.block_tables,
        positions.context_lens,
        positions.cu_seqlens_q,
        positions.tiles,
        out,
        torch.empty(0, dtype=torch.float32, device=q.device),
        tile_tokens=positions.tile_tokens,
        num_splits=1,
        **settings,
    )
    return out


def _check_close(out: Tensor, expected: Tensor, scores: Scores) -> None:
    """Raise if the results differ too much; NaN counts as different."""
    if not torch.allclose(out.float(), expected.float(), rtol=TOLERANCE, atol=TOLERANCE):
        off = float((out.float() - expected.float()).abs().max())
        raise RuntimeError(f"off by {off:.3g} from our own kernel with {scores}")
