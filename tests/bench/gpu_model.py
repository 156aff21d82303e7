"""Makes random weights of real shapes on the device, without writing or reading files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from engine.lora.weights import LoraWeights, SiteWeights
from engine.model.decoder import Decoder
from engine.model.families import read_spec
from engine.model.layers import Build, LoraSite, Part
from engine.model.quantized_weight import QuantizedWeight
from tests.bench.models import SHAPES, Shape, write_config

LLAMA_8B = Shape(
    "8b", "llama", "LlamaForCausalLM", 128256, 4096, 32, 32, 8, 14336, 5e5, False, tied=False
)
QUICK = replace(LLAMA_8B, name="8b-two-layers", num_layers=2)
TINY = replace(SHAPES["tiny"], name="tiny", hidden_size=128, intermediate_size=256, num_heads=4)


def random_decoder(shape: Shape, build: Build, quantization: str, seed: int) -> Decoder:
    """Make a decoder of this shape, with linear layers in `quantization`; outputs are random."""
    with TemporaryDirectory() as folder:
        write_config(shape, Path(folder))
        spec = read_spec(Path(folder), 8192)
    decoder = Decoder(spec, build, max_model_len=8192)
    generator = torch.Generator(build.device).manual_seed(seed)
    for part in decoder.parts():
        part.store(_random_weight(part, quantization, build, generator))
    if spec.tied_embeddings:
        decoder.head.tie(decoder.embedding.weight)
    return decoder.eval()


def _random_weight(
    part: Part,
    quantization: str,
    build: Build,
    generator: torch.Generator,
) -> torch.Tensor | QuantizedWeight:
    dtype, device = build.dtype, build.device
    if len(part.shape) == 1:
        return torch.ones(part.shape, dtype=dtype, device=device)
    if part.module is None or quantization == "none":
        noise = torch.randn(part.shape, dtype=dtype, device=device, generator=generator)
        return noise.mul_(0.02)
    return random_quantized(quantization, *part.shape, device, generator)


def random_quantized(
    quantization: str,
    out_features: int,
    in_features: int,
    device: torch.device,
    generator: torch.Generator,
) -> QuantizedWeight:
    """Make a weight of random codes, with scales that give values of about 0.02."""
    group = 64 if quantization == "nf4" else in_features
    width = in_features // 2 if quantization == "nf4" else in_features
    codes = torch.randint(
        0, 256, (out_features, width), dtype=torch.uint8, device=device, generator=generator
    )
    scales = torch.full((out_features, in_features // group), 0.03, device=device)
    if quantization == "fp8":
        small = torch.randn(out_features, in_features, device=device, generator=generator)
        return QuantizedWeight("fp8", small.to(torch.float8_e4m3fn), scales[:, :1] * 0.02, group)
    if quantization == "int8":
        return QuantizedWeight("int8", codes.view(torch.int8), scales / 127, group)
    return QuantizedWeight(quantization, codes, scales, group)


def digest_of(lora_rank: int, kind: str = "plain") -> str:
    return f"{kind}-{lora_rank}"


def random_adapter(
    sites: Sequence[LoraSite], lora_rank: int, dtype: torch.dtype, device: torch.device
) -> LoraWeights:
    """Make an adapter of this rank on every module of all sites, on the device."""
    made = {(site.layer, site.site): _random_site(site, lora_rank, dtype, device) for site in sites}
    nbytes = sum(site.nbytes for site in made.values())
    return LoraWeights(digest_of(lora_rank), made, nbytes)


def _random_site(
    site: LoraSite, lora_rank: int, dtype: torch.dtype, device: torch.device
) -> SiteWeights:
    expands: list[tuple[int, int, int, int, torch.Tensor]] = []
    out = 0
    for i, part in enumerate(site.slices):
        b = torch.randn(lora_rank, part.out_features, device=device).mul_(0.02).to(dtype)
        r = i * lora_rank
        expands.append((r, r + lora_rank, out, out + part.out_features, b))
        out += part.out_features
    width = len(site.slices) * lora_rank
    a = torch.randn(width, site.in_features, device=device).mul_(0.02).to(dtype)
    return SiteWeights(a, tuple(expands))
