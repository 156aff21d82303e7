"""Measures the quality of each weight format: the demo's answers and perplexity, held out.

    python -m tests.bench.quality_bench --demo .data/demo --formats none int8 int8+model nf4

`+model` and `+head8` set the output layer, `+a8` and `+a16` activations to int8 and bf16, `+kv8`
the KV cache to int8. `gptq` and `awq` are checkpoints made of the base, rounded to nearest in
groups of 128. `exact` counts answers equal to the expected one. Perplexity is of the held-out texts
under the base, and of the expected answers under their adapters. The first format is float32, by
torch: the reference for all others.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerFast

from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import AdapterFolder, GenerateRequest
from engine.scheduler.request import SamplingParams
from examples.demo.tokenizer import as_chat
from tests.bench.environment import append_row, header
from tests.bench.packed_base import CONFIGS, packed_base

MAX_TOKENS = 64
OUTPUT_LAYERS = {"model": "model", "head8": "int8"}


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out prompt. `text_ids` are those of the prompt, followed by the answer's."""

    job: str
    prompt_ids: list[int]
    text_ids: list[int]
    answer: str


@dataclass(frozen=True, slots=True)
class Quality:
    right: dict[str, int]
    asked: dict[str, int]
    base_perplexity: float
    answer_perplexity: float


def main() -> None:
    options = _parse()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.demo / "base")
    questions = read_questions(options.demo, tokenizer)
    append_row(options.rows, f"{header(0)} | quality of {options.demo.name}")
    with TemporaryDirectory() as scratch:
        for form in ("float32", *options.formats):
            engine = make_engine(options.demo / "base", form, Path(scratch) / form)
            quality = measure(engine, options.demo, tokenizer, questions)
            append_row(options.rows, _row(form, engine, quality))
            engine.close()


def read_questions(demo: Path, tokenizer: PreTrainedTokenizerFast) -> list[Question]:
    held_out = json.loads((demo / "heldout.json").read_text())
    found: list[Question] = []
    for job, examples in held_out.items():
        for example in examples:
            prompt = tokenizer.encode(
                as_chat(tokenizer, example["prompt"]), add_special_tokens=False
            )
            answer = tokenizer.encode(example["answer"], add_special_tokens=False)
            found.append(Question(job, prompt, prompt + answer, example["answer"]))
    return found


def make_engine(base: Path, form: str, scratch: Path) -> Engine:
    """Make an engine; a checkpoint that is made of the base lies in `scratch`."""
    quantization, *extras = form.split("+")
    is_packed = quantization in CONFIGS
    is_exact = form == "float32"
    return Engine(
        EngineConfig(
            source=str(packed_base(base, quantization, scratch) if is_packed else base),
            device="cpu",
            dtype="float32" if is_exact else "bfloat16",
            quantization="none" if is_exact or is_packed else quantization,
            activations="int8" if "a8" in extras else "bf16" if "a16" in extras else "auto",
            output_layer=OUTPUT_LAYERS.get(extras[-1], "auto") if extras else "auto",
            kv_dtype="int8" if "kv8" in extras else "auto",
            memory_bytes=256 * 2**20,
        )
    )


def measure(
    engine: Engine, demo: Path, tokenizer: PreTrainedTokenizerFast, questions: list[Question]
) -> Quality:
    adapters = {q.job: AdapterFolder(q.job, str(demo / "adapters" / q.job)) for q in questions}
    greedy = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    scored = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, ignore_eos=True)
    requests: list[GenerateRequest] = []
    for i, q in enumerate(questions):
        own = adapters[q.job]
        requests.append(GenerateRequest(f"answer {i}", q.prompt_ids, greedy, adapter_folder=own))
        requests.append(GenerateRequest(f"own {i}", q.text_ids, scored, adapter_folder=own))
        requests.append(GenerateRequest(f"base {i}", q.prompt_ids, scored))
    outputs = dict(_run(engine, requests))
    right, asked = dict.fromkeys(adapters, 0), dict.fromkeys(adapters, 0)
    answer_logprobs: list[float] = []
    base_logprobs: list[float] = []
    for i, q in enumerate(questions):
        text = tokenizer.decode(outputs[f"answer {i}"].token_ids, skip_special_tokens=True)
        right[q.job] += text == q.answer
        asked[q.job] += 1
        answer_logprobs += outputs[f"own {i}"].logprobs[len(q.prompt_ids) - 1 :]
        base_logprobs += outputs[f"base {i}"].logprobs
    return Quality(right, asked, _perplexity(base_logprobs), _perplexity(answer_logprobs))


@dataclass(slots=True)
class _Output:
    token_ids: list[int]
    logprobs: list[float]  # of prompt tokens, from the second on


def _run(engine: Engine, requests: list[GenerateRequest]) -> Iterator[tuple[str, _Output]]:
    for request in requests:
        engine.add_request(request)
    found = {r.request_id: _Output([], []) for r in requests}
    while engine.has_unfinished:
        for output in engine.step():
            assert output.error is None, output.error
            own = found[output.request_id]
            own.token_ids += output.token_ids
            own.logprobs += [e.logprob for e in output.prompt_logprobs or [] if e is not None]
    return iter(found.items())


def _perplexity(logprobs: list[float]) -> float:
    return math.exp(-sum(logprobs) / len(logprobs))


def _row(form: str, engine: Engine, quality: Quality) -> str:
    exact = ", ".join(
        f"{job} {quality.right[job]}/{quality.asked[job]}" for job in sorted(quality.asked)
    )
    share = sum(quality.right.values()) / sum(quality.asked.values())
    return (
        f"{form} | {engine.info.kernels} | exact {share:.2%} ({exact}) | perplexity: held-out text "
        f"{quality.base_perplexity:.4f}, answers {quality.answer_perplexity:.5f}"
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answers and perplexity by weight format.")
    parser.add_argument("--demo", type=Path, default=Path(".data/demo"))
    parser.add_argument(
        "--formats",
        nargs="+",
        default=["none", "none+head8", "int8", "int8+model", "nf4", "nf4+model"],
    )
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
