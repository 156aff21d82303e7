"""Trains models by next-token loss on examples, and measures exact matches of greedy answers.

Handles models, tokenizers and examples, but not the meaning of examples.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from examples.demo.orders import Example
from examples.demo.tokenizer import TokenizedExample, as_chat, tokenize

BATCHES_SORTED_TOGETHER = 16
SYSTEM_SHARE = 0.1  # of the examples have a system message, so that both cases are trained
SYSTEM_MESSAGES = ("You are a helpful assistant.", "Be brief.", "Answer the customer.")
WARM_UP = 0.08  # of a round's steps


@dataclass(frozen=True, slots=True)
class Batch:
    token_ids: torch.Tensor  # [B, T] int64
    weights: torch.Tensor  # [B, T] float32: 1 answer, prompt_weight prompt, 0 padding


@dataclass(frozen=True, slots=True)
class ExampleSource:
    """Yields batches of newly drawn examples, without end."""

    tokenizer: PreTrainedTokenizerFast
    draw: Callable[[], Example]
    rng: random.Random
    batch_size: int
    prompt_weight: float

    def batches(self, count: int) -> Iterator[Batch]:
        """Yield batches of examples of similar length, so that there is hardly any padding."""
        for start in range(0, count, BATCHES_SORTED_TOGETHER):
            size = min(BATCHES_SORTED_TOGETHER, count - start) * self.batch_size
            drawn = sorted(self._draw(size), key=lambda example: example.num_tokens)
            batches = [drawn[i : i + self.batch_size] for i in range(0, size, self.batch_size)]
            self.rng.shuffle(batches)
            yield from map(self._pad, batches)

    def _draw(self, count: int) -> list[TokenizedExample]:
        examples = [self.draw() for _ in range(count)]
        chats = [as_chat(self.tokenizer, e.prompt, self._system_message()) for e in examples]
        return tokenize(self.tokenizer, chats, examples)

    def _system_message(self) -> str | None:
        return self.rng.choice(SYSTEM_MESSAGES) if self.rng.random() < SYSTEM_SHARE else None

    def _pad(self, examples: list[TokenizedExample]) -> Batch:
        width = max(example.num_tokens for example in examples)
        token_ids = torch.full((len(examples), width), self.tokenizer.pad_token_id)
        weights = torch.zeros(len(examples), width)
        for row, (prompt_ids, answer_ids) in enumerate(examples):
            end = len(prompt_ids) + len(answer_ids)
            token_ids[row, :end] = torch.tensor(prompt_ids + answer_ids)
            weights[row, : len(prompt_ids)] = self.prompt_weight
            weights[row, len(prompt_ids) : end] = 1.0
        return Batch(token_ids, weights)


def base_optimizers(model: PreTrainedModel, matrix_lr: float, lr: float) -> list[Optimizer]:
    """Make Muon for the matrices of layers, which then need fewer steps, and AdamW for the rest."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(
        matrices, lr=matrix_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=4
    )
    return [muon, _adamw(others, lr)]


def adapter_optimizers(model: torch.nn.Module, lr: float) -> list[Optimizer]:
    return [_adamw([p for p in model.parameters() if p.requires_grad], lr)]


def _adamw(parameters: list[torch.nn.Parameter], lr: float) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def train_round(
    model: torch.nn.Module,
    source: ExampleSource,
    optimizers: list[Optimizer],
    steps: int,
    bar: tqdm,
) -> float:
    """Train for `steps` steps, with warm-up and cosine; updates `bar`.

    Returns the mean loss of the last tenth of the steps.
    """
    schedulers = [LambdaLR(o, lambda step: _lr_factor(step, steps)) for o in optimizers]
    trained = [
        p for group in (g for o in optimizers for g in o.param_groups) for p in group["params"]
    ]
    recent: list[float] = []
    model.train()
    for batch in source.batches(steps):
        loss = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        recent = [*recent, loss.item()][-max(1, steps // 10) :]
        bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}", refresh=False)
        bar.update()
    model.eval()
    return sum(recent) / len(recent)


def _lr_factor(step: int, steps: int) -> float:
    cosine = 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps))
    return min((step + 1) / (WARM_UP * steps), cosine)


def _loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch.token_ids, use_cache=False).logits  # [B, T, V]
    weights = batch.weights[:, 1:].flatten()
    counted = weights > 0
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1)[counted].float(),
        batch.token_ids[:, 1:].flatten()[counted],
        reduction="none",
    )
    return (losses * weights[counted]).sum() / weights.sum()


def exact_match(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> float:
    """Return the share of examples whose greedy answer equals the expected one exactly."""
    wanted = tokenizer([e.answer for e in examples], add_special_tokens=False)["input_ids"]
    # One token more than the longest answer suffices to see whether an answer ended.
    limit = max(map(len, wanted)) + 1
    given = greedy_answers(model, tokenizer, [e.prompt for e in examples], limit)
    return sum(a == e.answer for a, e in zip(given, examples, strict=True)) / len(examples)


@torch.inference_mode()
def greedy_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    max_new_tokens: int,
) -> list[str]:
    chats = [as_chat(tokenizer, prompt) for prompt in prompts]
    inputs = tokenizer(
        chats,
        return_tensors="pt",
        return_token_type_ids=False,
        padding=True,
        padding_side="left",
        add_special_tokens=False,
    )
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
