"""Measures engine steps against their floor: decode and prefill, by weight format and adapters.

    python -m tests.bench.step_bench half --formats none int8 nf4 --batches 1 8 16

A step's floor is the larger of two times: its bytes (weights as stored, the distinct adapters of
the batch, KV) over the memory bandwidth, and its operations over the rate of bfloat16 products,
both measured in every round, as they drift with the host. Every round runs all cases in turn, so
that other load affects all equally; rows and rates are medians.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from engine.backends.native.forward import NativeForward
from engine.backends.native.library import Context
from engine.backends.native.linear import NativeLinear
from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import AdapterFolder, GenerateRequest
from engine.model.spec import kv_bytes_per_token
from engine.plan.machine import measure as measure_machine
from engine.scheduler.request import SamplingParams
from engine.sizes import Machine
from tests.bench.environment import append_row, header
from tests.bench.models import SHAPES, Shape, make_adapters, make_model

MIB = 2**20
ADAPTERS = ("base", "shared", "distinct", "uniform")
UNIFORM_RANK = 30  # the mean of 8, 16, 32 and 64
PROMPT = 128
Folders = dict[str, list[AdapterFolder]]


@dataclass(frozen=True, slots=True)
class Case:
    """A decode of `batch` requests; or, with `prefill`, one prompt of that many tokens."""

    form: str
    batch: int
    adapters: str
    prefill: int = 0

    def __str__(self) -> str:
        what = f"prefill {self.prefill}" if self.prefill else f"decode x{self.batch}"
        return f"{self.form} | {what} | {self.adapters}"


def main() -> None:
    options = _parse()
    torch.set_num_threads(options.threads)
    shape = SHAPES[options.shape]
    count = max([*options.batches, 4])
    folders = {
        "distinct": adapter_folders(make_adapters(shape, count)),
        "uniform": adapter_folders(make_adapters(shape, count, [UNIFORM_RANK])),
    }
    engines = {form: make_engine(shape, form, options) for form in options.formats}
    decodes = [Case(*c) for c in product(options.formats, options.batches, options.adapters)]
    prefills = [
        Case(form, 1, adapters, prefill)
        for form, prefill, adapters in product(options.formats, options.prefills, options.adapters)
        if adapters in ("base", "shared")
    ]
    cases = decodes + prefills
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    machines: list[Machine] = []
    for _ in range(options.rounds):
        machines.append(measure(options.threads))
        for case in cases:
            seconds[case] += run(engines[case.form], case, folders, options.steps)
    machines.append(measure(options.threads))
    machine = replace(
        machines[0],
        bytes_per_s=statistics.median(m.bytes_per_s for m in machines),
        flops_per_s=statistics.median(m.flops_per_s for m in machines),
    )
    conditions = f"{header(0)} | step | {shape.name} | prompt {PROMPT} | {options.rounds} rounds"
    append_row(
        options.rows,
        f"{conditions} | {engines[options.formats[0]].info.kernels} | read "
        f"{_range([m.bytes_per_s / 1e9 for m in machines])} GB/s, multiply "
        f"{_range([m.flops_per_s / 1e9 for m in machines])} GFLOP/s",
    )
    if options.profile:
        for form, batch in product(options.formats, options.batches):
            spent = profile(engines[form], batch, folders)
            text = ", ".join(f"{kind} {ms:.2f}" for kind, ms in spent.items())
            append_row(options.rows, f"{form} | decode x{batch} | base | profile in ms: {text}")
    for case, times in seconds.items():
        append_row(options.rows, _row(case, times, engines[case.form], shape, machine, folders))


def make_engine(shape: Shape, form: str, options: argparse.Namespace) -> Engine:
    quantization, *extras = form.split("+")
    return Engine(
        EngineConfig(
            source=str(make_model(shape)),
            device="cpu",
            dtype="bfloat16",
            quantization=quantization,
            activations="int8" if "a8" in extras else "bf16" if "a16" in extras else "auto",
            output_layer="model" if "model" in extras else "auto",
            kv_dtype="int8" if "kv8" in extras else "auto",
            kernels=options.kernels,
            max_num_batched_tokens=options.chunk,
            max_model_len=4096,
            memory_bytes=3072 * MIB,
            adapter_memory_bytes=2048 * MIB,
            enable_prefix_caching=False,
            num_threads=options.threads,
        )
    )


def measure(threads: int) -> Machine:
    """Measure the best rates: torch's sums and products, and the native kernels' products."""
    torch.set_num_threads(threads)
    machine = measure_machine(torch.device("cpu"), torch.bfloat16)
    context = Context(threads=threads)
    layer, x = NativeLinear(context, torch.ones(4096, 1024).bfloat16()), torch.ones(512, 1024)
    x, best = x.bfloat16(), float("inf")
    for _ in range(20):
        start = time.perf_counter()
        layer(x)
        best = min(best, time.perf_counter() - start)
    torch.set_num_threads(1)
    return replace(machine, flops_per_s=max(machine.flops_per_s, 2 * 512 * 1024 * 4096 / best))


# ==== one case ====


def run(engine: Engine, case: Case, folders: Folders, steps: int) -> list[float]:
    """Return the seconds of each step, or of the prompt."""
    for i, adapter in enumerate(chosen(case, folders)):
        engine.add_request(request(engine, i, case.prefill or PROMPT, adapter, steps + 8))
    if case.prefill:
        return [_first_token_s(engine)]
    while engine.stats.num_waiting or any(not r.output_token_ids for r in engine.scheduler.running):
        _step(engine)
    for _ in range(2):
        engine.step()
    times = [_timed(engine) for _ in range(steps)]
    _abort_all(engine)
    return times


def adapter_folders(paths: list[Path]) -> list[AdapterFolder]:
    return [AdapterFolder(path.name, str(path)) for path in paths]


def chosen(case: Case, folders: Folders) -> list[AdapterFolder | None]:
    """Choose the adapters.

    `shared` is one of rank 16; `distinct` have ranks 8, 16, 32, 64; `uniform` have equal ranks.
    """
    if case.adapters == "base":
        return [None] * case.batch
    if case.adapters == "shared":
        return [folders["distinct"][1]] * case.batch
    return list(folders[case.adapters][: case.batch])


def request(
    engine: Engine, index: int, length: int, adapter: AdapterFolder | None, max_tokens: int
) -> GenerateRequest:
    generator = torch.Generator().manual_seed(index)
    prompt = torch.randint(3, engine.info.vocab_size, (length,), generator=generator)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return GenerateRequest(f"r{index}", prompt.tolist(), sampling, adapter_folder=adapter)


def _timed(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start


def profile(engine: Engine, batch: int, folders: Folders) -> dict[str, float]:
    """Return milliseconds by kind of operation in a decode step of the base, medians of 20.

    "step" is the whole step, whose rest is the output layer, sampling and Python.
    """
    case = Case("", batch, "base")
    times = {"step": [1e3 * t for t in run(engine, case, folders, 20)]}
    for i, adapter in enumerate(chosen(case, folders)):
        engine.add_request(request(engine, i, PROMPT, adapter, 100))
    while any(not r.output_token_ids for r in engine.scheduler.running) or engine.stats.num_waiting:
        _step(engine)
    forward, scheduled = engine.runner.model, engine.scheduler.schedule(0.0)
    assert isinstance(forward, NativeForward) and scheduled is not None
    for _ in range(20):
        with torch.inference_mode():
            spent = forward.profile(scheduled, list(range(batch)))
        for kind, seconds in spent.items():
            times.setdefault(kind, []).append(1e3 * seconds)
    engine.scheduler.fail(scheduled)
    _abort_all(engine)
    return {kind: statistics.median(values) for kind, values in times.items()}


def _first_token_s(engine: Engine) -> float:
    while engine.stats.num_waiting and not engine.scheduler.running:
        start = time.perf_counter()
        outputs = _step(engine)
    while not outputs:
        outputs = engine.step()
    elapsed_s = time.perf_counter() - start
    _abort_all(engine)
    return elapsed_s


def _step(engine: Engine) -> list[object]:
    outputs = engine.step()
    if engine.is_idle:
        time.sleep(0.001)  # adapters are being read
    return list(outputs)


def _abort_all(engine: Engine) -> None:
    for waiting in range(64):
        engine.abort(f"r{waiting}")
    engine.step()


# ==== rows ====


def _range(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def _row(
    case: Case,
    times: list[float],
    engine: Engine,
    shape: Shape,
    machine: Machine,
    folders: Folders,
) -> str:
    median = statistics.median(times)
    floor = floor_s(case, engine, shape, machine, folders)
    rows = case.prefill or case.batch
    return (
        f"{case} | {median * 1e3:.2f} ms ({min(times) * 1e3:.2f}-{max(times) * 1e3:.2f}) | "
        f"{rows / median:.1f} tokens/s | floor {floor * 1e3:.2f} ms, {floor / median:.2f} of it"
    )


def floor_s(case: Case, engine: Engine, shape: Shape, machine: Machine, folders: Folders) -> float:
    rows = case.prefill or case.batch
    linear = shape.num_layers * sum(out * inner for out, inner in shape.linears.values())
    head = shape.vocab_size * shape.hidden_size
    distinct = {a.path: a for a in chosen(case, folders) if a}.values()
    adapters = sum(map(_adapter_bytes, distinct))
    context = 0 if case.prefill else PROMPT
    kv = rows * context * kv_bytes_per_token(engine.settled.spec, engine.settled.kv_dtype)
    read = engine.info.weight_bytes
    if engine.settled.output_layer == "int8" or not shape.tied:  # the embedding is not read whole
        read -= 2 * head
    bytes_s = (read + adapters + kv) / machine.bytes_per_s
    flop = 2 * (rows * linear + (1 if case.prefill else rows) * head)
    flop += rows * adapters // max(len(distinct), 1)
    is_int8 = "int8" in (engine.settled.weight_format, engine.settled.activations)
    rate = machine.flops_per_s * (2 if is_int8 else 1)
    return max(bytes_s, flop / rate)


def _adapter_bytes(folder: AdapterFolder) -> int:
    return Path(folder.path, "adapter_model.safetensors").stat().st_size


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One engine step beside its floor.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument(
        "--formats", nargs="+", default=["none"], help="none int8 nf4 nf4+a16 int8+model ..."
    )
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 16])
    parser.add_argument("--prefills", nargs="*", type=int, default=[])
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=["base", "distinct"])
    parser.add_argument("--kernels", default="auto", help="auto or torch")
    parser.add_argument("--chunk", type=int, default=512, help="tokens in a step")
    parser.add_argument("--steps", type=int, default=20, help="measured per case and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="also by kind of operation")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
