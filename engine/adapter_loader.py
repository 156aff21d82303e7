"""AdapterLoader: reads, checks and packs adapters, in the host cache's threads."""

from collections.abc import Callable
from pathlib import Path

from engine.backends.loaded import LoadedModel
from engine.config import EngineConfig
from engine.lora.host_cache import HostAdapter
from engine.lora.kinds import check_kinds
from engine.lora.load import load_lora
from engine.lora.weights import AdapterLoadError, LoraWeights
from engine.messages import AdapterFolder
from engine.model.base_weights import BaseWeights
from engine.settle import Settled

OnRead = Callable[[AdapterFolder, LoraWeights], None]


class AdapterLoader:
    """`on_read` is given every adapter as it was read, before it is packed."""

    def __init__(
        self, config: EngineConfig, settled: Settled, model: LoadedModel, on_read: OnRead
    ) -> None:
        self.model = model
        self._config = config
        self._settled = settled
        self._on_read = on_read
        # Invocation tokens of aLoRAs that are being loaded, written by the host cache's threads
        self._invocations: dict[str, tuple[int, ...]] = {}

    def load(self, adapter_folder: AdapterFolder) -> HostAdapter:
        """Return the adapter as its backend wants it. Raises AdapterLoadError, AdapterUnreadable.

        Thread-safe.
        """
        s = self._settled
        weights = load_lora(adapter_folder, self.model.lora_sites, s.dtype, self._open_base)
        check_kinds(weights, s.spec.vocab_size, self.model.kinds, self.model.kernels)
        self._check_token_ids(weights, adapter_folder)
        if weights.invocation_token_ids:
            self._invocations[weights.digest] = weights.invocation_token_ids
        self._on_read(adapter_folder, weights)
        packed = self.model.pack_adapter(weights)
        self._check_size(packed, adapter_folder)
        return packed

    def take_invocation(self, digest: str) -> tuple[int, ...]:
        """Return what switches an adapter on that was just loaded; empty if nothing must."""
        return self._invocations.pop(digest, ())

    def _open_base(self) -> BaseWeights:
        settled = self._settled
        return BaseWeights(Path(self._config.source), settled.quantization, settled.dtype)

    def _check_size(self, packed: HostAdapter, adapter_folder: AdapterFolder) -> None:
        most, name = self._config.adapter_memory_bytes, "adapter_memory_bytes"
        if most is None:
            most, name = self._settled.memory_bytes, "memory_bytes"
        if packed.nbytes > most:
            raise AdapterLoadError(
                f"adapter {adapter_folder.digest} needs {packed.nbytes} bytes on the device; "
                f"{name} is {most}"
            )

    def _check_token_ids(self, weights: LoraWeights, adapter_folder: AdapterFolder) -> None:
        """Check that the adapter has the token ids of its requests, and those that invoke it."""
        base = self._settled.spec.vocab_size
        vocab_size, expected = weights.vocab_size or base, adapter_folder.vocab_size or base
        if expected > vocab_size:
            raise AdapterLoadError(
                f"adapter {adapter_folder.digest} should have {expected} token ids, and its files "
                f"have {vocab_size}"
            )
        for token_id in weights.invocation_token_ids:
            if token_id >= vocab_size:
                raise AdapterLoadError(
                    f"alora_invocation_tokens: token id {token_id} is outside the vocabulary "
                    f"[0, {vocab_size - 1}], so the adapter could never act"
                )
