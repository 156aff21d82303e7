"""LoadedModel: the result of loading a model, with any of the backends."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.announcer import Announcer
from engine.backends.runner import Runner
from engine.config import EngineConfig
from engine.lora.compute_layers import ComputeLayers
from engine.lora.host_cache import HostAdapter
from engine.lora.kinds import Kind
from engine.lora.weights import LoraWeights
from engine.model.decoder import Decoder
from engine.model.layers import Build, LoraSite
from engine.model.loader import load_decoder
from engine.settle import Settled


@dataclass(frozen=True, slots=True)
class LoadedModel:
    make_runner: Callable[[Callable[[str], Any]], Runner]  # given HostAdapters by digest
    pack_adapter: Callable[[LoraWeights], HostAdapter]  # may run in any thread
    decoder: Decoder
    weight_bytes: int
    kernels: str  # one of native-amx, native-avx512, native-avx2, triton or torch
    max_adapters: int | None = None  # on the device at a time
    kinds: frozenset[Kind] = frozenset()  # what of adapters is computed beside their factors
    plain_layers: ComputeLayers | None = None  # faster than the decoder's own `forward`
    context: Any = None  # of the native kernels: their threads, which a second model shares

    @property
    def lora_sites(self) -> tuple[LoraSite, ...]:
        return self.decoder.lora_sites


def read_decoder(
    config: EngineConfig, settled: Settled, build: Build, announcer: Announcer
) -> Decoder:
    """Read the weights. Raises ModelError."""
    return load_decoder(
        Path(config.source),
        build,
        max_model_len=settled.max_model_len,
        quantization=settled.quantization,
        output_layer=settled.output_layer,
        announcer=announcer,
    )
