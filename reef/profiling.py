"""What `reef profile` measures, as keys of a simulation's file."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from deployments.simulator.profile import Profile, StepWork
from deployments.simulator.replica import ReplicaSize

if TYPE_CHECKING:
    from deployments.config_sections import AdaptersSection
    from deployments.simulator.fitting import StepFit
    from engine.profiling.measure import EngineFacts, Measured

MOST_FETCHES = 8


def fit(measured: "Measured", fetches: list[tuple[int, float]]) -> "tuple[Profile, StepFit]":
    """Return the profile, and how well it fits. Raises ValueError if too little was measured."""
    from deployments.simulator.fitting import fit_steps, load_times

    steps = [(StepWork(*sample[:-1]), sample.seconds) for sample in measured.steps]
    fitted = fit_steps(steps)
    loads = load_times(fetches, [(read.nbytes, read.seconds) for read in measured.reads])
    return Profile(fitted.times, loads, measured.start_s), fitted


def size_of(facts: "EngineFacts") -> ReplicaSize:
    return ReplicaSize(
        max_num_seqs=facts.max_num_seqs,
        max_num_batched_tokens=facts.max_num_batched_tokens,
        max_model_len=facts.max_model_len,
        block_size=facts.block_size,
        block_bytes=facts.block_bytes,
        memory_bytes=facts.memory_bytes,
        host_bytes=max(facts.host_bytes, 1),
    )


def as_document(profile: Profile, size: ReplicaSize) -> dict[str, Any]:
    """Return the blocks to paste: `profile` and `fleet.size`, with four digits."""
    document = {"profile": profile, "fleet": {"size": size}}
    return _rounded(msgspec.to_builtins(document))


def _rounded(value: object) -> Any:
    if isinstance(value, Mapping):
        items = cast(Mapping[str, object], value).items()
        return {key: _rounded(each) for key, each in items}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in cast(Sequence[object], value)]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def time_fetches(adapters: "AdaptersSection", folder: Path) -> list[tuple[int, float]]:
    """Bring a few adapters of the config's store into an empty folder; return bytes and seconds.

    Empty if there is no store, or if it holds no adapter. Raises AdapterStoreError.
    """
    from adapter_store.errors import NotAStore
    from adapter_store.store import AdapterStore
    from deployments.config import endpoint_of

    endpoint = endpoint_of(adapters, adapters.root)
    store = AdapterStore(
        adapters.root, folder, adapters.disk_bytes, endpoint_url=endpoint, read_only=True
    )
    try:
        store.check_is_store()
    except NotAStore:
        return []
    sizes = {record.digest: record.nbytes for record in store.list()}
    found: list[tuple[int, float]] = []
    for digest, nbytes in list(sizes.items())[:MOST_FETCHES]:
        began_s = time.perf_counter()
        store.ensure_local(digest)
        found.append((nbytes, time.perf_counter() - began_s))
    return found
