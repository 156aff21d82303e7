"""Runs an Engine until all requests end, collects results, and makes PEFT folders."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import AdapterFolder, GenerateRequest, RequestOutput, TokenLogprobs
from engine.scheduler.request import SamplingParams

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


MIXED_LENGTHS = (1, 3, 16, 17, 30, 41, 70)


@dataclass(slots=True)
class Result:
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    last: RequestOutput | None = None
    first: RequestOutput | None = None
    num_outputs: int = 0

    def add(self, output: RequestOutput) -> None:
        assert self.last is None or self.last.finish_reason is None, "output after the end"
        assert self.first is None or output.prompt_logprobs is None, "they come with the first"
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or []
        self.first = self.first or output
        self.num_outputs += 1
        self.last = output


def make_engine(
    folder: Path, *, clock: Callable[[], float] = time.monotonic, **changes: Any
) -> Engine:
    defaults: dict[str, Any] = {
        "memory_bytes": 2**24,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 16,
        "block_size": 4,
        "device": "cpu",
    }
    return Engine(EngineConfig(str(folder), **{**defaults, **changes}), clock=clock)


def run(engine: Engine, requests: Sequence[GenerateRequest]) -> dict[tuple[str, int], Result]:
    """Submit all requests at once and step until all have ended."""
    for request in requests:
        engine.add_request(request)
    return finish(engine)


def finish(engine: Engine, max_steps: int = 20_000) -> dict[tuple[str, int], Result]:
    results: dict[tuple[str, int], Result] = {}
    while engine.has_unfinished:
        for output in engine.step():
            results.setdefault((output.request_id, output.index), Result()).add(output)
        engine.scheduler.check_integrity()
        if engine.is_idle:
            time.sleep(0.001)  # let the thread run that reads an adapter
        max_steps -= 1
        assert max_steps, "requests never end"
    for output in engine.step():
        results.setdefault((output.request_id, output.index), Result()).add(output)
    return results


def texts(results: dict[tuple[str, int], Result]) -> dict[tuple[str, int], list[int]]:
    return {key: result.token_ids for key, result in results.items()}


def greedy(max_tokens: int, **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **changes)


def prompt_of(length: int, seed: int = 0, vocab: int = 256) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (length,), generator=generator).tolist()


def write_adapter(base: Path, folder: Path, seed: int = 0, **config: Any) -> AdapterFolder:
    """Write a PEFT adapter with random A and B, large enough to change the text."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(**{"r": 8, "target_modules": ALL_LINEAR, **config}),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.7 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return AdapterFolder(f"digest-of-{folder.name}", str(folder))


def write_adapters(
    base: Path, folder: Path, configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, AdapterFolder]:
    """Write an adapter for each config below `folder`, each from a seed of its own."""
    return {
        name: write_adapter(base, folder / name, seed, **config)
        for seed, (name, config) in enumerate(configs.items())
    }


def write_mixed_adapters(base: Path, folder: Path) -> list[AdapterFolder]:
    """Write adapters: an odd rank, different ranks within one, one on two modules alone, and one
    that acts from the middle of its prompt in `mixed_requests` on."""
    alora = {"alora_invocation_tokens": prompt_of(30, seed=30)[17:19], "task_type": "CAUSAL_LM"}
    shapes: list[dict[str, Any]] = [
        {"r": 3},
        {"r": 8, "rank_pattern": {"q_proj": 5, "down_proj": 16}},
        {"r": 16, "target_modules": ["v_proj", "up_proj"]},
        {"r": 6, **alora},
    ]
    return [write_adapter(base, folder / f"a{i}", seed=i, **s) for i, s in enumerate(shapes)]


def mixed_requests(
    adapters: list[AdapterFolder], max_tokens: int, **greedy_changes: Any
) -> list[GenerateRequest]:
    """Make greedy and sampled requests of MIXED_LENGTHS, with and without an adapter."""
    hot = SamplingParams(max_tokens=max_tokens, temperature=1.3, top_p=0.9, seed=5, ignore_eos=True)
    own = [None, *adapters]
    return [
        GenerateRequest(
            f"r{n}",
            prompt_of(n, seed=n),
            hot if n % 2 else greedy(max_tokens, **greedy_changes),
            adapter_folder=own[i % len(own)],
        )
        for i, n in enumerate(MIXED_LENGTHS)
    ]


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """Generate greedy text by transformers, without stop tokens."""
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
        use_cache=True,
    )
    return output[0, len(prompt) :].tolist()
