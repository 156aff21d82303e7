"""Makes random adapters, the slots of a batch's rows, and the expected results."""

import os
import random
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from engine.backends.cuda.bank import DeviceAdapterBank, TritonLora
from engine.backends.cuda.extent import UNIT_BYTES, extent_nbytes, pack_extent
from engine.backends.cuda.places import ModelPlaces
from engine.lora.weights import LoraWeights, Site, SiteWeights
from engine.model.layers import LoraSite, LoraSlice

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
TRAFFIC = ["identical", "distinct", "uniform", "zipf", "skewed"]

Ranks = Mapping[str, Sequence[int]]  # of each slice of a site, 0 where it has no module


def make_sites(layers: int, **shapes: tuple[int, tuple[int, ...]]) -> tuple[LoraSite, ...]:
    """Make sites of these names and (in_features, out_features of each slice), in every layer."""
    return tuple(
        LoraSite(layer, name, inputs, tuple(LoraSlice(f"{name}{i}", w) for i, w in enumerate(outs)))
        for layer in range(layers)
        for name, (inputs, outs) in shapes.items()
    )


def make_adapter(
    sites: Sequence[LoraSite],
    ranks: Ranks,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    scales: Collection[str] = (),
    shifts: Collection[str] = (),
) -> LoraWeights:
    """Make an adapter of these ranks, scales and shifts; sites without any are not targeted."""
    generator = torch.Generator().manual_seed(seed)
    loaded: dict[Site, SiteWeights] = {}
    for site in sites:
        of_slices = ranks.get(site.site, (0,) * len(site.slices))
        has_scale, has_shift = site.site in scales, site.site in shifts
        if not any(of_slices) and not has_scale and not has_shift:
            continue
        a = torch.randn(sum(of_slices), site.in_features, generator=generator)
        expands: list[tuple[int, int, int, int, Tensor]] = []
        r0 = out0 = 0
        for rank, part in zip(of_slices, site.slices, strict=True):
            r1, out1 = r0 + rank, out0 + part.out_features
            if rank:
                b = torch.randn(rank, part.out_features, generator=generator)
                expands.append((r0, r1, out0, out1, (b / rank**0.5).to(dtype)))
            r0, out0 = r1, out1
        a = (a / site.in_features**0.5).to(dtype)
        affine = torch.randn(2, site.out_features, generator=generator)
        loaded[site.layer, site.site] = SiteWeights(
            a, tuple(expands), affine[0] if has_scale else None, affine[1] if has_shift else None
        )
    return LoraWeights(f"digest-{seed}", loaded, sum(s.nbytes for s in loaded.values()))


def row_slots(kind: str, num_slots: int, count: int, *, seed: int = 0) -> list[int]:
    """Draw each row's slot; all but identical traffic includes slot 0, no adapter."""
    rng = random.Random(f"{kind}{num_slots}{count}{seed}")
    if kind == "identical":
        return [rng.randrange(1, num_slots + 1)] * count
    if kind == "distinct":
        return rng.sample([i % (num_slots + 1) for i in range(count)], count)
    skew = {"uniform": 0.0, "zipf": 1.0, "skewed": 3.0}[kind]
    slots = rng.sample(range(num_slots + 1), num_slots + 1)
    return rng.choices(slots, [(i + 1) ** -skew for i in range(len(slots))], k=count)


def make_bank(
    places: ModelPlaces | Sequence[LoraSite],
    dtype: torch.dtype,
    *,
    arena_bytes: int = 2**22,
    max_slots: int = 8,
    max_rows: int = 64,
    max_lora_rank: int = 32,
    num_processors: int = 1,
) -> DeviceAdapterBank:
    """Make a bank whose memory holds random bytes and NaN, which must not matter."""
    bank = DeviceAdapterBank(
        torch.randint(0, 256, (arena_bytes,), dtype=torch.uint8, device=DEVICE),
        places if isinstance(places, ModelPlaces) else ModelPlaces(places),
        dtype,
        max_slots=max_slots,
        max_rows=max_rows,
        max_lora_rank=max_lora_rank,
        num_processors=num_processors,
    )
    bank._planes.fill_(torch.nan)
    return bank


def load(bank: DeviceAdapterBank, slot: int, offset_bytes: int, weights: LoraWeights) -> int:
    """Copy the adapter to the arena and place it; return the first byte after it."""
    extent = pack_extent(weights, bank.arena[offset_bytes:])
    bank.place(slot, offset_bytes, extent)
    return offset_bytes + extent.nbytes


def load_all(bank: DeviceAdapterBank, adapters: Mapping[int, LoraWeights]) -> None:
    end = UNIT_BYTES
    for slot, weights in adapters.items():
        end = load(bank, slot, end, weights)
    assert end == UNIT_BYTES + sum(extent_nbytes(w) for w in adapters.values())


def launched(bank: DeviceAdapterBank, slots: Sequence[int]) -> TritonLora:
    """Make the batch whose rows have these slots, with its plan on the device."""
    words = torch.from_numpy(bank.plan(slots)).to(DEVICE)
    return bank.batch(len(slots), words)


def expected(
    adapters: Mapping[int, LoraWeights], slots: Sequence[int], key: Site, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y with each row's adapter applied, in float32, and the sum of absolute products."""
    result, size = y.float().clone(), y.float().abs()
    sites = {slot: weights.to(DEVICE).sites.get(key) for slot, weights in adapters.items()}
    for row, slot in enumerate(slots):
        site = sites[slot] if slot else None
        if site is None:
            continue
        if site.scale is not None:
            result[row] *= site.scale
            size[row] *= site.scale.abs()
        if site.shift is not None:
            result[row] += site.shift
            size[row] += site.shift.abs()
        for r0, r1, out0, out1, b in site.expands:
            a, wide = site.a[r0:r1].float(), x[row].float()
            result[row, out0:out1] += (a @ wide) @ b.float()
            size[row, out0:out1] += (a.abs() @ wide.abs()) @ b.float().abs()
    return result, size
