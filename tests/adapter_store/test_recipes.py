"""Recipes, and the folders that are made of them."""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from adapter_store.errors import AdapterInvalid
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.manifest import CONFIG_NAME, MANIFEST_NAME, PreparedAdapter
from adapter_store.merging import keep_largest, random_mask
from adapter_store.names import AdapterRef
from adapter_store.recipes import Recipe, make_recipe
from adapter_store.store import AdapterStore
from tests.adapter_store.adapters import write_peft

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
A, B = "a" * 64, "b" * 64


def test_equal_combinations_have_equal_digests_and_others_have_others() -> None:
    digest = make_recipe([A, B], [0.7, 0.3]).digest("base")
    assert make_recipe([B, A], [0.3, 0.7]).digest("base") == digest
    assert make_recipe([A, B], [0.7, 0.3], "cat", 0.2, "frequency").digest("base") == digest
    pruned = make_recipe([A, B], [0.7, 0.3], "ties", 0.5)
    others = [
        make_recipe([A, B], [0.3, 0.7]),
        make_recipe([A, B], [0.7, 0.30001]),
        make_recipe([A], [0.7]),
        make_recipe([A, B], [0.7, 0.3], "linear"),
        pruned,
        make_recipe([A, B], [0.7, 0.3], "ties", 0.6),
        make_recipe([A, B], [0.7, 0.3], "ties", 0.5, "frequency"),
        make_recipe([A, B], [0.7, 0.3], "dare_ties", 0.5),
    ]
    digests = {recipe.digest("base") for recipe in others} | {digest}
    assert len(digests) == len(others) + 1
    assert make_recipe([A, B], [0.7, 0.3]).digest("other base") not in digests
    assert make_recipe([A], [-0.0]) == make_recipe([A], [0.0], "ties", 0.5)


