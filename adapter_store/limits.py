"""PublishLimits: how much one tenant may publish."""

from dataclasses import dataclass

from adapter_store.errors import LimitExceeded, NoRoom


@dataclass(frozen=True, slots=True)
class PublishLimits:
    """None is no limit. The number and the bytes are those of live versions."""

    max_lora_rank: int | None = None
    max_versions: int | None = None
    max_bytes: int | None = None

    def check_rank(self, lora_rank: int) -> None:
        """Raise LimitExceeded for an adapter of a higher rank."""
        if self.max_lora_rank is not None and lora_rank > self.max_lora_rank:
            raise LimitExceeded(
                f"its rank {lora_rank} is above the limit of {self.max_lora_rank} (max_lora_rank)"
            )

    def check_number(self, tenant: str, num_live: int) -> None:
        """Raise NoRoom if there is none for one version more."""
        if self.max_versions is not None and num_live >= self.max_versions:
            raise NoRoom(
                f"tenant {tenant} has {num_live} live versions, and the limit is "
                f"{self.max_versions} (max_adapters): retire some first"
            )

    def check_bytes(self, tenant: str, num_stored: int, num_more: int) -> None:
        """Raise NoRoom if there is none for so many bytes more."""
        if self.max_bytes is not None and num_stored + num_more > self.max_bytes:
            raise NoRoom(
                f"tenant {tenant} has {num_stored} bytes of live versions, and {num_more} more are "
                f"above the limit of {self.max_bytes} (max_stored_bytes): retire some first"
            )


NO_LIMITS = PublishLimits()
