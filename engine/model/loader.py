"""From a folder of safetensors to a Decoder, one weight at a time, layer by layer.

Every tensor of the checkpoint is used exactly once, with the shape that its config promises, or
the load is refused with its name. A linear layer's weight is quantized on its way, or comes
quantized. At no time are there two copies of more than a few layers.
"""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engine.model.checkpoint import Checkpoint
from engine.model.decoder import Decoder
from engine.model.families import read_scheme, read_spec
from engine.model.layers import Build, Linear, Part
from engine.model.quantize import QUANTIZERS, NotFiniteWeight, check_quantizable
from engine.model.quantized_checkpoint import Scheme, weight_format
from engine.model.quantized_weight import QuantizedWeight
from engine.model.spec import ModelError

HEAD = "lm_head"
TIED_HEAD = f"{HEAD}.weight"  # some checkpoints keep a copy of what their config ties
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def load_decoder(
    folder: Path,
    build: Build,
    *,
    max_model_len: int,
    quantization: str = "none",
    progress: bool = False,
) -> Decoder:
    """The model in `folder`, ready to run; raises ModelError where it cannot be served.

    `quantization` other than none is applied to the linear layers' weights as the checkpoint
    stores them; embeddings, the output layer, norms and biases are in the build's dtype.
    """
    spec, scheme = read_spec(folder, max_model_len), read_scheme(folder)
    weight_format(folder, scheme, quantization)
    decoder = Decoder(spec, build, max_model_len)
    check_quantizable(quantization, decoder.lora_sites)
    with Checkpoint(folder) as checkpoint:
        reader = _Reader(checkpoint, scheme, quantization, build.device)
        parts = list(decoder.parts())
        reader.check_keys(parts, spec.tied_embeddings)
        for part in tqdm(parts, desc="weights", unit="tensor", disable=not progress):
            part.store(reader.read(part))
        if spec.tied_embeddings:
            _check_tied_head(checkpoint, decoder)
            decoder.tie_head()
    return decoder.eval()


def weight_bytes(decoder: Decoder, dtype: torch.dtype) -> int:
    """What the weights weigh, in `dtype` where they are dense; a tied output layer counts once.

    Quantized weights count as they are stored; ops without a kernel for them take more.
    """
    quantized: dict[str, int] = {}
    for leaf in decoder.modules():
        if isinstance(leaf, Linear):
            quantized |= leaf.quantized_bytes
    return sum(
        quantized.get(part.key, torch.Size(part.shape).numel() * dtype.itemsize)
        for part in decoder.parts()
    )


class _Reader:
    """A part's weight as the decoder shall keep it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        scheme: Scheme | None,
        quantization: str,
        device: torch.device,
    ) -> None:
        self._checkpoint, self._scheme, self._device = checkpoint, scheme, device
        self._quantize = QUANTIZERS.get(quantization)

    def check_keys(self, parts: list[Part], tied: bool) -> None:
        """Every tensor has a use, and every part its tensors."""
        wanted = {key for part in parts for key in self._keys_of(part)}
        modules = {part.module for part in parts if part.module is not None}
        self._check_head_is_dense()
        for key in self._checkpoint.keys:
            if key in wanted or _is_derived(key) or (tied and key == TIED_HEAD):
                continue
            if not self._is_empty_bias(key, modules):
                raise self._checkpoint.error(key, "is not a weight of this architecture")
        missing = sorted(key for key in wanted if key not in self._checkpoint)
        if missing:
            folder = self._checkpoint.folder
            raise ModelError(f"{folder} lacks {missing[0]} ({len(missing)} weights are missing)")

    def read(self, part: Part) -> Tensor | QuantizedWeight:
        if part.module is not None and self._packed_keys(part.module):
            assert self._scheme is not None
            out_features, in_features = part.shape
            return self._scheme.read(self._checkpoint, part.module, out_features, in_features)
        tensor = self._checkpoint.tensor(part.key, part.shape, FLOATS, "the config")
        if part.module is None or self._quantize is None:
            return tensor
        try:
            return self._quantize(tensor.to(self._device))  # a GPU is much faster at it
        except NotFiniteWeight as error:
            raise self._checkpoint.error(part.key, str(error)) from None

    def _keys_of(self, part: Part) -> list[str]:
        packed = [] if part.module is None else self._packed_keys(part.module)
        return packed or [part.key]

    def _packed_keys(self, module: str) -> list[str]:
        """Empty where the checkpoint keeps the module dense."""
        return [] if self._scheme is None else self._scheme.keys_of(self._checkpoint, module)

    def _check_head_is_dense(self) -> None:
        for key in self._packed_keys(HEAD):
            if key in self._checkpoint:
                raise self._checkpoint.error(
                    key, f"is part of a quantized {HEAD}; only layers' linear modules may be"
                )

    def _is_empty_bias(self, key: str, modules: Collection[str]) -> bool:
        """Quantizers give every module a bias, zero where the architecture has none."""
        module, _, kind = key.rpartition(".")
        if kind != "bias" or module not in modules or not self._packed_keys(module):
            return False
        return not self._checkpoint.any_shape(key).any()


def _is_derived(key: str) -> bool:
    """Old checkpoints carry rotary frequencies, which follow from the config."""
    return key.endswith(".rotary_emb.inv_freq")


def _check_tied_head(checkpoint: Checkpoint, decoder: Decoder) -> None:
    if TIED_HEAD not in checkpoint:
        return
    embedding = decoder.embedding.weight
    if not torch.equal(checkpoint.any_shape(TIED_HEAD).to(embedding), embedding):
        raise checkpoint.error(
            TIED_HEAD,
            "differs from the embedding, but config.json says tie_word_embeddings=true",
        )
