"""Writes adapters of every kind that PEFT trains, with random values in all that is trained."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.messages import AdapterFolder
from tests.adapter_store.training import add_noise


def load_plain(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore what peft warns of: merging, which is not done, tying, and shapes where it errs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def write_kind(
    base: Path, folder: Path, seed: int = 0, vocab_size: int = 0, **config: Any
) -> AdapterFolder:
    """Train by adding noise; large enough that leaving out one tensor changes the logits."""
    torch.manual_seed(seed)  # of A, and of rows beyond the base's
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "o_proj", "up_proj"]}
    with quiet():
        plain = load_plain(base)
        if vocab_size:
            plain.resize_token_embeddings(vocab_size, mean_resizing=False)
        model = get_peft_model(plain, LoraConfig(**settings | config))
        add_noise(model, 0.2, seed)
        model.save_pretrained(folder)
    return AdapterFolder(f"digest-of-{folder.name}", str(folder), vocab_size)


def write_kinds(
    base: Path, folder: Path, kinds: Mapping[str, Mapping[str, Any]]
) -> dict[str, AdapterFolder | None]:
    """Write an adapter of each kind, each from a seed of its own; "base" stands for none."""
    written = {
        name: write_kind(base, folder / name, seed, **config)
        for seed, (name, config) in enumerate(kinds.items())
    }
    return {**written, "base": None}


def load_with_peft(base: Path, adapter: AdapterFolder | None) -> torch.nn.Module:
    model = load_plain(base)
    if adapter is None:
        return model
    if adapter.vocab_size:
        model.resize_token_embeddings(adapter.vocab_size, mean_resizing=False)
    with quiet():
        return PeftModel.from_pretrained(model, adapter.path).eval()
