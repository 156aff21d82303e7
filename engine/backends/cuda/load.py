"""Loads a model that computes with Triton's kernels; importing this imports Triton."""

from collections.abc import Callable

import torch

from engine.announcer import Announcer
from engine.backends.cuda.adapter_copies import PackedAdapter
from engine.backends.cuda.assembly import AdapterLimits, adapter_packer, make_triton_runner
from engine.backends.cuda.forward import StepLimits
from engine.backends.cuda.streams import CudaDevice, Device, HostDevice
from engine.backends.cuda.triton.attention_tile import MAX_HEAD_DIM
from engine.backends.cuda.triton.gate import gate
from engine.backends.cuda.weight_ops import cuda_build
from engine.backends.loaded import LoadedModel, read_decoder
from engine.backends.runner import Runner
from engine.config import EngineConfig
from engine.lora.kinds import ALL_KINDS
from engine.model.loader import weight_bytes
from engine.model.reference import GATED_ACTIVATIONS
from engine.settle import Settled

MAX_ADAPTERS = 4096  # on the device at a time: their tables take six KiB each for an 8B model
MAX_LORA_RANK = 256  # per module: size of a batch's intermediate results


def load_triton(config: EngineConfig, s: Settled, *, announcer: Announcer) -> LoadedModel:
    """Read the weights and allocate the arena; `make_runner` captures graphs."""
    device: Device = CudaDevice(s.device) if s.device.type == "cuda" else HostDevice()
    decoder = read_decoder(config, s, cuda_build(s.device, s.dtype), announcer)
    torch.set_num_threads(1)  # threads that decode adapters would slow the step loop
    arena = torch.zeros(s.memory_bytes, dtype=torch.uint8, device=s.device)
    seqs, rows = config.max_num_seqs, s.max_num_batched_tokens

    def make_runner(host_adapter: Callable[[str], PackedAdapter]) -> Runner:
        return make_triton_runner(
            device,
            decoder,
            arena,
            StepLimits(seqs, rows, s.max_model_len, config.block_size),
            AdapterLimits(MAX_ADAPTERS, MAX_LORA_RANK),
            host_adapter,
            uses_graphs=config.cuda_graphs == "auto",
            lora_side_stream=config.lora_side_stream,
            tries_flashinfer=s.device.type == "cuda" and config.flashinfer == "auto",
            announcer=announcer,
        ).runner

    return LoadedModel(
        make_runner=make_runner,
        pack_adapter=adapter_packer(device, decoder, MAX_LORA_RANK),
        decoder=decoder,
        weight_bytes=weight_bytes(decoder, s.dtype),
        kernels="triton",
        max_adapters=MAX_ADAPTERS,
        kinds=ALL_KINDS,
    )


def self_test(config: EngineConfig, settled: Settled) -> None:
    """Raise the error, if any, that prevents running the model or the smallest kernel."""
    if config.block_size % 16:
        raise ValueError(f"block_size={config.block_size} is not a multiple of 16")
    if settled.spec.head_dim % 8 or settled.spec.head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"heads of {settled.spec.head_dim}; only multiples of 8 up to {MAX_HEAD_DIM} are done"
        )
    gate_up = torch.linspace(-3, 3, 64, device=settled.device).view(2, 32).to(settled.dtype)
    out = torch.empty(2, 16, dtype=settled.dtype, device=settled.device)
    gate(gate_up, out, "silu")
    expected = GATED_ACTIVATIONS["silu"](gate_up)
    if not torch.allclose(out.float(), expected.float(), rtol=2e-2, atol=1e-2):
        raise RuntimeError("a kernel gave wrong numbers")
