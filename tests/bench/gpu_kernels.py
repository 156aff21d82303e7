"""Single kernels of the GPU engine beside the bytes that they must move.

Attention over a paged cache, linear layers in each weight format, multi-LoRA over many adapters.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.kernels.device_positions import copy_positions, prefill_tile_tokens
from engine.kernels.triton.attention import TritonAttention
from engine.kernels.triton.weight_only import WeightOnlyLinear
from engine.lora.device_bank import DeviceAdapterBank
from engine.lora.extent import extent_nbytes, pack_extent
from engine.model.layers import LoraSite, LoraSlice
from engine.scheduler.batch import ScheduledRequest
from engine.scheduler.request import SamplingParams
from tests.bench.gpu_clock import graph_s, median_s
from tests.bench.gpu_model import random_adapter, random_quantized
from tests.bench.gpu_report import Goal, Row
from tests.bench.gpu_roofline import Roofline
from tests.bench.models import Shape

BLOCK_SIZE = 16
COLD_BYTES = 2**28  # copies of a weight take turns until so many bytes are between two uses


@dataclass(frozen=True, slots=True)
class Setting:
    """What every part of the benchmark is run with."""

    device: torch.device
    dtype: torch.dtype
    shape: Shape
    roofline: Roofline
    tiny: bool

    @property
    def num_sms(self) -> int:
        if self.device.type != "cuda":
            return 4
        return torch.cuda.get_device_properties(self.device).multi_processor_count


def decode_requests(
    batch: int, context: int, chunk: int = 1, slots: list[int] | None = None
) -> list[ScheduledRequest]:
    """Requests whose last `chunk` tokens are new, each with blocks and, if given, an adapter."""
    width = -(-context // BLOCK_SIZE)
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    return [
        ScheduledRequest(
            f"r{i}",
            0,
            [7] * chunk,
            context - chunk,
            tuple(range(i * width, (i + 1) * width)),
            slots[i] if slots else 0,
            sampling,
            True,
        )
        for i in range(batch)
    ]


# ==== attention ====


def decode_attention(setting: Setting) -> Iterator[Row]:
    batches = (2,) if setting.tiny else (1, 32, 128)
    contexts = (40,) if setting.tiny else (1024, 8192)
    for batch in batches:
        for context in contexts:
            attend, num_bytes = _paged(setting, decode_requests(batch, context), context)
            seconds = graph_s([attend] * (2 if setting.tiny else 10), setting.device)
            share = num_bytes / setting.roofline.bytes_per_s / seconds
            yield Row(
                f"decode attention, {batch} x {context}",
                seconds * 1e6,
                "us",
                Goal(share, "copy bandwidth", at_least=0.75 if batch == 128 else None),
            )


def prefill_attention(setting: Setting) -> Iterator[Row]:
    length = 40 if setting.tiny else 8192
    attend, _ = _paged(setting, decode_requests(1, length, length), length)
    seconds = median_s(attend, setting.device, rounds=3 if setting.tiny else 15)
    shape = setting.shape
    q = _noise(setting, 1, shape.num_heads, length, shape.head_dim)
    k, v = (_noise(setting, 1, shape.num_heads, length, shape.head_dim) for _ in range(2))
    flash_s = median_s(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), setting.device, rounds=5
    )
    yield Row(
        f"prefill attention, 1 x {length}",
        seconds * 1e3,
        "ms",
        Goal(seconds / flash_s, "torch's contiguous attention", at_most=1.3),
        note=f"torch's {flash_s * 1e3:.3g} ms",
    )


def _paged(
    setting: Setting, requests: list[ScheduledRequest], context: int
) -> tuple[Callable[[], object], int]:
    shape = setting.shape
    num_blocks = len(requests) * len(requests[0].block_table)
    kv_layer = _noise(setting, num_blocks, 2, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    tile_tokens = prefill_tile_tokens(shape.num_heads, shape.num_kv_heads, shape.head_dim)
    positions = copy_positions(requests, tile_tokens, setting.device, context)
    attention = TritonAttention(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_decodes=len(requests),
        max_context_len=context,
        num_sms=setting.num_sms,
        device=setting.device,
    )
    num_rows = sum(len(r.token_ids) for r in requests)
    q = _noise(setting, num_rows, shape.num_heads, shape.head_dim)
    out, scale = torch.empty_like(q), shape.head_dim**-0.5

    def attend() -> object:
        return attention(q, kv_layer, positions, scale=scale, window=None, soft_cap=None, out=out)

    return attend, kv_layer.nbytes


# ==== adapters ====


def adapters(setting: Setting) -> Iterator[Row]:
    """Shrink and expand at every site of some layers, beside the bytes of the adapters' factors."""
    num_layers = 2 if setting.tiny else 8
    sites = [site for layer in range(num_layers) for site in _sites(setting.shape, layer)]
    ranks = {"equal": [16], "mixed": [8, 16, 32, 64]}
    for batch in (2,) if setting.tiny else (1, 8, 32, 128, 256):
        for name, of_slots in ranks.items():
            for traffic in ("shared", "distinct"):
                slots = [1] * batch if traffic == "shared" else list(range(1, batch + 1))
                of_batch = [of_slots[i % len(of_slots)] for i in range(max(slots))]
                yield _adapter_row(setting, sites, slots, of_batch, f"{name} ranks, {traffic}")


