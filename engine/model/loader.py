"""Loads a folder of safetensors as a Decoder, one weight at a time, layer by layer.

Every tensor of the checkpoint must be used exactly once and have the shape that its config implies;
otherwise the load fails with its name. Linear layers' weights are quantized while they are loaded,
or stored quantized. Memory never holds two copies of more than a few layers.
"""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from engine.announcer import SILENT, Announcer
from engine.model.checkpoint import Checkpoint
from engine.model.decoder import Decoder
from engine.model.families import read_scheme, read_spec
from engine.model.layers import Build, Embedding, Linear, Part
from engine.model.quantize import QUANTIZERS, NotFiniteWeight, Quantize, check_quantizable
from engine.model.quantized_checkpoint import Scheme, weight_format
from engine.model.quantized_weight import QuantizedWeight
from engine.model.spec import ModelError

HEAD = "lm_head"
HEAD_KEY = f"{HEAD}.weight"  # some checkpoints store it although their config ties it
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def load_decoder(
    folder: Path,
    build: Build,
    *,
    max_model_len: int,
    quantization: str = "none",
    output_layer: str = "model",
    announcer: Announcer = SILENT,
) -> Decoder:
    """Load the model in `folder`, ready to run. Raises ModelError if it cannot be served.

    `quantization` other than none is applied to the linear layers' weights as the checkpoint
    stores them; embeddings, norms and biases are in the build's dtype, and so is the output layer
    unless `output_layer` is int8.
    """
    announcer.announce("reading weights")
    spec, scheme = read_spec(folder, max_model_len), read_scheme(folder)
    weight_format(folder, scheme, quantization)
    decoder = Decoder(spec, build, max_model_len)
    check_quantizable(quantization, decoder.lora_sites)
    with Checkpoint(folder) as checkpoint:
        reader = Reader(checkpoint, scheme, quantization, build.device, output_layer)
        parts = list(decoder.parts())
        reader.check_keys(parts, spec.tied_embeddings)
        for part in announcer.through(parts, "reading weights", "tensor"):
            part.store(reader.read(part))
        if spec.tied_embeddings:
            _check_tied_head(checkpoint, decoder)
            decoder.head.tie(reader.tied_head(decoder.embedding))
    return decoder.eval()


def weight_bytes(decoder: Decoder, dtype: torch.dtype) -> int:
    """Return the bytes of the weights, dense ones in `dtype`.

    A tied output layer counts once, unless it is quantized and the embedding is not. Quantized
    weights count as stored; ops without a kernel for them take more.
    """
    quantized: dict[str, int] = {}
    for leaf in decoder.modules():
        if isinstance(leaf, Linear):
            quantized |= leaf.quantized_bytes
    head = decoder.head.quantized_bytes
    if head and not decoder.spec.tied_embeddings:
        quantized[HEAD_KEY], head = head, 0
    return head + sum(
        quantized.get(part.key, torch.Size(part.shape).numel() * dtype.itemsize)
        for part in decoder.parts()
    )


class Reader:
    """Reads parts' weights in the form that the decoder keeps."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        scheme: Scheme | None,
        quantization: str,
        device: torch.device,
        output_layer: str = "model",
    ) -> None:
        self._checkpoint, self._scheme, self._device = checkpoint, scheme, device
        self._quantize = QUANTIZERS.get(quantization)
        self._quantize_head = QUANTIZERS.get(output_layer)

    def check_keys(self, parts: list[Part], tied: bool) -> None:
        """Check that every tensor is used, and that every part has its tensors."""
        wanted = {key for part in parts for key in self._keys_of(part)}
        modules = {part.module for part in parts if part.module is not None}
        self._check_head_is_dense()
        for key in self._checkpoint.keys:
            if key in wanted or _is_derived(key) or (tied and key == HEAD_KEY):
                continue
            if not self._is_empty_bias(key, modules):
                raise self._checkpoint.error(key, "is not a weight of this architecture")
        missing = sorted(key for key in wanted if key not in self._checkpoint)
        if missing:
            folder = self._checkpoint.folder
            raise ModelError(f"{folder} lacks {missing[0]} ({len(missing)} weights are missing)")

    def read(self, part: Part) -> Tensor | QuantizedWeight:
        if part.module is not None:
            return self.linear(part.module, *part.shape)
        tensor = self._checkpoint.tensor(part.key, part.shape, FLOATS, "the config")
        if part.key == HEAD_KEY and self._quantize_head is not None:
            return self._quantized(part.key, tensor, self._quantize_head)
        return tensor

    def tied_head(self, embedding: Embedding) -> Tensor | QuantizedWeight:
        """Make the output layer's weight of the embedding, whose own rows stay as they are."""
        if self._quantize_head is None:
            return embedding.weight
        return self._quantized(embedding.key, embedding.weight, self._quantize_head)

    def linear(self, module: str, out_features: int, in_features: int) -> Tensor | QuantizedWeight:
        """Read the weight of a linear layer."""
        if self._packed_keys(module):
            assert self._scheme is not None
            return self._scheme.read(self._checkpoint, module, out_features, in_features)
        key = f"{module}.weight"
        tensor = self._checkpoint.tensor(key, (out_features, in_features), FLOATS, "the config")
        if self._quantize is None:
            return tensor
        return self._quantized(key, tensor, self._quantize)

    def _quantized(self, key: str, tensor: Tensor, quantize: Quantize) -> QuantizedWeight:
        try:
            return quantize(tensor.to(self._device))  # a GPU quantizes much faster
        except NotFiniteWeight as error:
            raise self._checkpoint.error(key, str(error)) from None

    def _keys_of(self, part: Part) -> list[str]:
        packed = [] if part.module is None else self._packed_keys(part.module)
        return packed or [part.key]

    def _packed_keys(self, module: str) -> list[str]:
        """List a quantized module's keys; empty if the checkpoint stores the module dense."""
        return [] if self._scheme is None else self._scheme.keys_of(self._checkpoint, module)

    def _check_head_is_dense(self) -> None:
        for key in self._packed_keys(HEAD):
            if key in self._checkpoint:
                raise self._checkpoint.error(
                    key, f"is part of a quantized {HEAD}; only layers' linear modules may be"
                )

    def _is_empty_bias(self, key: str, modules: Collection[str]) -> bool:
        """Check for a zero bias, which quantizers add to modules that have none."""
        module, _, kind = key.rpartition(".")
        if kind != "bias" or module not in modules or not self._packed_keys(module):
            return False
        return not self._checkpoint.any_shape(key).any()


def _is_derived(key: str) -> bool:
    """Check for rotary frequencies, which old checkpoints store; they follow from the config."""
    return key.endswith(".rotary_emb.inv_freq")


def _check_tied_head(checkpoint: Checkpoint, decoder: Decoder) -> None:
    if HEAD_KEY not in checkpoint:
        return
    embedding = decoder.embedding.weight
    if not torch.equal(checkpoint.any_shape(HEAD_KEY).to(embedding), embedding):
        raise checkpoint.error(
            HEAD_KEY,
            "differs from the embedding, but config.json says tie_word_embeddings=true",
        )
