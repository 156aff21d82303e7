"""Open what a configuration says of usage."""

from pathlib import Path

from adapter_store.open_store import open_store
from deployments.config import AppConfig, endpoint_of
from deployments.config_sections import PriceSection, UsageSection
from deployments.usage.meter import NoMeter, UsageMeter
from deployments.usage.prices import Price, Prices


def open_meter(config: AppConfig) -> UsageMeter | NoMeter:
    """Open the meter of one process. Raises OSError, AdapterStoreError."""
    usage, adapters = config.usage, config.adapters
    if usage.path is None:
        return NoMeter()
    store = open_store(adapters.root, endpoint_of(adapters, adapters.root))
    folder = Path(usage.path)
    return UsageMeter(folder, usage.max_bytes, store, usage.fsync_s, usage.upload_s)


def prices_of(usage: UsageSection) -> Prices:
    return Prices([_price(each) for each in usage.prices], usage.currency)


def _price(section: PriceSection) -> Price:
    cached = section.prompt if section.cached is None else section.cached
    models = None if section.models is None else frozenset(section.models)
    return Price(
        section.name,
        section.prompt,
        cached,
        section.output,
        section.load,
        models,
        section.max_rank,
    )
