"""ModelPlaces: everything of a model that an adapter may change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.model.decoder import Decoder
from engine.model.layers import LoraSite, LoraSlice, RmsNorm

HEAD = (-1, "lm_head")  # the output layer's site; its factors are computed like any other's


@dataclass(frozen=True, slots=True)
class ModelPlaces:
    """Linear layers, norms with their widths, and the shape of embedding and output layer."""

    sites: Sequence[LoraSite]  # in the decoder's order
    norms: Mapping[str, int] = field(default_factory=dict[str, int])
    vocab_size: int = 0  # 0: embedding and output layer cannot be changed
    hidden_size: int = 0


def places_of(decoder: Decoder) -> ModelPlaces:
    vocab_size, hidden_size = decoder.embedding.shape
    head = LoraSite(*HEAD, hidden_size, (LoraSlice(HEAD[1], vocab_size),))
    norms = [leaf for leaf in decoder.modules() if isinstance(leaf, RmsNorm)]
    return ModelPlaces(
        sites=(*decoder.lora_sites, head),
        norms={norm_name(norm): norm.width for norm in norms},
        vocab_size=vocab_size,
        hidden_size=hidden_size,
    )


def norm_name(norm: RmsNorm) -> str:
    """Name a norm as an adapter does: model.layers.0.input_layernorm."""
    return norm.key.removesuffix(".weight")
