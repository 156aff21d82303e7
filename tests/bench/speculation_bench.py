"""Compares decoding with and without speculation: the same requests on one engine, interleaved.

    python -m tests.bench.speculation_bench small half --clients 1 8 --rounds 3
    python -m tests.bench.speculation_bench --demo .data/demo --clients 1 8

The shapes' weights are random and copy nothing, so their layers' outputs are made zero, as costly
as before: the next token then depends on the last one alone, by a fixed permutation.

    copy    the prompt follows the permutation, but for one token in twelve; so does the answer
    free    tokens are drawn evenly from thirty: nearly every pair was there before, and what
            followed it then is wrong 29 times in 30
    mixed   half of the requests of each kind

With `--draft` a smaller model guesses instead of the request's own text: of the same vocabulary and
the same permutation, so it is always right where the answer follows that, as the base's does
(`--adapters 0`); what it gains then is the most that such a model can.

With a trained demo the held-out prompts of its adapters are asked, each of its jobs apart, and
`base` asks them of the base. Half of a job's answers are a few tokens long.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig, SpeculationConfig
from engine.engine import Engine
from engine.messages import AdapterFolder, GenerateRequest
from engine.scheduler.request import SamplingParams
from tests.bench.engine_driver import num_ended
from tests.bench.environment import NoiseMeter, append_row, comparison, header, in_turns
from tests.bench.environment import median_and_range as spread
from tests.bench.models import CACHE, SHAPES, Shape, make_adapters, make_model

PROMPT, OUTPUT = 192, 128
STEP = 7919  # of the permutation, t -> t + STEP
NOISE = 12
KINDS = ("copy", "free", "mixed")


def main() -> None:
    options = _parse()
    for source, kinds in _sources(options):
        draft = make_copier(draft_shape(source.parent.name)) if options.draft else None
        engine = Engine(_config(source, max(options.clients), options.quantization, draft))
        for (kind, make), clients in ((k, c) for k in kinds.items() for c in options.clients):
            row = measure(engine, make, clients, options)
            append_row(options.rows, f"{_conditions(options, source, kind, clients)} | {row}")
        engine.close()


Make = Callable[[int], list[GenerateRequest]]  # as many requests


def _sources(options: argparse.Namespace) -> Iterator[tuple[Path, dict[str, Make]]]:
    if options.demo is not None:
        yield options.demo / "base", demo_kinds(options.demo)
    for name in options.shapes:
        shape = SHAPES[name]
        adapters = [AdapterFolder(f.name, str(f)) for f in make_adapters(shape, options.adapters)]
        kinds = {kind: partial(requests_of, kind, shape.vocab_size, adapters) for kind in KINDS}
        yield make_copier(shape), {kind: kinds[kind] for kind in options.kinds}


def measure(engine: Engine, make: Make, clients: int, options: argparse.Namespace) -> str:
    requests = make(max(clients, options.requests))
    speculation = engine.scheduler.speculation
    assert speculation is not None

    def run(wanted: object) -> tuple[float, float]:
        engine.scheduler.speculation = wanted  # type: ignore[assignment]
        return run_once(engine, requests, clients)

    off, on = partial(run, None), partial(run, speculation)
    off()
    on()
    before, noise = engine.stats, NoiseMeter([os.getpid()])
    pairs = [in_turns(number, off, on) for number in range(options.rounds)]
    after, others = engine.stats, noise.read().others
    engine.scheduler.speculation = speculation
    known = engine.scheduler.step_budget.times.coefficients
    drafted = after.total_drafted_tokens - before.total_drafted_tokens
    accepted = after.total_accepted_tokens - before.total_accepted_tokens
    share = (after.total_output_tokens - before.total_output_tokens) / 2
    return (
        f"tokens/s {comparison([(a[0], b[0]) for a, b in pairs], 1)} | tokens/CPU s "
        f"{comparison([(a[1], b[1]) for a, b in pairs], 1)} | drafted {drafted / share:.2f}, "
        f"accepted {accepted / share:.2f} of each token | "
        f"row {1e3 * (known.token + known.logit_row):.3f} ms, step {1e3 * known.fixed:.3f} ms "
        f"without any | others {spread([others], 2)} cores"
    )


def run_once(
    engine: Engine, requests: Sequence[GenerateRequest], clients: int
) -> tuple[float, float]:
    """Return tokens per second and per CPU second of this process."""
    queue, alive, tokens = list(requests), 0, 0
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    while queue or alive:
        while queue and alive < clients:
            engine.add_request(queue.pop())
            alive += 1
        outputs = engine.step()
        alive -= num_ended(outputs)
        tokens += sum(len(output.token_ids) for output in outputs)
        if engine.is_idle and alive:
            time.sleep(0.0005)  # an adapter is being read
    wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    return tokens / wall_s, tokens / cpu_s


# ==== requests ====


def requests_of(
    kind: str, vocab_size: int, adapters: Sequence[AdapterFolder], count: int
) -> list[GenerateRequest]:
    dice = random.Random(1)
    kinds = {"copy": (True,), "free": (False,), "mixed": (True, False)}[kind]
    return [
        _request(
            f"{i}",
            kinds[i % len(kinds)],
            vocab_size,
            dice,
            adapters[i % len(adapters)] if adapters else None,
        )
        for i in range(count)
    ]


def _request(
    request_id: str,
    copies: bool,
    vocab_size: int,
    dice: random.Random,
    adapter: AdapterFolder | None,
) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=OUTPUT, temperature=0, ignore_eos=True)
    if copies:
        start = dice.randrange(vocab_size)
        prompt = [(start + i * STEP) % vocab_size for i in range(PROMPT - 1)]
        for i in range(5, len(prompt), NOISE):
            prompt[i] = dice.randrange(vocab_size)
        prompt.append((start - STEP) % vocab_size)
    else:
        few = tuple(dice.sample(range(1, vocab_size), 30))
        prompt = dice.choices(few, k=PROMPT)
        even = {"temperature": 100.0, "allowed_token_ids": few, "seed": dice.randrange(10**6)}
        sampling = replace(sampling, **even)
    return GenerateRequest(request_id, prompt, sampling, adapter_folder=adapter)


def demo_kinds(demo: Path) -> dict[str, Make]:
    from transformers import PreTrainedTokenizerFast

    from examples.demo.tokenizer import as_chat

    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo / "base")
    sampling = SamplingParams(max_tokens=64, temperature=0.0)
    kinds: dict[str, Make] = {}
    everything: list[tuple[list[int], str]] = []

    def make(asked: list[tuple[list[int], str]], count: int) -> list[GenerateRequest]:
        dice = random.Random(1)
        chosen = [asked[dice.randrange(len(asked))] for _ in range(count)]
        return [
            GenerateRequest(
                f"{i}",
                prompt,
                sampling if job else replace(sampling, ignore_eos=True, temperature=1.0, seed=i),
                adapter_folder=AdapterFolder(job, str(demo / "adapters" / job)) if job else None,
            )
            for i, (prompt, job) in enumerate(chosen)
        ]

    for job, examples in json.loads((demo / "heldout.json").read_text()).items():
        texts = [as_chat(tokenizer, example["prompt"]) for example in examples]
        prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        kinds[job] = partial(make, [(prompt, job) for prompt in prompts])
        everything += [(prompt, "") for prompt in prompts]
    return {**kinds, "base": partial(make, everything)}


# ==== a model that copies ====


def make_copier(shape: Shape) -> Path:
    """Return the folder of a model whose next token is a function of the last one."""
    folder = CACHE / shape.name / "copier"
    if folder.exists():
        return folder
    base, partial_folder = make_model(shape), folder.with_name("copier.partial")
    partial_folder.mkdir(parents=True, exist_ok=True)
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = torch.roll(embedding, STEP, 0)  # row t + STEP is that of t
    save_file(tensors, partial_folder / "model.safetensors", {"format": "pt"})
    for path in base.iterdir():
        if path.name not in ("model.safetensors", "config.json"):
            (partial_folder / path.name).write_bytes(path.read_bytes())
    config = {**json.loads((base / "config.json").read_text()), "tie_word_embeddings": False}
    (partial_folder / "config.json").write_text(json.dumps(config, indent=2))
    partial_folder.rename(folder)
    return folder


def draft_shape(target: str) -> Shape:
    """Return a model of a few percent of the target's size, with its vocabulary."""
    return replace(
        SHAPES[target],
        name=f"{target}-draft",
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=1024,
    )


def _config(source: Path, clients: int, quantization: str, draft: Path | None) -> EngineConfig:
    return EngineConfig(
        source=str(source),
        device="cpu",
        max_num_seqs=clients,
        max_model_len=1024,
        memory_bytes=1024 * 2**20,
        enable_prefix_caching=False,
        structured_output="off",
        adapter_proof="off",
        quantization=quantization,
        speculation=SpeculationConfig("draft", model=str(draft))
        if draft
        else SpeculationConfig("ngram"),
    )


def _conditions(options: argparse.Namespace, source: Path, kind: str, clients: int) -> str:
    return (
        f"{header(1)} | speculation, A off, B {'a draft model' if options.draft else 'on'} | "
        f"{source.parent.name} {options.quantization} | {kind}, "
        f"{clients} clients, {max(clients, options.requests)} requests, "
        f"{options.adapters} adapters, {options.rounds} rounds"
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What speculation gains, and what it costs.")
    parser.add_argument("shapes", nargs="*", choices=SHAPES)
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--draft", action="store_true", help="guess by a smaller model")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
