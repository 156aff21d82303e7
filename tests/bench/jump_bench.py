"""Compares structured output with and without jumps over tokens that a grammar leaves no choice of.

    python -m tests.bench.jump_bench small --kinds records names free --clients 1 16 --rounds 3

The same requests on one engine, interleaved, without HTTP. Both ways must give the same tokens.

    records  lists of small records, as of `grammar_bench`
    names    lists of objects whose names are longer than their values
    tools    lists of calls of one tool, whose name and parameters are long
    free     a regular expression that forces nothing: what looking for certain tokens costs
"""

import argparse
import os
import random
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deployments.ingress.structured.constraint import Constraint, to_grammar
from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import AdapterFolder, GenerateRequest
from engine.scheduler.request import SamplingParams
from tests.bench.environment import NoiseMeter, append_row, comparison, header, in_turns
from tests.bench.environment import median_and_range as spread
from tests.bench.grammar_bench import RECORD
from tests.bench.models import SHAPES, Shape, make_adapters, make_model

PROMPT, OUTPUT = 48, 96
NAMES = (
    "customer_identification_number",
    "shipping_address_line_one",
    "preferred_contact_method",
    "date_of_last_modification",
)


def main() -> None:
    options = _parse()
    shape = SHAPES[options.shape]
    engine = Engine(_config(make_model(shape), max(options.clients)))
    adapters = [AdapterFolder(f.name, str(f)) for f in make_adapters(shape, options.adapters)]
    for kind in options.kinds:
        for clients in options.clients:
            requests = requests_of(kind, shape, adapters, max(clients, options.requests))
            row = measure(engine, requests, clients, options.rounds)
            append_row(options.rows, f"{_conditions(options, kind, clients)} | {row}")
    engine.close()


def measure(
    engine: Engine, requests: Sequence[GenerateRequest], clients: int, num_rounds: int
) -> str:
    def run(jumps_ahead: bool) -> "Figures":
        engine.jumps_ahead = jumps_ahead
        return run_once(engine, requests, clients)

    off, on = partial(run, False), partial(run, True)
    assert off().answers == on().answers, "jumps have changed an answer"
    noise = NoiseMeter([os.getpid()])
    pairs = [in_turns(number, off, on) for number in range(num_rounds)]
    others = noise.read().others
    figures = [
        f"{name} {comparison([(getattr(a, key), getattr(b, key)) for a, b in pairs], digits)}"
        for name, key, digits in (
            ("tokens/s", "tokens_per_s", 1),
            ("tokens/CPU s", "tokens_per_cpu_s", 1),
            ("tokens/step", "tokens_per_step", 2),
        )
    ]
    return " | ".join([*figures, f"others {spread([others], 2)} cores"])


class Figures:
    """What one run of all requests shows; CPU seconds are those of the engine's process."""

    def __init__(self, answers: dict[str, list[int]], wall_s: float, cpu_s: float, steps: int):
        num_tokens = sum(map(len, answers.values()))
        self.answers = answers
        self.tokens_per_s = num_tokens / wall_s
        self.tokens_per_cpu_s = num_tokens / cpu_s
        self.tokens_per_step = num_tokens / steps


def run_once(engine: Engine, requests: Sequence[GenerateRequest], clients: int) -> Figures:
    queue, alive = list(requests), 0
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    start_s, start_cpu_s, start_steps = time.perf_counter(), time.process_time(), steps_of(engine)
    while queue or alive:
        while queue and alive < clients:
            engine.add_request(queue.pop())
            alive += 1
        for output in engine.step():
            assert output.error is None, output.error
            answers[output.request_id] += output.token_ids
            alive -= output.finish_reason is not None
        if engine.is_idle and alive:
            time.sleep(0.0005)  # a grammar is compiled, or an adapter read
    wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    return Figures(answers, wall_s, cpu_s, steps_of(engine) - start_steps)


def steps_of(engine: Engine) -> int:
    return engine.stats.total_steps


# ==== requests ====


def requests_of(
    kind: str, shape: Shape, adapters: Sequence[AdapterFolder], count: int
) -> list[GenerateRequest]:
    dice = random.Random(1)
    grammar = to_grammar(KINDS[kind]).text
    return [
        GenerateRequest(
            f"{number}",
            [dice.randrange(shape.vocab_size) for _ in range(PROMPT)],
            SamplingParams(max_tokens=OUTPUT, seed=number, grammar=grammar),
            adapter_folder=adapters[number % len(adapters)] if adapters else None,
        )
        for number in range(count)
    ]


def _json(schema: dict[str, Any]) -> Constraint:
    return Constraint("json", {"type": "array", "items": schema, "minItems": 500}, "json")


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_LONG_NAMES = _object({name: {"type": "string", "maxLength": 12} for name in NAMES})
_CALL = _object({"name": {"const": "update_customer_address"}, "arguments": _LONG_NAMES})
KINDS = {
    "records": _json(RECORD),
    "names": _json(_LONG_NAMES),
    "tools": _json(_CALL),
    "free": Constraint("regex", "[a-z ]{2000,3000}", "regex"),
}


# ==== options ====


def _config(source: Path, clients: int) -> EngineConfig:
    return EngineConfig(
        str(source),
        max_num_seqs=clients,
        max_model_len=512,
        memory_bytes=2**30,
        num_threads=torch.get_num_threads(),
        quantization="auto",
    )


def _conditions(options: argparse.Namespace, kind: str, clients: int) -> str:
    return (
        f"{header(1)} | jumps, A each token sampled, B jumps | {options.shape} int8 | {kind}, "
        f"{clients} clients, {max(clients, options.requests)} requests, prompt {PROMPT}, output "
        f"{OUTPUT}, {options.adapters} adapters, {options.rounds} rounds"
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What jumps over certain tokens gain and cost.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--requests", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


if __name__ == "__main__":
    main()
