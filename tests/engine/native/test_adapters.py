"""Tests PEFT folders through load_lora, the bank and the kernels, against peft's merged weights.

Tolerance: factors, h and y are bfloat16, so each of four roundings may be off by 2^-9 of the
rounded value; errors are relative to the sum of the absolute products.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.backends.native import panels, structs
from engine.backends.native.bank import NativeAdapter, NativeAdapterBank
from engine.backends.native.library import Context
from engine.backends.native.panels import PanelWeights, pack_adapter
from engine.backends.native.site_table import NativeLoraBatch
from engine.backends.torch.ops import torch_build
from engine.lora.load import load_lora
from engine.lora.weights import AdapterLoadError
from engine.messages import AdapterFolder
from engine.model.layers import LoraSite
from engine.model.loader import load_decoder
from engine.scheduler.batch import ScheduledBatch, ScheduledRequest
from engine.scheduler.request import SamplingParams
from tests.engine.support.driver import make_engine, write_adapter
from tests.engine.support.tiny import Tiny, write_tiny

CONFIGS: dict[str, dict[str, object]] = {
    "attention": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "odd-rank": {"r": 3, "lora_alpha": 9, "target_modules": ["o_proj", "gate_proj", "down_proj"]},
    "patterns": {
        "r": 5,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 9},
        "alpha_pattern": {"down_proj": 20},
    },
    "large": {"r": 64, "lora_alpha": 16, "use_rslora": True},
}
BF16 = torch.bfloat16


class Model:
    """A tiny base, its sites and adapters; `delta` is the change of weights by peft."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "base"
        write_tiny(self.folder, "qwen2")
        decoder = load_decoder(
            self.folder, torch_build(torch.device("cpu"), torch.float32), max_model_len=32
        )
        self.sites = decoder.lora_sites
        self.keys = [(site.layer, site.site) for site in self.sites]
        self.adapters = {
            name: write_adapter(self.folder, folder / name, seed, **config)
            for seed, (name, config) in enumerate(CONFIGS.items())
        }
        self.base = self._load()
        self.merged = {name: self._merged(a) for name, a in self.adapters.items()}

    def _load(self) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def _merged(self, adapter: AdapterFolder) -> torch.nn.Module:
        return PeftModel.from_pretrained(self._load(), adapter.path).merge_and_unload()  # type: ignore

    def delta(self, name: str, site: LoraSite) -> Tensor:
        """Return the change [out, in] of all modules of the site, stacked."""
        merged, base = self.merged[name], self.base
        modules = [part.module for part in site.slices]
        weights = [(merged.get_submodule(m).weight, base.get_submodule(m).weight) for m in modules]
        return torch.cat([(after - before).detach() for after, before in weights])

    def weights(self, name: str) -> PanelWeights:
        return pack_adapter(load_lora(self.adapters[name], self.sites, BF16))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def bank(model: Model) -> NativeAdapterBank:
    """Make a bank with slots 1 to 4 in the order of CONFIGS."""
    bank = NativeAdapterBank(model.keys)
    for slot, name in enumerate(CONFIGS, 1):
        bank.load(slot, model.weights(name))
    return bank


def request(slot: int, rows: int) -> ScheduledRequest:
    return ScheduledRequest("r", 0, [7] * rows, 0, (), slot, SamplingParams(), True)


def batch_of(*requests: tuple[int, int]) -> ScheduledBatch:
    """Make a batch of (slot, rows)."""
    return ScheduledBatch(tuple(request(slot, rows) for slot, rows in requests))


def add(
    context: Context, lora: NativeLoraBatch, number: int, site: LoraSite, x: Tensor, y: Tensor
) -> None:
    stride = lora.struct.max_lora_rank + lora.struct.max_lora_rank % 2
    h = torch.empty(len(lora.rows), stride, dtype=BF16)
    context.function("lora", structs.ReefLoraArgs)(
        structs.ReefLoraArgs(
            batch=structs.c.pointer(lora.struct),
            site=number,
            in_features=site.in_features,
            x=x.data_ptr(),
            x_stride=x.stride(0),
            y=y.data_ptr(),
            y_stride=y.stride(0),
            h=h.data_ptr(),
            h_stride=stride,
        )
    )


