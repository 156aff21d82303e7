"""Writes tiny random checkpoints of every family by transformers, and runs them greedily.

Weights are large enough that greedy text is not constant, and norms and biases are random too, so
that ignoring one of them is detected.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from engine.model.decoder import Decoder
from engine.model.inputs import AttentionInputs, ForwardInputs, LoraBatch

VOCAB_SIZE = 256
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 9}
MODEL_TYPES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "granite",
)
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 11},
    "qwen3": {"head_dim": 24},
    "gemma2": GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    "gemma3_text": GEMMA | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
}
DEFAULTS["gemma3_text"]["num_hidden_layers"] = 4


@dataclass(frozen=True, slots=True)
class Tiny:
    """A model of transformers, and the folder it was saved in."""

    folder: Path
    reference: PreTrainedModel


def write_tiny(
    folder: Path,
    model_type: str = "llama",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Tiny:
    """Write a random model of this family to `folder`; `changes` go into its config."""
    keys = SIZES | DEFAULTS.get(model_type, {}) | changes
    config = AutoConfig.for_model(model_type, **keys)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = name.endswith("norm.weight") and parameter.dim() == 1
            centre = float(is_norm and not model_type.startswith("gemma"))
            parameter.copy_(centre + noise * _spread(name, parameter, is_norm))
    model.tie_weights()
    model.to(dtype).save_pretrained(folder)
    return Tiny(folder, load_reference(folder, dtype))


def load_reference(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    eager = {"attn_implementation": "eager"}  # the only one that supports every soft cap
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **eager).eval()


def _spread(name: str, parameter: torch.Tensor, is_norm: bool) -> float:
    if is_norm or parameter.dim() == 1:
        return 0.3
    # A small embedding: otherwise a tied model would only repeat its last token
    return (0.3 if "embed" in name else 1.5) * parameter.shape[1] ** -0.5


# ==== A runner of one request, by hand ====


@dataclass(slots=True)
class OneRequest:
    """Drives a decoder for a single request, with blocks scattered in the cache."""

    decoder: Decoder
    block_size: int = 4
    num_blocks: int = 96
    lora: LoraBatch | None = None
    computed: int = 0
    kv_cache: torch.Tensor = field(init=False)
    blocks: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        spec = self.decoder.spec
        dtype = self.decoder.embedding.weight.dtype
        shape = (self.num_blocks, spec.num_layers, 2, self.block_size)
        self.kv_cache = torch.full(
            (*shape, spec.num_kv_heads, spec.head_dim), torch.nan, dtype=dtype
        )
        generator = torch.Generator().manual_seed(7)
        self.blocks = torch.randperm(self.num_blocks, generator=generator)

    def forward(self, token_ids: list[int]) -> torch.Tensor:
        """Return the logits [len(token_ids), V] of the sequence's next tokens."""
        start, end = self.computed, self.computed + len(token_ids)
        positions = torch.arange(start, end)
        block = self.blocks[positions // self.block_size]
        attention = AttentionInputs(
            num_decodes=int(len(token_ids) == 1),
            cu_seqlens_q=[0, len(token_ids)],
            context_lens=[end],
            block_tables=self.blocks[None],
            slot_mapping=block * self.block_size + positions % self.block_size,
        )
        inputs = ForwardInputs(torch.tensor(token_ids), positions, attention, self.lora)
        self.computed = end
        return self.decoder.logits(self.decoder(inputs, self.kv_cache))


@torch.inference_mode()
def logits_in_chunks(decoder: Decoder, token_ids: list[int], chunk: int) -> torch.Tensor:
    request = OneRequest(decoder)
    starts = range(0, len(token_ids), chunk)
    return torch.cat([request.forward(token_ids[i : i + chunk]) for i in starts])


@torch.inference_mode()
def greedy(
    decoder: Decoder, prompt: list[int], max_tokens: int, lora: LoraBatch | None = None
) -> list[int]:
    request = OneRequest(decoder, lora=lora)
    token_id = int(request.forward(prompt)[-1].argmax())
    output = [token_id]
    while len(output) < max_tokens:
        token_id = int(request.forward([token_id])[-1].argmax())
        output.append(token_id)
    return output


@torch.inference_mode()
def reference_greedy(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """Generate greedy text by transformers, ignoring end-of-sequence tokens."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([token_ids])).logits[0].float()


def random_prompt(length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
