"""Measures what the proof of an adapter's effect adds to its first request.

    python -m tests.bench.proof_bench half

Two engines in this process, one that proves adapters and one that does not, are asked in turn for
one token of adapters that they have never seen. `prefill` is the same prompt by the base alone.
With a stream beside, the row shows its longest gap between two tokens. Times are in ms.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import AdapterFolder, GenerateRequest
from engine.proof.probe import NUM_PROMPT
from engine.scheduler.request import SamplingParams
from tests.bench.environment import append_row, header
from tests.bench.models import SHAPES, make_adapters, make_model

HOW = ("auto", "off")


def main() -> None:
    options = _parse()
    shape = SHAPES[options.shape]
    torch.set_num_threads(options.threads)
    folder, paths = make_model(shape), make_adapters(shape, 4)
    engines = {how: Engine(_config(folder, options.threads, how)) for how in HOW}
    figures: dict[str, list[float]] = {}
    for number in range(options.rounds + 1):
        for how in HOW if number % 2 else HOW[::-1]:
            for name, value in measure(engines[how], how, paths[number % 4], number).items():
                if number:  # the first round warms up, and proves the base
                    figures.setdefault(name, []).append(value)
    append_row(
        options.rows,
        f"{header(0)} | proof | {shape.name} bf16, LoRA of mixed ranks, {options.rounds} rounds",
    )
    append_row(options.rows, ", ".join(f"{n} {_spread(v)}" for n, v in figures.items()))
    added = [a - b for a, b in zip(figures["cold auto"], figures["cold off"], strict=True)]
    prefills = statistics.median(added) / statistics.median(figures["prefill auto"])
    append_row(options.rows, f"added {_spread(added)}: {prefills:.2f} prefills of the probe")


def measure(engine: Engine, how: str, path: Path, number: int) -> dict[str, float]:
    """Return milliseconds by name: a prefill, a cold and a warm adapter, a stream's longest gap."""
    adapter, beside = AdapterFolder(f"{how}-{number}", str(path)), AdapterFolder("b", str(path))
    figures = {
        f"prefill {how}": _ask(engine, None, number),
        f"cold {how}": _ask(engine, adapter, number),
    }
    engine.scheduler.discard_adapter(adapter.digest)
    for digest in engine.host.discard(adapter.digest):
        engine.scheduler.adapters.set_absent(digest)
    figures[f"from disk again {how}"] = _ask(engine, adapter, number)
    stranger = AdapterFolder(f"{beside.digest}-{number}", beside.path)
    return {**figures, f"gap beside {how}": _gap(engine, stranger, number)}


def _ask(engine: Engine, adapter: AdapterFolder | None, number: int) -> float:
    """Return the milliseconds of a request for one token."""
    start = time.perf_counter()
    engine.add_request(_request("r", adapter, number, 1))
    while not engine.step():
        if engine.is_idle:
            time.sleep(0.0002)  # the adapter is being read
    return 1e3 * (time.perf_counter() - start)


def _gap(engine: Engine, adapter: AdapterFolder, number: int) -> float:
    """Return a stream's longest gap while a new adapter is loaded, proven and used."""
    engine.add_request(_request("stream", None, number, 64))
    latest, gaps, is_asked = time.perf_counter(), [0.0], False
    while True:
        for output in engine.step():
            if output.request_id != "stream":
                continue
            now = time.perf_counter()
            gaps.append(now - latest)
            latest = now
            if not is_asked:
                gaps, is_asked = [0.0], True
                engine.add_request(_request("r", adapter, number, 1))
            if output.finish_reason is not None:
                return 1e3 * max(gaps)


def _request(
    name: str, adapter: AdapterFolder | None, number: int, max_tokens: int
) -> GenerateRequest:
    prompt = [(7 * i + number) % 1000 for i in range(NUM_PROMPT + 2)]
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return GenerateRequest(name, prompt, sampling, 1, adapter, cache_salt=f"{name} {number}")


def _config(folder: Path, threads: int, how: str) -> EngineConfig:
    return EngineConfig(str(folder), num_threads=threads, adapter_proof=how, memory_bytes=2**29)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