def assert_adds_the_deltas(
    context: Context, model: Model, lora: NativeLoraBatch, slots: Sequence[int]
) -> None:
    """Check every site for rows of these slots; rows of slot 0 must keep their bits."""
    names = ["", *CONFIGS]
    generator = torch.Generator().manual_seed(len(slots))
    for number, site in enumerate(model.sites):
        x = torch.randn(len(slots), site.in_features, generator=generator).to(BF16)
        y = torch.randn(len(slots), site.out_features, generator=generator).to(BF16)
        before = y.clone()
        add(context, lora, number, site, x, y)
        for row, slot in enumerate(slots):
            if not slot:
                assert torch.equal(y[row], before[row])
                continue
            delta = model.delta(names[slot], site)
            expected = before[row].float() + delta @ x[row].float()
            # Per module: h's error is spread over as many products as the rank
            size = before[row].float().abs() + 3 * delta.abs() @ x[row].float().abs()
            assert ((y[row].float() - expected).abs() <= 4 * 2**-9 * size).all()


# ==== layout ====


@pytest.mark.parametrize("name", CONFIGS)
def test_panels_hold_the_same_numbers_as_rank_major(model: Model, name: str) -> None:
    packed, plain = model.weights(name), load_lora(model.adapters[name], model.sites, BF16)
    assert packed.sites.keys() == plain.sites.keys()
    for key, site in packed.sites.items():
        other = plain.sites[key]
        assert torch.equal(site.a, other.a)
        for (*where, b), (*expected_where, ranks) in zip(site.expands, other.expands, strict=True):
            assert where == expected_where
            rank, width = ranks.shape
            assert b.shape == (-(-width // 32), (rank + 1) // 2, 32, 2)
            unrolled = b.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)
            assert torch.equal(unrolled[:rank, :width], ranks)
            assert not unrolled[rank:].any() and not unrolled[:, width:].any()


def test_bytes_are_counted_with_their_padding(model: Model) -> None:
    weights = model.weights("odd-rank")
    tensors = [t for s in weights.sites.values() for t in (s.a, *(e[4] for e in s.expands))]
    assert weights.nbytes == sum(t.numel() * 2 for t in tensors)
    assert weights.nbytes > load_lora(model.adapters["odd-rank"], model.sites, BF16).nbytes


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_factors_that_are_not_finite_once_scaled_are_refused(
    model: Model, tmp_path: Path, value: float
) -> None:
    adapter = write_adapter(model.folder, tmp_path / "bad", r=2, lora_alpha=64)
    path = Path(adapter.path) / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(k for k in tensors if "v_proj.lora_B" in k)
    tensors[name][3, 1] = value
    save_file(tensors, path)
    with pytest.raises(AdapterLoadError, match=r"v_proj.*not finite in torch.bfloat16 at scaling"):
        load_lora(adapter, model.sites, BF16)


# ==== tables ====


def test_untargeted_sites_have_no_factors(model: Model) -> None:
    native = NativeAdapter(model.weights("attention"), model.keys)
    touched = [native.table.pointer[i].a is not None for i in range(len(model.keys))]
    assert touched == [site == "qkv" for _, site in model.keys]
    assert native.table.lora_rank == 8  # q's and v's


def test_only_panels_in_bfloat16_are_accepted(model: Model) -> None:
    adapter = model.adapters["attention"]
    plain = load_lora(adapter, model.sites, BF16)
    with pytest.raises(ValueError, match=r"B \(\d+, \d+\); only panels are allowed"):
        PanelWeights("rank-major", plain.sites, plain.nbytes)
    halves = pack_adapter(load_lora(adapter, model.sites, torch.float16))
    with pytest.raises(ValueError, match=r"torch.float16.*only contiguous bfloat16"):
        NativeAdapter(halves, model.keys)


def test_a_site_that_the_model_lacks_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match=r"\(2, 'qkv'\) is no site of this model"):
        NativeAdapter(model.weights("attention"), [k for k in model.keys if k != (2, "qkv")])


