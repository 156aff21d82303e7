"""Makes the demo's parts: the base, each adapter, the held-out prompts and the report on them.

Each function makes one part from a recipe, whether or not it exists already. An adapter's training
uses tuning prompts to decide when to stop; held-out prompts are used in the report only.
"""

import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from examples.demo.jobs import JOBS, examples_of
from examples.demo.lessons import LEXICON, draw_lesson
from examples.demo.model import ATTENTION, MAX_LENGTH, new_model
from examples.demo.orders import Example
from examples.demo.recipe import AdapterRecipe, Recipe
from examples.demo.tokenizer import train_tokenizer
from examples.demo.train import (
    ExampleSource,
    adapter_optimizers,
    base_optimizers,
    exact_match,
    train_round,
)
from examples.demo.words import Split, Words

BASE_NAME = "reef-demo-base"
BASE_PROMPT_WEIGHT = 0.05  # prompts teach the vocabulary, but most of a prompt is random
LEXICON_REPEATS = 20  # in addition to the lessons, so that each word becomes one token
RECORD = "training.json"  # in each part's folder: how the part was trained


def make_base(folder: Path, recipe: Recipe) -> None:
    started, rng = Stopwatch(), random.Random(f"{recipe.seed} base")
    torch.manual_seed(rng.getrandbits(32))
    words = Words(rng, Split.TRAIN)
    lessons = (draw_lesson(words) for _ in range(recipe.tokenizer_lessons))
    texts = [text for lesson in lessons for text in lesson]
    lexicon = [" ".join(LEXICON), " ".join(f"'{word}'" for word in LEXICON)] * LEXICON_REPEATS
    names = [words.name() for _ in range(recipe.tokenizer_names)]
    tokenizer = train_tokenizer(texts + lexicon + names, recipe.vocab_size, MAX_LENGTH)

    model = new_model(tokenizer, recipe.hidden_size, recipe.num_layers)
    source = ExampleSource(
        tokenizer, lambda: draw_lesson(words), rng, recipe.batch_size, BASE_PROMPT_WEIGHT
    )
    optimizers = base_optimizers(model, recipe.base_matrix_lr, recipe.base_lr)
    with _progress("base", recipe.base_steps) as bar:
        loss = train_round(model, source, optimizers, recipe.base_steps, bar)

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = {"parameters": model.num_parameters(), "dtype": "float32", "steps": recipe.base_steps}
    _save_record(folder, {**made, "loss": round(loss, 4), **started.read()})


def make_adapter(folder: Path, base: Path, adapter: AdapterRecipe, recipe: Recipe) -> None:
    """Train rounds until enough tuning prompts are answered correctly; save the best."""
    started, rng = Stopwatch(), random.Random(f"{recipe.seed} {adapter.job}")
    torch.manual_seed(rng.getrandbits(32))
    tokenizer, model = load_base(base)
    peft_model = get_peft_model(model, _lora_config(adapter))
    job, words = JOBS[adapter.job], Words(rng, Split.TRAIN)
    source = ExampleSource(tokenizer, lambda: job.draw(words), rng, recipe.batch_size, 0.0)
    tuning = examples_of(job, Words(rng, Split.TUNE), recipe.num_tuning)

    rounds: list[dict[str, float]] = []
    best, best_weights = -1.0, {}
    while len(rounds) < recipe.max_rounds and best < recipe.good_enough:
        shorter = 2 if rounds else 1
        steps = max(1, adapter.steps // shorter)
        optimizers = adapter_optimizers(peft_model, recipe.adapter_lr / shorter)
        with _progress(f"adapter {adapter.job}, round {len(rounds) + 1}", steps) as bar:
            loss = train_round(peft_model, source, optimizers, steps, bar)
        score = exact_match(peft_model, tokenizer, tuning)
        rounds.append({"steps": steps, "loss": round(loss, 4), "tuning_exact_match": score})
        if score > best:
            best = score
            weights = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
            best_weights = {name: weight.clone() for name, weight in weights.items()}

    set_peft_model_state_dict(peft_model, best_weights)
    peft_model.peft_config["default"].base_model_name_or_path = BASE_NAME
    # "auto" would look for the base's vocabulary size on the network.
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # peft's model card: an empty template
    _save_record(folder, {"rounds": rounds, **started.read()})


def _lora_config(adapter: AdapterRecipe) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=list(adapter.target_modules),
        use_rslora=adapter.use_rslora,
    )


def load_base(base: Path) -> tuple[PreTrainedTokenizerFast, Qwen2ForCausalLM]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = Qwen2ForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation=ATTENTION
    )
    return tokenizer, model.eval()


def draw_held_out(recipe: Recipe) -> dict[str, list[Example]]:
    """Draw the held-out examples of all jobs.

    Jobs on orders get the same sentences, so that one prompt can be sent to all their adapters.
    """
    seed = f"{recipe.seed} held out"
    return {
        adapter.job: examples_of(
            JOBS[adapter.job], Words(random.Random(seed), Split.HELD_OUT), recipe.num_held_out
        )
        for adapter in recipe.adapters
    }


def report(out: Path, held_out: dict[str, list[Example]], recipe: Recipe) -> dict[str, Any]:
    """Measure the saved folders, loaded in the way that users load them."""
    adapters: dict[str, Any] = {}
    for adapter in tqdm(recipe.adapters, desc="measuring", unit="adapter", file=sys.stderr):
        name, examples = adapter.job, held_out[adapter.job]
        tokenizer, model = load_base(out / "base")
        base_score = exact_match(model, tokenizer, examples)
        peft_model = PeftModel.from_pretrained(model, out / "adapters" / name).eval()
        adapters[name] = {
            "does": JOBS[name].description,
            **asdict(adapter),
            **_read_record(out / "adapters" / name),
            "exact_match": exact_match(peft_model, tokenizer, examples),
            "base_exact_match": base_score,
        }
    base = _read_record(out / "base")
    parts = [base, *adapters.values()]
    totals = {k: round(sum(part[k] for part in parts), 1) for k in ("seconds", "cpu_seconds")}
    return {"seed": recipe.seed, "training": totals, "base": base, "adapters": adapters}


def _save_record(folder: Path, record: dict[str, Any]) -> None:
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def _read_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD).read_text())


class Stopwatch:
    def __init__(self) -> None:
        self._started, self._cpu_started = time.monotonic(), time.process_time()

    def read(self) -> dict[str, float]:
        return {
            "seconds": round(time.monotonic() - self._started, 1),
            "cpu_seconds": round(time.process_time() - self._cpu_started, 1),
        }


def _progress(title: str, steps: int) -> tqdm:
    """Make a progress bar: redrawn on a terminal, an occasional line in a log file."""
    seconds = 0.2 if sys.stderr.isatty() else 20.0
    return tqdm(total=steps, desc=title, unit="step", mininterval=seconds, file=sys.stderr)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Disable the progress bars of transformers; the demo shows its own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
