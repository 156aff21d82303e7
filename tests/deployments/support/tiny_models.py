"""A tiny random base model with a tokenizer, and LoRA adapters of it: a folder each."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.deployments.support.fakes import byte_tokenizer
from tests.engine.support.tiny import write_tiny

TEMPLATE = (
    "{{ bos_token }}{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}"
    "{% for c in m.tool_calls or () %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_base(folder: Path, max_position: int, **changes: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<bos>", special=True)])
    size = tokenizer.get_vocab_size()
    ids = {"eos_token_id": 256, "pad_token_id": 257, "bos_token_id": 258}
    sizes = {"vocab_size": size, "max_position_embeddings": max_position}
    write_tiny(folder, "qwen2", **sizes, **ids, **changes)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)


def make_adapter(folder: Path, base: Path, lora_rank: int, seed: int) -> None:
    """Random, and strong enough to change what is said."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora_rank, lora_alpha=4 * lora_rank, target_modules="all-linear", init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's own, about transformers
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
