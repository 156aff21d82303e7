"""Times the 4-bit linear kernels for the layers of a model of Qwen2.5-0.5B's shape.

    python -m tests.bench.kernel_bench_fourbit [--rows 1 8] [--formats nf4] [--isa avx512]

Each call multiplies another copy of the weight, so weights come from memory, as they do in a
decoder's step. If bitsandbytes is installed, its Linear4bit is timed too.
"""

import argparse
import ctypes as c
import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.library import Context, supported_isas
from engine.backends.native.linear import NativeLinear
from engine.backends.native.memory import Blocks
from engine.model.quantize import quantize_int4, quantize_int8
from engine.model.quantized_weight import QuantizedWeight

SHAPES = {"qkv": (1152, 896), "o": (896, 896), "gate_up": (9728, 896), "down": (896, 4864)}
FORMATS = ("nf4", "nf4_int8", "int4", "int4_int8", "int4_int8_sym", "int4_int8_short", "int8")
ROWS = (1, 8, 32, 128, 512)
COPIES_BYTES = 160 * 2**20  # several times the largest cache
SECONDS = 0.4  # per measurement


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    context = Context(options.isa, options.threads)
    read = read_bandwidth(context.threads)
    print(f"isa {context.isa}, {context.threads} threads, group size {options.group_size}")
    print(f"pure read {read:.1f} GB/s")
    for name in options.formats:
        print(
            f"\n{name:14}{'rows':>5}{'ms':>9}{'GB/s':>7}{'GFLOP/s':>9}{'of read':>9}{'min ms':>9}"
        )
        _print_format(context, name, options, read)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--formats", nargs="+", choices=(*FORMATS, "bnb_nf4"), default=_formats())
    parser.add_argument("--isa", choices=supported_isas())
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--group-size", type=int, default=64)
    return parser.parse_args()


def _print_format(context: Context, name: str, options: argparse.Namespace, read: float) -> None:
    total = dict.fromkeys(options.rows, (0.0, 0.0, 0))
    for layer, shape in SHAPES.items():
        for rows, (median, best, nbytes) in _measure(context, name, shape, options).items():
            _print_line(layer, rows, median, best, nbytes, shape[0] * shape[1], read)
            total[rows] = tuple(
                a + b for a, b in zip(total[rows], (median, best, nbytes), strict=True)
            )
    weights = sum(out * inputs for out, inputs in SHAPES.values())
    for rows, (median, best, nbytes) in total.items():
        _print_line("all", rows, median, best, nbytes, weights, read)


def _print_line(
    layer: str, rows: int, median: float, best: float, nbytes: int, weights: int, read: float
) -> None:
    bandwidth, flops = nbytes / median / 1e9, 2 * rows * weights / median / 1e9
    print(
        f"{layer:14}{rows:5}{median * 1e3:9.3f}{bandwidth:7.1f}{flops:9.0f}"
        f"{bandwidth / read:9.0%}{best * 1e3:9.3f}"
    )


def _measure(
    context: Context, name: str, shape: tuple[int, int], options: argparse.Namespace
) -> dict[int, tuple[float, float, int]]:
    """Return median and shortest seconds, and the weight's bytes, by number of rows."""
    calls, nbytes = _calls(context, name, shape, options.group_size)
    results = {}
    for rows in options.rows:
        x = torch.randn(rows, shape[1]).bfloat16()
        results[rows] = (*_time([call(x) for call in calls]), nbytes)
    return results


Call = Callable[[Tensor], Callable[[], object]]


def _calls(
    context: Context, name: str, shape: tuple[int, int], group_size: int
) -> tuple[list[Call], int]:
    """Make copies of one layer: functions of x that return the call to be timed."""
    if name == "bnb_nf4":
        return _bitsandbytes_calls(shape, group_size)
    form, *extras = name.split("_")
    weight, int8 = random_weight(form, shape, group_size), "int8" in extras
    if "sym" in extras:
        weight = replace(weight, zeros=torch.full_like(weight.scales, 8.0))
    if "short" in extras:
        weight = quantize_int4(torch.randn(shape))
    first = NativeLinear(context, weight, int8_activations=int8)
    copies = range(COPIES_BYTES // first.nbytes)
    layers = [NativeLinear(context, weight, int8_activations=int8) for _ in copies]
    return [
        lambda x, layer=layer: _native_call(context, layer, x) for layer in layers
    ], first.nbytes


def _native_call(context: Context, layer: NativeLinear, x: Tensor) -> Callable[[], object]:
    """Prepare the call with y and scratch allocated before, as a decoder reuses them."""
    y = torch.empty(len(x), layer.out_features, dtype=torch.bfloat16)
    scratch = Blocks().cut(layer.scratch_bytes(len(x)))
    run, args = context.function("linear", structs.ReefLinearArgs), layer.args(x, y, scratch)
    return lambda: (run(args), y, scratch)


def _bitsandbytes_calls(shape: tuple[int, int], group_size: int) -> tuple[list[Call], int]:
    from bitsandbytes.nn import Linear4bit, Params4bit

    def layer() -> torch.nn.Module:
        linear = Linear4bit(shape[1], shape[0], bias=False, compute_dtype=torch.bfloat16)
        dense = torch.randn(shape).bfloat16()
        linear.weight = Params4bit(
            dense, requires_grad=False, quant_type="nf4", blocksize=group_size
        )
        return linear.to("cpu").eval()

    nbytes = shape[0] * shape[1] // 2 + shape[0] * shape[1] // group_size * 4
    layers = [layer() for _ in range(COPIES_BYTES // nbytes)]
    return [lambda x, linear=linear: lambda: linear(x) for linear in layers], nbytes


def _time(calls: list[Callable[[], object]]) -> tuple[float, float]:
    """Return median and shortest seconds of a call."""
    samples: list[float] = []
    with torch.inference_mode():
        calls[0]()
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end or len(samples) < 5:
            call = calls[len(samples) % len(calls)]
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
    return statistics.median(samples), min(samples)


def random_weight(format: str, shape: tuple[int, int], group_size: int) -> QuantizedWeight:
    out_features, in_features = shape
    if format == "int8":
        return quantize_int8(torch.randn(shape))
    codes = torch.randint(0, 256, (out_features, in_features // 2), dtype=torch.uint8)
    scales = torch.rand(out_features, in_features // group_size) * 0.02 + 0.01
    zeros = torch.randint(0, 16, scales.shape).float() if format == "int4" else None
    return QuantizedWeight(format, codes, scales, group_size, zeros)


def read_bandwidth(threads: int) -> float:
    """Measure GB/s with all threads searching their share of a block for an absent byte."""
    block = Blocks().cut(512 * 2**20).zero_()
    share = len(block) // threads
    search = c.CDLL(None).memchr
    search.argtypes, search.restype = [c.c_void_p, c.c_int, c.c_size_t], c.c_void_p

    def read() -> float:
        workers = [
            threading.Thread(target=search, args=(block.data_ptr() + i * share, 1, share))
            for i in range(threads)
        ]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - start

    return len(block) / min(read() for _ in range(8)) / 1e9


def _formats() -> tuple[str, ...]:
    return FORMATS if find_spec("bitsandbytes") is None else (*FORMATS, "bnb_nf4")


if __name__ == "__main__":
    main()
