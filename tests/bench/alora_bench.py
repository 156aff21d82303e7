"""Measures what a second adapter waits for its first token over a context that one has read.

    python -m tests.bench.alora_bench small --context 1024

One engine in this process, with pairs of adapters in memory: plain LoRAs, and aLoRAs of the same
weights. In each round each pair gets a context of its own, then its invocation and a question; the
pair's first adapter answers, and the time to the second one's first token is taken. In ms.
"""

import argparse
import random
import time
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import AdapterFolder, GenerateRequest, RequestOutput
from engine.scheduler.request import SamplingParams
from tests.bench.environment import append_row, comparison, header, in_turns
from tests.bench.models import SHAPES, make_adapters, make_model

INVOCATION = (11, 12, 13, 14)
Pair = list[AdapterFolder]


def main() -> None:
    options = _parse()
    shape, ranks = SHAPES[options.shape], [options.rank]
    torch.set_num_threads(options.threads)
    engine = Engine(_config(options, make_model(shape)))
    plain = _folders(make_adapters(shape, 2, ranks))
    activated = _folders(make_adapters(shape, 2, ranks, INVOCATION))
    draw = random.Random(options.seed)

    def measure(pair: Pair) -> tuple[float, int]:
        context = draw.choices(range(100, shape.vocab_size), k=options.context)
        question = draw.choices(range(100, shape.vocab_size), k=options.question)
        prompt = [*context, *INVOCATION, *question]
        first_token(engine, prompt, pair[0])
        return first_token(engine, prompt, pair[1])

    measure(plain), measure(activated)  # warm up: read the adapters, touch the memory
    rounds = [
        in_turns(number, lambda: measure(plain), lambda: measure(activated))
        for number in range(options.rounds)
    ]
    cached = sorted({found for _, (_, found) in rounds})
    append_row(
        options.rows,
        f"{header(options.seed)} | alora, A LoRA, B aLoRA | {shape.name} {options.quantization} | "
        f"rank {options.rank}, context {options.context}, invocation {len(INVOCATION)}, question "
        f"{options.question}, {options.rounds} rounds | TTFT ms of the second adapter "
        f"{comparison([(1e3 * a, 1e3 * b) for (a, _), (b, _) in rounds], 1)} | "
        f"cached tokens of B {', '.join(map(str, cached))}",
    )


def first_token(engine: Engine, prompt: list[int], adapter: AdapterFolder) -> tuple[float, int]:
    """Return the seconds to the first token, and how many of the prompt's tokens were cached."""
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    start_s = time.perf_counter()
    engine.add_request(GenerateRequest("r", prompt, sampling, adapter_folder=adapter))
    outputs: list[RequestOutput] = []
    while not outputs:
        outputs = engine.step()
    metrics = outputs[0].metrics
    assert metrics is not None
    return time.perf_counter() - start_s, metrics.num_cached_tokens


def _folders(paths: list[Path]) -> Pair:
    return [AdapterFolder(path.name, str(path)) for path in paths]


def _config(options: argparse.Namespace, source: Path) -> EngineConfig:
    return EngineConfig(
        source=str(source),
        device="cpu",
        dtype="bfloat16",
        quantization=options.quantization,
        max_num_seqs=4,
        max_num_batched_tokens=options.tokens,
        max_model_len=4096,
        memory_bytes=1024 * 2**20,
        num_threads=options.threads,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="TTFT of a second adapter over one context.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--question", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="in a step, at most")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
