"""Builds the demo's base model: a three-million-parameter Qwen2, with a head start for training.

Randomly initialised transformers need minutes on two cores until heads copy from the prompt. The
demo's jobs consist mostly of copying, so the initial weights already look back and copy a little:

    layer 0      heads 0 and 1 attend one and two tokens back, through RoPE and the q and k biases,
                 and write the tokens they see into subspaces "previous" and "one before"
    layers 1, 2  head 0 looks for a position whose "previous" is the current token (an induction
                 head) and copies the token there

This is only an initialisation: every weight is trained afterwards.
"""

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

MAX_LENGTH = 2048
HEAD_DIM = 64
ROPE_THETA = 10_000.0
ATTENTION = "eager"  # on a CPU, with a hundred tokens, 1.4 times as fast in training as "sdpa"


def new_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int
) -> Qwen2ForCausalLM:
    """Make a float32 model with random weights from torch's generator, and the head start."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        num_key_value_heads=hidden_size // HEAD_DIM,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        attn_implementation=ATTENTION,
        **special,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    give_head_start(model)
    return model


@torch.no_grad()
def give_head_start(model: Qwen2ForCausalLM) -> None:
    hidden_size = model.config.hidden_size
    first, *later = (layer.self_attn for layer in model.model.layers)
    seen = _random_subspace(hidden_size)  # projection of a token that the look-back heads read
    previous, one_before = _random_subspace(hidden_size), _random_subspace(hidden_size)

    for head, (distance, written) in enumerate(((1, previous), (2, one_before))):
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        first.k_proj.bias[rows], first.q_proj.bias[rows] = _look_back(distance)
        first.v_proj.weight[rows] = seen
        first.o_proj.weight[:, rows] = 0.04 * written.T

    # Dimensions that RoPE rotates quickly would tie the match to a distance.
    steady = (_rope_frequencies() < 0.03).repeat(2)[:, None]
    for attention in later[:2]:
        rows, copied = slice(0, HEAD_DIM), _random_subspace(hidden_size)
        attention.q_proj.weight[rows] = 1.6 * steady * seen
        attention.k_proj.weight[rows] = 1.6 * steady * previous
        attention.v_proj.weight[rows] = copied
        attention.o_proj.weight[:, rows] = 0.1 * copied.T


def _look_back(distance: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return key and query biases whose product, after RoPE, peaks `distance` tokens back."""
    frequencies = _rope_frequencies()
    quick = (frequencies > 0.08).float()  # slow ones cannot tell adjacent tokens apart
    angles = -distance * frequencies
    key = torch.cat([quick, torch.zeros_like(quick)])
    query = torch.cat([quick * torch.cos(angles), quick * torch.sin(angles)])
    return 6.5 * key, 6.5 * query


def _rope_frequencies() -> torch.Tensor:
    return ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)  # [HEAD_DIM / 2]


def _random_subspace(hidden_size: int) -> torch.Tensor:
    """Return a random matrix [HEAD_DIM, hidden_size] with orthonormal rows."""
    return torch.linalg.qr(torch.randn(hidden_size, HEAD_DIM)).Q.T