# ==== batches ====


@pytest.mark.parametrize("slot", [1, 2, 3, 4])
def test_one_adapter_adds_what_peft_merges(
    context: Context, model: Model, bank: NativeAdapterBank, slot: int
) -> None:
    lora = bank.batch(batch_of((slot, 1), (slot, 1), (slot, 20)))
    assert lora is not None
    assert_adds_the_deltas(context, model, lora, [slot] * 22)


def test_decodes_and_prefills_of_many_adapters_share_a_batch(
    context: Context, model: Model, bank: NativeAdapterBank
) -> None:
    shares = [(3, 1), (0, 1), (1, 1), (3, 1), (4, 1), (0, 5), (2, 9), (3, 18), (4, 40)]
    lora = bank.batch(batch_of(*shares))
    assert lora is not None and lora.struct.num_segments == 4
    slots = [slot for slot, rows in shares for _ in range(rows)]
    assert_adds_the_deltas(context, model, lora, slots)


def test_a_batch_of_output_rows_renumbers_them(
    context: Context, model: Model, bank: NativeAdapterBank
) -> None:
    batch = batch_of((3, 1), (0, 1), (2, 7), (0, 4), (3, 9))
    lora = bank.batch(batch, output_rows=[0, 1, 8, 12, 21])
    assert lora is not None and list(lora.rows) == [0, 4, 2]
    assert_adds_the_deltas(context, model, lora, [3, 0, 2, 0, 3])
    assert bank.batch(batch, output_rows=[1, 12]) is None
    assert bank.batch(batch, output_rows=[]) is None


def test_a_batch_without_adapters_is_none(bank: NativeAdapterBank) -> None:
    assert bank.batch(batch_of((0, 1), (0, 30))) is None


def test_a_slot_can_be_given_to_another_adapter(
    context: Context, model: Model, bank: NativeAdapterBank
) -> None:
    bank.evict(1)
    bank.evict(1)
    with pytest.raises(KeyError):
        bank.batch(batch_of((1, 1)))
    bank.load(1, model.weights("large"))
    bank.evict(4)
    bank.load(4, model.weights("attention"))
    lora = bank.batch(batch_of((1, 3), (4, 2)))
    assert lora is not None
    swapped = {1: 4, 4: 1}
    assert_adds_the_deltas(context, model, lora, [swapped[s] for s in (1, 1, 1, 4, 4)])


def test_a_batch_keeps_its_adapters_alive(
    context: Context, model: Model, bank: NativeAdapterBank
) -> None:
    lora = bank.batch(batch_of((3, 4)))
    bank.evict(3)
    assert lora is not None
    assert_adds_the_deltas(context, model, lora, [3] * 4)


def test_a_large_adapter_lies_in_one_piece_in_the_order_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Tiny]
) -> None:
    base = tiny_model("llama")
    adapter = write_adapter(base.folder, tmp_path / "a", r=5)
    sites = make_engine(base.folder).model.lora_sites
    apart = pack_adapter(load_lora(adapter, sites, torch.bfloat16))
    monkeypatch.setattr(panels, "LARGE", 1)
    whole = pack_adapter(load_lora(adapter, sites, torch.bfloat16))
    addresses: list[int] = []
    for key, site in apart.sites.items():
        copy = whole.sites[key]
        assert torch.equal(copy.a, site.a)
        addresses.append(copy.a.data_ptr())
        for ours, theirs in zip(copy.expands, site.expands, strict=True):
            assert ours[:4] == theirs[:4] and torch.equal(ours[4], theirs[4])
            addresses.append(ours[4].data_ptr())
    assert addresses == sorted(addresses) and all(a % 64 == 0 for a in addresses)
    assert addresses[-1] - addresses[0] < whole.nbytes == 2 * 2**20
