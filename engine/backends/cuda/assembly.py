"""Assembles a DeviceRunner from the Triton kernels; importing this imports Triton."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.announcer import COMPILE_PATIENCE_S, SILENT, Announcer
from engine.backends.cuda.adapter_copies import AdapterCopies, PackedAdapter, pack_adapter
from engine.backends.cuda.bank import DeviceAdapterBank
from engine.backends.cuda.decoder import FusedDecoder
from engine.backends.cuda.draw import Draws, likeliest_unless_finite
from engine.backends.cuda.extent import extent_of
from engine.backends.cuda.flashinfer import (
    FlashInferPrefill,
    PrefillShape,
    Scores,
    choose_flashinfer,
)
from engine.backends.cuda.forward import DeviceForward, StepLimits
from engine.backends.cuda.graphs import GraphFigures
from engine.backends.cuda.head import with_head_site
from engine.backends.cuda.places import places_of
from engine.backends.cuda.positions import prefill_tile_tokens
from engine.backends.cuda.runner import DeviceRunner
from engine.backends.cuda.site_table import SiteTable
from engine.backends.cuda.streams import Device
from engine.backends.cuda.triton import draw as kernels
from engine.backends.cuda.triton import launch
from engine.backends.cuda.triton.attention import TritonAttention
from engine.backends.kv_cache import blocks_of_arena
from engine.lora.weights import AdapterLoadError, LoraWeights
from engine.model.decoder import Decoder
from engine.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    max_slots: int  # adapters that are on the device at a time
    max_lora_rank: int  # per module


@dataclass(frozen=True, slots=True)
class TritonRunner:
    runner: DeviceRunner
    graphs: GraphFigures


def make_triton_runner(
    device: Device,
    decoder: Decoder,
    arena: Tensor,
    limits: StepLimits,
    adapters: AdapterLimits,
    host_adapter: Callable[[str], PackedAdapter],
    *,
    uses_graphs: bool,
    lora_side_stream: bool = False,
    tries_flashinfer: bool = False,
    announcer: Announcer = SILENT,
) -> TritonRunner:
    """Make a runner of a decoder that was built with `cuda_build`. `arena` uint8 [bytes], on the
    device, is all memory that the scheduler assigns: KV block i lies at i times a block's bytes."""
    spec, processors = decoder.spec, launch.num_processors(device.torch_device)
    dtype = decoder.embedding.weight.dtype
    kv_cache = blocks_of_arena(arena, limits.block_size, spec, dtype)
    announcer.announce("compiling kernels", COMPILE_PATIENCE_S)
    flashinfer = _flashinfer(spec, limits, dtype, device) if tries_flashinfer else None
    attention = TritonAttention(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_decodes=limits.max_num_seqs,
        max_context_len=limits.max_model_len,
        num_sms=processors,
        device=device.torch_device,
        flashinfer=flashinfer,
    )
    bank = DeviceAdapterBank(
        arena,
        places_of(decoder),
        dtype,
        max_slots=adapters.max_slots,
        max_rows=limits.max_num_batched_tokens,
        max_adapters=limits.max_num_seqs,
        max_lora_rank=adapters.max_lora_rank,
        num_processors=processors,
    )
    rows, beside = limits.max_num_batched_tokens, device.beside if lora_side_stream else None
    forward = DeviceForward(
        device,
        FusedDecoder(decoder, attention, kv_cache, rows, beside),
        bank,
        limits,
        tile_tokens=prefill_tile_tokens(spec.num_heads, spec.num_kv_heads, spec.head_dim),
        hidden_size=spec.hidden_size,
        dtype=dtype,
        uses_graphs=uses_graphs,
        plans_prefills=flashinfer is not None,
    )
    figures = forward.capture_graphs(announcer)
    copies = AdapterCopies(device, arena, kv_cache[0].nbytes, bank, host_adapter)
    runner = DeviceRunner(device, forward, copies, triton_draw)
    if device.torch_device.type == "cuda":
        announcer.announce("compiling kernels", COMPILE_PATIENCE_S)
        bank.warm_up()
        runner.warm_up()
    return TritonRunner(runner, figures)


def adapter_packer(
    device: Device, decoder: Decoder, max_lora_rank: int
) -> Callable[[LoraWeights], PackedAdapter]:
    """Make a function for the host cache's threads that packs adapters.

    It raises AdapterLoadError if an adapter does not fit the sites.
    """
    table = SiteTable(places_of(decoder), max_lora_rank)

    def pack(weights: LoraWeights) -> PackedAdapter:
        weights = with_head_site(weights, decoder.spec.vocab_size)
        try:
            table.check(extent_of(weights))
        except ValueError as error:
            raise AdapterLoadError(str(error)) from error
        return pack_adapter(weights, device)

    return pack


def triton_draw(logits: Tensor, draws: Draws, highest: Tensor, best: Tensor) -> Tensor:
    """Implement Draw with kernels that allocate nothing of the logits' size."""
    top = highest.index_select(0, draws.rows) / draws.temperature
    floor = top + draws.min_p.log()
    if draws.has_filters:
        kernels.floors(logits, draws.rows, draws.temperature, draws.top_k, draws.top_p, floor)
    keys = draws.key_low, draws.key_high
    drawn = kernels.draw(logits, draws.rows, draws.temperature, floor, *keys)
    return likeliest_unless_finite(drawn, draws, highest, best)


def _flashinfer(
    spec: ModelSpec, limits: StepLimits, dtype: torch.dtype, device: Device
) -> FlashInferPrefill | None:
    shape = PrefillShape(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_size=limits.block_size,
        dtype=dtype,
        device=device.torch_device,
    )
    windows = set(spec.windows)
    scores = {Scores(spec.attention_scale, w, spec.attention_soft_cap) for w in windows}
    return choose_flashinfer(shape, scores)