@pytest.mark.parametrize(
    ("members", "weights", "how", "message"),
    [
        ([], [], {}, "0 adapters"),
        ([A] * 9, [1.0] * 9, {}, "9 adapters"),
        ([A, B], [1.0], {}, "2 adapters need as many weights, not 1"),
        ([A], [math.nan], {}, "weight"),
        ([A], [100.5], {}, "100.5"),
        ([A, B], [1.0, 1.0], {"method": "ties", "density": 0.0}, "density"),
        ([A, B], [1.0, 1.0], {"method": "dare_ties", "density": 1.5}, "density"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_the_numbers(
    members: list[str], weights: list[float], how: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterInvalid, match=message):
        make_recipe(members, weights, **how)


def test_pruning_keeps_the_largest_and_among_equal_ones_the_first() -> None:
    tensor = np.array([[1, -3, 2], [-2, 0, 2]], np.float32)
    assert keep_largest(tensor, 0.5).tolist() == [[0, -3, 2], [-2, 0, 0]]
    assert keep_largest(tensor, 0.1).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert keep_largest(tensor, 1.0) is tensor


def test_random_masks_follow_from_their_seed_and_have_the_density() -> None:
    mask = random_mask((400, 100), 0.3, "seed")
    assert (mask == random_mask((400, 100), 0.3, "seed")).all()
    assert mask.ravel()[:8].tolist() == [True, False, False, True, False, False, True, True]
    assert (mask != random_mask((400, 100), 0.3, "other")).any()
    assert abs(mask.mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / mask.size)


# ---- in the store ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("members")
    for seed, (name, settings) in enumerate(
        {"red": {}, "blue": {"r": 4, "lora_alpha": 2}, "wide": {"r": 6}}.items()
    ):
        write_peft(root / name, base_folder, seed, **settings)
    return {name: root / name for name in ("red", "blue", "wide")}


class Shelf:
    """A store with the members, and what they are combined to."""

    def __init__(self, root: Path, base_folder: Path, folders: dict[str, Path]) -> None:
        self.store = AdapterStore(f"file://{root}/store", root / "cache", 10**8)
        self.base = self.store.register_base(base_folder)
        self.refs = {n: self.store.publish(f, "t", n, self.base) for n, f in folders.items()}

    def ref(self, *names: str, method: Any = "cat") -> AdapterRef:
        digests = [self.refs[name].digest for name in names]
        recipe = make_recipe(digests, [0.5] * len(names), method, 0.5)
        return AdapterRef("t", "+".join(names), 0, recipe.digest(self.base), self.base, recipe)


@pytest.fixture
def shelf(tmp_path: Path, base_folder: Path, folders: dict[str, Path]) -> Shelf:
    return Shelf(tmp_path, base_folder, folders)


def test_a_combined_adapter_is_made_once_and_kept_like_others(shelf: Shelf) -> None:
    ref, store = shelf.ref("red", "wide"), shelf.store
    assert store.find_local(ref) is None
    folder = store.ensure_local(ref)
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME]
    )
    before = (folder / WEIGHTS_NAME).stat().st_ino
    assert store.ensure_local(ref) == folder == store.find_local(ref)
    assert (folder / WEIGHTS_NAME).stat().st_ino == before
    ranks = {t.shape[0] for n, t in load_file(folder / WEIGHTS_NAME).items() if "lora_A" in n}
    assert ranks == {10}
    assert all(store.is_local(member) for member in (shelf.refs["red"], shelf.refs["wide"]))


def test_a_combined_adapter_passes_every_check_of_an_upload(
    shelf: Shelf, check: Callable[[Path], PreparedAdapter]
) -> None:
    for method in ("cat", "linear", "ties", "dare_linear", "dare_ties"):
        folder = shelf.store.ensure_local(shelf.ref("red", "blue", method=method))
        assert check(folder).manifest.lora_rank == (8 if method == "cat" else 4)


def test_a_damaged_combined_adapter_is_made_again_with_the_same_bytes(shelf: Shelf) -> None:
    ref = shelf.ref("red", "blue", method="dare_ties")
    path = shelf.store.ensure_local(ref) / WEIGHTS_NAME
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    shelf.store.distrust(ref.digest)
    assert shelf.store.find_local(ref) is None
    shelf.store.ensure_local(ref)
    assert path.read_bytes() == content


def test_nothing_is_left_pinned_or_half_made(shelf: Shelf, tmp_path: Path) -> None:
    for ref in (shelf.ref("red", "blue"), shelf.ref("red", "wide", method="ties")):
        try:
            shelf.store.ensure_local(ref)
        except AdapterInvalid as error:
            assert "the ranks" in str(error) and "ties" in str(error)
            assert not shelf.store.is_local(ref)
    cache = shelf.store._cache
    cache.check_integrity()
    assert all(cache.evict(digest) for digest in cache.digests())


def test_threads_that_want_the_same_one_make_it_once(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref, written = shelf.ref("red", "blue"), list[Path]()
    from adapter_store import merged_folder

    write = merged_folder.MergedAdapter.write

    def count(self: merged_folder.MergedAdapter, folder: Path) -> None:
        written.append(folder)
        write(self, folder)

    monkeypatch.setattr(merged_folder.MergedAdapter, "write", count)
    threads = [threading.Thread(target=shelf.store.ensure_local, args=(ref,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1 and shelf.store.is_local(ref)


def test_a_total_rank_beyond_the_most_is_refused_with_the_sum(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapter_store.merged_folder.MAX_LORA_RANK", 9)
    with pytest.raises(AdapterInvalid, match=r"4 \+ 6 = 10, and at most 9|6 \+ 4 = 10, and"):
        shelf.store.ensure_local(shelf.ref("red", "wide"))


def test_a_recipe_survives_its_manifest(shelf: Shelf) -> None:
    from adapter_store.manifest import parse_manifest

    ref = shelf.ref("red", "blue")
    raw = (shelf.store.ensure_local(ref) / MANIFEST_NAME).read_bytes()
    manifest = parse_manifest(raw, ref.digest)
    assert isinstance(manifest.recipe, Recipe) and manifest.recipe == ref.recipe
