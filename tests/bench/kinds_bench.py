"""Measures decode steps of adapters that are more than A and B, beside plain ones of equal rank.

    python -m tests.bench.kinds_bench small --batch 8

Every round runs all cases in turn; ratios and differences are of medians of the same round. What is
more than a plain adapter is made in memory, so that loading is not measured. `head` is LoRA on the
output layer alone; its floor is reading its factors once at the bandwidth of the same rounds. A
second row has the times to load a plain adapter and one with DoRA, from files read before.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from engine.engine import Engine
from engine.lora.host_cache import HostAdapter
from engine.lora.overlay import Overlay
from engine.lora.weights import LoraWeights, SiteWeights
from engine.messages import AdapterFolder
from tests.bench.environment import append_row, header
from tests.bench.models import SHAPES, Shape, make_adapters
from tests.bench.step_bench import Case, adapter_folders, make_engine, measure, run

RANK = 16
KINDS = ("base", "plain", "dora", "head")


def main() -> None:
    options = _parse()
    torch.set_num_threads(options.threads)
    shape, batch = SHAPES[options.shape], options.batch
    plain = adapter_folders(make_adapters(shape, batch, [RANK]))
    folders = {
        kind: [AdapterFolder(f"{kind}-{a.digest}", a.path) for a in plain] for kind in KINDS[1:]
    }
    engine = _engine(shape, options)
    milliseconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    bandwidths: list[float] = []
    for _ in range(options.rounds):
        bandwidths.append(measure(options.threads).bytes_per_s)
        for kind in KINDS:
            steps = run(engine, Case("none", batch, kind), folders, options.steps)
            milliseconds[kind].append(1e3 * statistics.median(steps))
    conditions = f"{header(0)} | kinds | {shape.name} | decode x{batch}, each row its own adapter"
    append_row(
        options.rows,
        f"{conditions} of rank {RANK} | {options.rounds} rounds of {options.steps} steps | "
        f"{engine.info.kernels} | {_results(milliseconds, bandwidths, shape, batch)}",
    )

    loads = _loads(engine, Path(plain[0].path), options.rounds)
    append_row(
        options.rows,
        f"{header(0)} | kinds | {shape.name} | load, rank {RANK}, all linear layers | "
        f"{engine.info.kernels} | ms {loads}",
    )


def _loads(engine: Engine, plain: Path, num_rounds: int) -> str:
    """Load a plain adapter and the same with DoRA in turn."""
    engine.loader.model = engine.model
    milliseconds: dict[str, list[float]] = {"plain": [], "dora": []}
    with tempfile.TemporaryDirectory() as name:
        _write_dora(plain, Path(name))
        for number in range(num_rounds + 1):
            for kind, folder in zip(milliseconds, (str(plain), name), strict=True):
                start = time.perf_counter()
                engine.loader.load(AdapterFolder(f"load-{kind}", folder))
                if number:  # the first one opens the base's files
                    milliseconds[kind].append(1e3 * (time.perf_counter() - start))
    return ", ".join(f"{kind} {_range(values)}" for kind, values in milliseconds.items())


def _write_dora(plain: Path, folder: Path) -> None:
    config = json.loads((plain / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    tensors = load_file(plain / "adapter_model.safetensors")
    magnitudes = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): torch.full((len(b),), 0.6)
        for name, b in tensors.items()
        if name.endswith("lora_B.weight")
    }
    save_file(tensors | magnitudes, folder / "adapter_model.safetensors")


def _results(
    milliseconds: dict[str, list[float]], bandwidths: list[float], shape: Shape, batch: int
) -> str:
    base, plain, dora, head = milliseconds.values()
    nbytes = batch * 2 * RANK * (shape.vocab_size + shape.hidden_size)
    floor = 1e3 * nbytes / statistics.median(bandwidths)
    steps = ", ".join(f"{kind} {_range(values)}" for kind, values in milliseconds.items())
    ratio = _range([d / p for d, p in zip(dora, plain, strict=True)])
    added = _range([h - b for h, b in zip(head, base, strict=True)])
    return (
        f"ms {steps} | dora / plain {ratio} | head adds {added} ms, reading its "
        f"{nbytes / 1e6:.1f} MB takes {floor:.2f} ms"
    )


def _engine(shape: Shape, options: argparse.Namespace) -> Engine:
    engine = make_engine(shape, "none", options)
    engine.proofs = None  # which would compare these adapters with the files of plain ones
    packing = _packing(engine.model.pack_adapter, shape)
    engine.loader.model = replace(engine.model, pack_adapter=packing)
    return engine


def _packing(
    pack: Callable[[LoraWeights], HostAdapter], shape: Shape
) -> Callable[[LoraWeights], HostAdapter]:
    def packed(weights: LoraWeights) -> HostAdapter:
        kind = weights.digest.partition("-")[0]
        if kind == "dora":
            sites = {key: _scaled(site) for key, site in weights.sites.items()}
            return pack(replace(weights, sites=sites))
        if kind == "head":
            return pack(replace(weights, sites={}, head=_head(shape)))
        return pack(weights)

    return packed


def _scaled(site: SiteWeights) -> SiteWeights:
    """Scale all outputs, as DoRA does; a bias of the base would add a shift to q, k and v."""
    return replace(site, scale=torch.full((max(e[3] for e in site.expands),), 1.01))


def _head(shape: Shape) -> Overlay:
    a = torch.full((RANK, shape.hidden_size), 0.01, dtype=torch.bfloat16)
    b = torch.full((RANK, shape.vocab_size), 0.01, dtype=torch.bfloat16)
    none = torch.zeros(0, dtype=torch.int64)
    rows = torch.zeros(0, shape.hidden_size, dtype=torch.bfloat16)
    return Overlay(none, rows, (a, b), shape.vocab_size)


def _range(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decode steps of adapters of several kinds.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="measured per case and round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kernels", default="auto", help="auto or torch")
    parser.add_argument("--chunk", type=int, default=512, help="tokens in a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=Path, help="append the row to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
