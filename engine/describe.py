"""Describes a loaded engine: what its replica and the ingresses must know of it."""

from collections.abc import Callable
from pathlib import Path

from engine.backends.loaded import LoadedModel
from engine.config import EngineConfig
from engine.generation_config import (
    read_eos_token_ids,
    read_named_eos_token_ids,
    read_sampling_defaults,
)
from engine.grammar.grammars import refusal_of_model
from engine.messages import EngineInfo
from engine.scheduler.request import NO_DEFAULTS, SamplingDefaults
from engine.settle import Settled


def describe(config: EngineConfig, s: Settled, model: LoadedModel) -> EngineInfo:
    return EngineInfo(
        max_model_len=s.max_model_len,
        vocab_size=s.spec.vocab_size,
        num_blocks=s.num_blocks,
        block_size=config.block_size,
        eos_token_ids=eos_token_ids(config, s),
        named_eos_token_ids=_within_vocabulary(config, s, read_named_eos_token_ids),
        device=str(s.device),
        dtype=str(s.dtype).removeprefix("torch."),
        weight_bytes=model.weight_bytes,
        hidden_size=s.spec.hidden_size,
        kernels=model.kernels,
        sampling_defaults=_sampling_defaults(config),
        grammar_refusal=grammar_refusal(config, s),
    )


def eos_token_ids(config: EngineConfig, s: Settled) -> tuple[int, ...]:
    """Return the tokens that end an answer."""
    return _within_vocabulary(config, s, read_eos_token_ids)


def grammar_refusal(config: EngineConfig, s: Settled) -> str:
    """Why no request may have a grammar; empty if it may. Known before the model is loaded."""
    is_wanted = config.structured_output == "auto"
    return refusal_of_model(Path(config.source), is_wanted, eos_token_ids(config, s))


def _within_vocabulary(
    config: EngineConfig, s: Settled, read: Callable[[Path], tuple[int, ...]]
) -> tuple[int, ...]:
    vocab = range(s.spec.vocab_size)
    return tuple(i for i in read(Path(config.source)) if i in vocab)


def _sampling_defaults(config: EngineConfig) -> SamplingDefaults:
    if config.generation_config == "none":
        return NO_DEFAULTS
    return read_sampling_defaults(Path(config.source))