def _adapter_row(
    setting: Setting, sites: list[LoraSite], slots: list[int], ranks: list[int], what: str
) -> Row:
    weights = {r: random_adapter(sites, r, setting.dtype) for r in set(ranks)}
    sizes = [extent_nbytes(weights[r]) for r in ranks]
    arena = torch.zeros(sum(sizes), dtype=torch.uint8, device=setting.device)
    bank = DeviceAdapterBank(
        arena,
        sites,
        setting.dtype,
        max_slots=len(ranks),
        max_rows=len(slots),
        max_lora_rank=64,
        num_processors=setting.num_sms,
    )
    offset = 0
    for slot, (r, nbytes) in enumerate(zip(ranks, sizes, strict=True), 1):
        extent = pack_extent(weights[r], arena[offset : offset + nbytes])
        bank.place(slot, offset, extent)
        offset += nbytes
    lora = bank.upload(bank.plan(slots))
    xs = {s.in_features: _noise(setting, len(slots), s.in_features) for s in sites}
    ys = {s.out_features: _noise(setting, len(slots), s.out_features) for s in sites}

    def add() -> None:
        for s in sites:
            lora.add(s.layer, s.site, xs[s.in_features], ys[s.out_features])

    seconds = graph_s([add], setting.device)
    floor_s = arena.numel() / setting.roofline.bytes_per_s
    return Row(
        f"adapters x{len(slots)}, {what}",
        seconds / len(sites) * 1e6,
        "us per site",
        Goal(seconds / floor_s, "the time of their bytes"),
    )


def _sites(shape: Shape, layer: int) -> list[LoraSite]:
    hidden, inter = shape.hidden_size, shape.intermediate_size
    kv = shape.num_kv_heads * shape.head_dim
    sites = {
        "qkv": (hidden, (hidden, kv, kv)),
        "o": (hidden, (hidden,)),
        "gate_up": (hidden, (inter, inter)),
        "down": (inter, (hidden,)),
    }
    return [
        LoraSite(layer, name, width, tuple(LoraSlice(f"{name}{i}", n) for i, n in enumerate(outs)))
        for name, (width, outs) in sites.items()
    ]


# ==== linear layers ====


def linears(setting: Setting) -> Iterator[Row]:
    """Each format's product beside the bytes of its weight, and beside bfloat16's time."""
    shape = setting.shape
    hidden, inter = shape.hidden_size, shape.intermediate_size
    qkv = hidden + 2 * shape.num_kv_heads * shape.head_dim
    sites = {"qkv": (qkv, hidden), "gate_up": (2 * inter, hidden), "down": (hidden, inter)}
    for rows in (1, 3) if setting.tiny else (1, 4, 8, 16, 32, 64, 128, 256, 512):
        for site, (out_features, in_features) in sites.items():
            yield from _linear_rows(setting, site, out_features, in_features, rows)


def _linear_rows(
    setting: Setting, site: str, out_features: int, in_features: int, rows: int
) -> Iterator[Row]:
    x = _noise(setting, rows, in_features)
    out = torch.empty(rows, out_features, dtype=setting.dtype, device=setting.device)
    copies = _copies(setting, out_features * in_features * setting.dtype.itemsize)
    dense = [_noise(setting, out_features, in_features) for _ in range(copies)]
    dense_s = graph_s([lambda w=w: torch.mm(x, w.T, out=out) for w in dense], setting.device)
    del dense
    yield Row(f"bf16 {site}, {rows} rows", dense_s * 1e6, "us")
    generator = torch.Generator(setting.device).manual_seed(0)
    for form in ("nf4", "int8"):
        copies = _copies(setting, out_features * in_features // (2 if form == "nf4" else 1))
        linear = [
            WeightOnlyLinear(
                random_quantized(form, out_features, in_features, setting.device, generator),
                None,
                setting.device,
                setting.dtype,
            )
            for _ in range(copies)
        ]
        seconds = graph_s([lambda m=m: m.into(x, out) for m in linear], setting.device)
        wanted = form == "nf4" and 8 <= rows <= 64
        yield Row(
            f"{form} {site}, {rows} rows",
            seconds * 1e6,
            "us",
            Goal(seconds / dense_s, "bf16's time", at_most=1.0 if wanted else None),
        )


def _copies(setting: Setting, num_bytes: int) -> int:
    return 1 if setting.tiny else max(2, COLD_BYTES // num_bytes)


def _noise(setting: Setting, *size: int) -> torch.Tensor:
    return torch.randn(size, device=setting.device).to(setting.dtype)
