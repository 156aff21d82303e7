"""The adapter store that a configuration names. The one place that puts the two together."""

import os
from pathlib import Path

from adapter_store.open_store import endpoint_from
from adapter_store.store import AdapterStore
from deployments.config_sections import AdaptersSection


def open_adapter_store(adapters: AdaptersSection) -> AdapterStore:
    """Raises AdapterStoreError, in one sentence, where the store cannot be used now."""
    return AdapterStore(
        adapters.root,
        Path(adapters.disk_path),
        adapters.disk_bytes,
        endpoint_url=adapters.endpoint_url or endpoint_from(os.environ, adapters.root),
    )
