"""Measures linear layers alone: native kernels against torch's packed bfloat16 (oneDNN).

    python -m tests.bench.kernel_bench_linear --models qwen --rows-of-x 1 8 128

Every layer has enough copies that weights come from memory, as in a model's step. Each round runs
every kernel over its copies and takes the median call; the rows show the fastest round, since
disturbances only add time. `read` is the rate of the same threads only reading, in the same rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.library import Context
from engine.backends.native.linear import NativeLinear
from engine.backends.native.memory import Blocks, temporary_bytes
from engine.model.quantized_weight import QuantizedWeight
from tests.bench.environment import append_row, header

MODELS = {  # (out, in) of the four linear layers of one decoder layer
    "qwen": {"qkv": (1152, 896), "o": (896, 896), "gate_up": (9728, 896), "down": (896, 4864)},
    "smollm": {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)},
}
READ_BYTES = 16 * 2**20
Layer = Callable[[Tensor], Callable[[], object]]  # from x to the call that computes the layer


def main() -> None:
    options = _parse()
    torch.set_num_threads(options.threads)
    context = Context(threads=options.threads)
    append_row(options.rows, f"{header(0)} | {context.isa} | fastest of {options.rounds} rounds")
    read = reader(options.mib)
    for model in options.models:
        for name, (out_features, in_features) in MODELS[model].items():
            copies = max(options.mib * 2**20 // (out_features * in_features * 2), 2)
            kernels = make_kernels(context, options.kernels, copies, out_features, in_features)
            kernels["read"] = read
            for rows in options.rows_of_x:
                fastest = measure(kernels, rows, in_features, options.rounds)
                label = f"{model} {name} {out_features}x{in_features} | {rows} rows"
                append_row(options.rows, f"{label} | {_results(fastest, kernels, rows)}")


class Copies:
    """One kernel, with as many layers of one shape as fill the wanted memory."""

    def __init__(self, layers: list[Layer], nbytes: int, flop_per_row: int) -> None:
        self.layers, self.nbytes, self.flop_per_row = layers, nbytes, flop_per_row


def make_kernels(
    context: Context, names: list[str], copies: int, out_features: int, in_features: int
) -> dict[str, Copies]:
    weight = torch.randn(out_features, in_features) / in_features**0.5
    flop = 2 * out_features * in_features

    def native(source: Tensor | QuantizedWeight) -> Copies:
        linears = [NativeLinear(context, source) for _ in range(copies)]
        layers = [_native_layer(context, linear) for linear in linears]
        return Copies(layers, linears[0].nbytes, flop)

    def torch_packed() -> Copies:
        layers = [_torch_layer(weight.bfloat16()) for _ in range(copies)]
        return Copies(layers, weight.numel() * 2, flop)

    makers = {
        "bf16": lambda: native(weight.bfloat16()),
        "int8": lambda: native(_int8(weight)),
        "torch": torch_packed,
    }
    return {name: makers[name]() for name in names}


def measure(
    kernels: dict[str, Copies], rows: int, in_features: int, rounds: int
) -> dict[str, float]:
    """Return the seconds of one layer in the fastest round of each kernel."""
    x = torch.randn(rows, in_features).bfloat16()
    fastest = dict.fromkeys(kernels, float("inf"))
    for _ in range(rounds):
        for name, kernel in kernels.items():
            # A round is a pass over the copies, or over fewer if that takes too long
            layers = kernel.layers[: max(int(2e10 / (kernel.flop_per_row * rows)), 2)]
            calls = [layer(x) for layer in layers]
            fastest[name] = min(fastest[name], statistics.median(map(_seconds, calls)))
    return fastest


def _seconds(call: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def reader(mib: int) -> Copies:
    """Make calls that only read pieces of memory, instead of layers."""
    block = Blocks().cut(mib * 2**20).fill_(1).view(torch.float32)
    pieces = block.split(READ_BYTES // 4)
    return Copies([lambda _, piece=piece: piece.amax for piece in pieces], READ_BYTES, 1)


def _torch_layer(weight: Tensor) -> Layer:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    run = torch.ops.mkldnn._linear_pointwise
    return lambda x: lambda: run(x, packed, None, "none", [], "")


def _native_layer(context: Context, linear: NativeLinear) -> Layer:
    run = context.function("linear", structs.ReefLinearArgs)

    def layer(x: Tensor) -> Callable[[], None]:
        y = torch.empty(len(x), linear.out_features, dtype=torch.bfloat16)
        scratch = temporary_bytes(linear.scratch_bytes(len(x)))
        args = linear.args(x, y, scratch)
        kept = (x, y, scratch)
        return lambda: (run(args), kept)

    return layer


def _int8(weight: Tensor) -> QuantizedWeight:
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = torch.round(weight / scales).to(torch.int8)
    return QuantizedWeight("int8", codes, scales, group_size=weight.shape[1])


def _results(fastest: dict[str, float], kernels: dict[str, Copies], rows: int) -> str:
    texts = []
    for name, seconds in fastest.items():
        gb_per_s = kernels[name].nbytes / seconds / 1e9
        if name == "read":
            texts.append(f"read {gb_per_s:.1f} GB/s")
            continue
        gflop_per_s = kernels[name].flop_per_row * rows / seconds / 1e9
        texts.append(f"{name} {seconds * 1e3:.3f} ms {gb_per_s:.1f} GB/s {gflop_per_s:.0f} GFLOP/s")
    if "torch" in fastest:
        texts += [
            f"{name} / torch {fastest['torch'] / seconds:.2f}x"
            for name, seconds in fastest.items()
            if name in ("bf16", "int8")
        ]
    return " | ".join(texts)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Linear layers, native and torch's.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--kernels", nargs="+", default=["bf16", "int8", "torch"])
    parser.add_argument("--rows-of-x", nargs="+", type=int, default=[1, 8, 16, 32, 128, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mib", type=int, default=160, help="of bfloat16 weights of one shape")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
