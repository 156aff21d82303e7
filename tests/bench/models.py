"""Makes random models and adapters of real shapes, for benchmarks: same seed, same bytes.

    python -m tests.bench.models half --adapters 8

Written once into `.cache/bench/<shape>`, as Hugging Face and PEFT folders that any server can
load. Their outputs are meaningless, but they cost the same computation as the real models.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

CACHE = Path(__file__).parents[2] / ".cache" / "bench"
RANKS = (8, 16, 32, 64)
END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one dense decoder with grouped-query attention."""

    name: str
    model_type: str
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    rope_theta: float
    qkv_bias: bool
    tied: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Return (out, in) by module of a layer."""
        hidden, kv = self.hidden_size, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (self.intermediate_size, hidden),
            "mlp.up_proj": (self.intermediate_size, hidden),
            "mlp.down_proj": (hidden, self.intermediate_size),
        }


SHAPES = {
    shape.name: shape
    for shape in (
        # Qwen2.5-0.5B
        Shape("half", "qwen2", "Qwen2ForCausalLM", 151936, 896, 24, 14, 2, 4864, 1e6, True),
        # SmolLM2-135M
        Shape("small", "llama", "LlamaForCausalLM", 49152, 576, 30, 9, 3, 1536, 1e5, False),
        # Only to check that a benchmark runs
        Shape("tiny", "qwen2", "Qwen2ForCausalLM", 1024, 64, 2, 4, 2, 128, 1e4, True),
    )
}


def make_model(shape: Shape) -> Path:
    """Return the model's folder; writes it if it does not exist."""
    folder = CACHE / shape.name / "base"
    if not folder.exists():
        with _written_whole(folder) as partial:
            write_config(shape, partial)
            save_file(_model_tensors(shape), partial / "model.safetensors", {"format": "pt"})
            _tokenizer(shape.vocab_size).save_pretrained(partial)
    return folder


def write_config(shape: Shape, folder: Path) -> None:
    _write_json(folder / "config.json", _model_config(shape))


def make_adapters(
    shape: Shape, count: int, ranks: Sequence[int] = RANKS, invocation: Sequence[int] = ()
) -> list[Path]:
    """Return PEFT folders with all seven linear modules, with these ranks in turn.

    With `invocation` they are aLoRAs of the same weights, which these tokens switch on.
    """
    return [_make_adapter(shape, i, ranks[i % len(ranks)], invocation) for i in range(count)]


# ==== a model ====


def _model_config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": [shape.architecture],
        "model_type": shape.model_type,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": 32768,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
        "eos_token_id": 0,
        "dtype": "bfloat16",
    }


def _model_tensors(shape: Shape) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": _noise(generator, shape.vocab_size, shape.hidden_size)}
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        for module, (rows, columns) in shape.linears.items():
            tensors[f"{prefix}.{module}.weight"] = _noise(generator, rows, columns)
            if shape.qkv_bias and module.endswith(("q_proj", "k_proj", "v_proj")):
                tensors[f"{prefix}.{module}.bias"] = _noise(generator, rows)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = _ones(shape.hidden_size)
    tensors["model.norm.weight"] = _ones(shape.hidden_size)
    return tensors


def _noise(generator: torch.Generator, *size: int) -> torch.Tensor:
    """Draw in float32 and convert, which is several times faster than in other dtypes."""
    return torch.randn(size, generator=generator).mul_(0.02).bfloat16()


def _ones(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bfloat16)


# ==== an adapter ====


def _make_adapter(shape: Shape, index: int, lora_rank: int, invocation: Sequence[int]) -> Path:
    kind = "-".join(["", "alora", *map(str, invocation)]) if invocation else ""
    folder = CACHE / shape.name / "adapters" / f"a{index:04d}-r{lora_rank}{kind}"
    if not folder.exists():
        with _written_whole(folder) as partial:
            tensors = _adapter_tensors(shape, lora_rank, seed=1000 + index)
            save_file(tensors, partial / "adapter_model.safetensors", {"format": "pt"})
            config = _adapter_config(shape, lora_rank)
            if invocation:
                config["alora_invocation_tokens"] = list(invocation)
            _write_json(partial / "adapter_config.json", config)
    return folder


def _adapter_config(shape: Shape, lora_rank: int) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": shape.name,
        "r": lora_rank,
        "lora_alpha": 2 * lora_rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [module.rpartition(".")[2] for module in shape.linears],
    }


def _adapter_tensors(shape: Shape, lora_rank: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(shape.num_layers):
        for module, (rows, columns) in shape.linears.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = _noise(generator, lora_rank, columns)
            tensors[f"{prefix}.lora_B.weight"] = _noise(generator, rows, lora_rank)
    return tensors


# ==== a tokenizer ====


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Make a byte-level BPE with a text for every id: bytes, then 2 letters, then 4."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(islice(_merges(), vocab_size - len(alphabet) - 1))
    words = [END, *alphabet, *(left + right for left, right in merges)]
    vocabulary = {word: i for i, word in enumerate(words)}
    bpe = Tokenizer(tokenizer_models.BPE(vocabulary, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=END, chat_template=CHAT_TEMPLATE
    )


def _merges() -> Iterator[tuple[str, str]]:
    pairs = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
    yield from product(ascii_lowercase, repeat=2)
    yield from product(pairs, repeat=2)


# ==== files ====


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, renamed to its final name once all is written."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(folder)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random model and its adapters.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--adapters", type=int, default=8)
    options = parser.parse_args()
    print(make_model(SHAPES[options.shape]))
    for folder in make_adapters(SHAPES[options.shape], options.adapters):
        print(folder)


if __name__ == "__main__":
    main()
