"""Tests mixed batches of adapters against peft, merged weights, and each adapter alone."""

import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine.lora.load import load_lora
from engine.lora.weights import AdapterLoadError
from engine.messages import AdapterFolder, ErrorKind, GenerateRequest, RequestOutput
from engine.scheduler.extents import extent_size
from engine.scheduler.request import InvalidRequest
from tests.engine.support.driver import (
    ALL_LINEAR,
    finish,
    generate,
    greedy,
    make_engine,
    prompt_of,
    run,
    write_adapter,
    write_adapters,
)
from tests.engine.support.tiny import Tiny, write_tiny

CONFIGS: dict[str, dict[str, object]] = {
    "attention": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "everything": {"r": 8, "lora_alpha": 16},
    "odd-rank": {"r": 3, "target_modules": ["o_proj", "gate_proj", "down_proj"]},
    "rslora": {"r": 16, "lora_alpha": 4, "use_rslora": True},
    "patterns": {
        "r": 5,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 9},
        "alpha_pattern": {"down_proj": 20},
    },
    "one-layer": {"r": 2, "layers_to_transform": [1], "layers_pattern": "layers"},
    "large": {"r": 64, "lora_alpha": 16, "target_modules": ["k_proj", "up_proj"]},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("base"), "qwen2")


@pytest.fixture(scope="module")
def adapters(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterFolder]:
    return write_adapters(tiny.folder, tmp_path_factory.mktemp("adapters"), CONFIGS)


def peft_model(tiny: Tiny, adapter: AdapterFolder | None) -> torch.nn.Module:
    base = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    return base if adapter is None else PeftModel.from_pretrained(base, adapter.path).eval()


def request_for(
    name: str, adapter: AdapterFolder | None, length: int, max_tokens: int = 16
) -> GenerateRequest:
    sampling = greedy(max_tokens, logprobs=20)
    return GenerateRequest(name, prompt_of(length, seed=length), sampling, adapter_folder=adapter)


@pytest.mark.parametrize("name", [*CONFIGS, "base"])
@torch.inference_mode()
def test_in_a_mixed_batch_each_adapter_gives_pefts_own_logits(
    tiny: Tiny, adapters: dict[str, AdapterFolder], name: str
) -> None:
    everyone = {**adapters, "base": None}
    requests = [request_for(n, a, 5 + 9 * i) for i, (n, a) in enumerate(everyone.items())]
    result = run(make_engine(tiny.folder), requests)[name, 0]
    prompt = next(r for r in requests if r.request_id == name).prompt_token_ids
    model = peft_model(tiny, everyone[name])
    tokens = prompt + result.token_ids
    expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    for i, got in enumerate(result.logprobs, len(prompt)):
        for token_id, value in got.top:
            assert value == pytest.approx(expected[i - 1, token_id].item(), abs=1e-4)


@pytest.mark.parametrize("name", ["everything", "patterns", "rslora"])
def test_an_adapters_text_equals_that_of_merged_weights(
    tiny: Tiny, adapters: dict[str, AdapterFolder], name: str
) -> None:
    merged = peft_model(tiny, adapters[name]).merge_and_unload()  # type: ignore[operator]
    request = request_for("r", adapters[name], 12, 32)
    result = run(make_engine(tiny.folder), [request])["r", 0]
    assert result.token_ids == generate(merged, request.prompt_token_ids, 32)


def _traffic(kind: str, names: list[str], count: int) -> list[str]:
    rng = random.Random(count)
    if kind == "identical":
        return [names[1]] * count
    if kind == "distinct":
        return [names[i % len(names)] for i in range(count)]
    weights = {"uniform": 0.0, "zipf": 1.0, "skewed": 3.0}[kind]
    return rng.choices(names, [(i + 1) ** -weights for i in range(len(names))], k=count)


@pytest.mark.parametrize("kind", ["identical", "distinct", "uniform", "zipf", "skewed"])
@pytest.mark.parametrize("budget", [16, 64])
def test_a_mixed_batch_equals_each_adapter_alone(
    tiny: Tiny, adapters: dict[str, AdapterFolder], kind: str, budget: int
) -> None:
    everyone: dict[str, AdapterFolder | None] = {**adapters, "base": None}
    chosen = _traffic(kind, list(everyone), 12)
    requests = [request_for(f"r{i}", everyone[n], 2 + 3 * i) for i, n in enumerate(chosen)]
    together = run(make_engine(tiny.folder, max_num_batched_tokens=budget), requests)
    for request in requests:
        alone = run(make_engine(tiny.folder), [request])
        assert together[request.request_id, 0].token_ids == alone[request.request_id, 0].token_ids


def test_adapters_come_and_go_where_only_two_fit(
    tiny: Tiny, adapters: dict[str, AdapterFolder]
) -> None:
    largest = run(make_engine(tiny.folder), [request_for("r", adapters["large"], 4)])
    assert largest
    roomy = make_engine(tiny.folder)
    requests = [
        request_for(f"r{i}", adapters[name], 3 + i)
        for i, name in enumerate(["everything", "rslora", "large", "patterns"] * 3)
    ]
    expected = {k: r.token_ids for k, r in run(roomy, requests).items()}
    sizes = sorted(w.nbytes for w in (roomy.host.get(a) for a in roomy.stats.resident_adapters))
    room = extent_size(sizes[-1]) + extent_size(sizes[-2])
    tight = make_engine(
        tiny.folder,
        adapter_memory_bytes=room,
        host_adapter_bytes=sizes[-1],
        enable_prefix_caching=False,
    )
    assert {k: r.token_ids for k, r in run(tight, requests).items()} == expected
    assert tight.scheduler.memory.adapter_bytes <= room
    assert tight.host.used_bytes <= sizes[-1]


@pytest.mark.parametrize("num_held", [0, 1, 3])
def test_many_queued_adapters_stay_within_the_hosts_bound(
    tiny: Tiny, tmp_path: Path, num_held: int
) -> None:
    folders = [write_adapter(tiny.folder, tmp_path / str(i), seed=i) for i in range(10)]
    requests = [request_for(f"r{i}", folders[i % 10], 3 + i % 5) for i in range(30)]
    roomy = make_engine(tiny.folder)
    expected = {k: r.token_ids for k, r in run(roomy, requests).items()}
    nbytes = max(roomy.host.get(folder.digest).nbytes for folder in folders)
    file_bytes = (Path(folders[0].path) / "adapter_model.safetensors").stat().st_size
    bound = num_held * file_bytes
    tight = make_engine(
        tiny.folder,
        host_adapter_bytes=bound,
        adapter_memory_bytes=2 * extent_size(nbytes),
        enable_prefix_caching=False,
        max_num_seqs=4,
    )
    step, used = tight.step, [0]

    def watched() -> list[RequestOutput]:
        outputs = step()
        used.append(tight.host.used_bytes)
        return outputs

    tight.step = watched  # type: ignore[method-assign]
    assert {k: r.token_ids for k, r in run(tight, requests).items()} == expected
    assert max(used) <= max(bound, file_bytes)


def test_new_weights_under_another_digest_never_reach_the_old_ones_cache(
    tiny: Tiny, tmp_path: Path
) -> None:
    old = write_adapter(tiny.folder, tmp_path / "old", seed=1)
    new = write_adapter(tiny.folder, tmp_path / "new", seed=2)
    engine = make_engine(tiny.folder)
    run(engine, [request_for("a", old, 30)])
    served = run(engine, [request_for("b", new, 30)])["b", 0]
    fresh = run(make_engine(tiny.folder), [request_for("b", new, 30)])["b", 0]
    assert served.token_ids == fresh.token_ids
    assert served.last is not None and served.last.metrics is not None
    assert served.last.metrics.num_cached_tokens == 0


def test_enormous_weights_affect_only_their_own_rows(tiny: Tiny, tmp_path: Path) -> None:
    """Products overflow; with a mask of zeros they would be NaN in other rows."""
    adapter = write_adapter(tiny.folder, tmp_path / "huge", r=4)
    weights = Path(adapter.path) / "adapter_model.safetensors"
    scaled = {k: v * (1e30 if "lora_A" in k else 1e8) for k, v in load_file(weights).items()}
    save_file(scaled, weights)
    requests = [request_for("base", None, 5), request_for("huge", adapter, 5)]
    results = run(make_engine(tiny.folder), requests)
    expected = generate(tiny.reference, requests[0].prompt_token_ids, 16)
    assert results["base", 0].token_ids == expected


def test_while_an_adapter_loads_other_requests_overtake_its_own(
    tiny: Tiny, adapters: dict[str, AdapterFolder]
) -> None:
    engine = make_engine(tiny.folder)
    run(engine, [request_for("warm", adapters["attention"], 4, 1)])
    load, is_open = engine.host._load, False

    def slow(adapter: AdapterFolder) -> object:
        deadline = time.monotonic() + 60
        while not is_open and time.monotonic() < deadline:
            time.sleep(0.001)
        return load(adapter)

    engine.host._load = slow  # type: ignore[assignment]
    engine.add_request(request_for("cold", adapters["large"], 4, 4))
    engine.add_request(request_for("resident", adapters["attention"], 4, 4))
    engine.add_request(request_for("base", None, 4, 4))
    finished: list[str] = []
    while len(finished) < 2:
        finished += [o.request_id for o in engine.step() if o.finish_reason]
    assert sorted(finished) == ["base", "resident"]
    is_open = True
    assert finish(engine)["cold", 0].token_ids


@pytest.mark.parametrize("narrow", ["lora_A", "lora_B"])
def test_factors_of_different_dtypes_are_each_converted(
    tiny: Tiny, tmp_path: Path, narrow: str
) -> None:
    folder, sites = tmp_path / "adapter", make_engine(tiny.folder).model.lora_sites
    adapter = write_adapter(tiny.folder, folder)
    path = folder / "adapter_model.safetensors"
    rounded = {n: t.bfloat16() if narrow in n else t for n, t in load_file(path).items()}
    save_file({n: t.float() for n, t in rounded.items()}, path)
    expected = load_lora(adapter, sites, torch.float32)
    save_file(rounded, path)
    found = load_lora(adapter, sites, torch.float32)
    assert found.sites.keys() == expected.sites.keys()
    for site, weights in expected.sites.items():
        assert torch.equal(found.sites[site].a, weights.a)
        pairs = zip(found.sites[site].expands, weights.expands, strict=True)
        assert all(torch.equal(one[4], other[4]) for one, other in pairs)


def _drop_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _overwrite(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(bytes(100))


@pytest.mark.parametrize("damage", [_drop_config, _truncate, _overwrite])
def test_a_damaged_adapter_ends_its_requests_with_the_reason(
    tiny: Tiny, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    adapter = write_adapter(tiny.folder, tmp_path / "bad")
    damage(tmp_path / "bad")
    engine = make_engine(tiny.folder)
    results = run(engine, [request_for("bad", adapter, 4), request_for("good", None, 4)])
    last = results["bad", 0].last
    assert last is not None and last.error is not None
    assert last.error.kind == ErrorKind.ADAPTER_DAMAGED and adapter.digest in last.error.message
    assert str(tmp_path) not in last.error.message
    assert results["good", 0].token_ids


def test_an_adapter_of_another_base_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "base", "llama", hidden_size=32)
    adapter = write_adapter(other.folder, tmp_path / "adapter")
    sites = make_engine(tiny.folder).model.lora_sites
    with pytest.raises(AdapterLoadError, match="of the base asks for \\(8, 64\\)"):
        load_lora(adapter, sites, torch.float32)


def test_an_adapter_larger_than_its_memory_is_refused(
    tiny: Tiny, adapters: dict[str, AdapterFolder]
) -> None:
    for changes, text in (
        ({"adapter_memory_bytes": 1000}, "adapter_memory_bytes is 1000"),
        ({"memory_bytes": 2**17}, f"; memory_bytes is {2**17}"),
    ):
        engine = make_engine(tiny.folder, **changes)
        last = run(engine, [request_for("r", adapters["large"], 4)])["r", 0].last
        assert last is not None and last.error is not None
        assert text in last.error.message


@pytest.mark.parametrize("is_known", [False, True], ids=["as-it-arrives", "at-once"])
def test_a_request_that_cannot_fit_beside_its_adapter_is_refused_with_the_bytes(
    tiny: Tiny, adapters: dict[str, AdapterFolder], is_known: bool
) -> None:
    sites = make_engine(tiny.folder).model.lora_sites
    nbytes = extent_size(load_lora(adapters["large"], sites, torch.float32).nbytes)
    kv_bytes = 64 * 2 * 3 * 2 * 16 * 4
    engine = make_engine(
        tiny.folder, memory_bytes=kv_bytes + nbytes, max_model_len=96, max_num_seqs=2
    )
    fits = request_for("fits", adapters["large"], 4, 61)
    too_long = request_for("too-long", adapters["large"], 4, 62)
    text = f"65 tokens beside adapter .* need {68 * 768 + nbytes} bytes of memory, and there are"
    if is_known:
        assert len(run(engine, [fits])["fits", 0].token_ids) == 61
        with pytest.raises(InvalidRequest, match=text):
            engine.add_request(too_long)
        return
    results = run(engine, [too_long, request_for("base", None, 4), fits])
    last = results["too-long", 0].last
    assert (
        last is not None and last.error is not None and last.error.kind == ErrorKind.INVALID_REQUEST
    )
    assert re.match(text, last.error.message)
    assert results["base", 0].token_ids and len(results["fits", 0].token_ids) == 61


def test_adapters_and_kv_blocks_share_one_memory(
    tiny: Tiny, adapters: dict[str, AdapterFolder]
) -> None:
    """Have room for about two adapters in addition to the blocks of all requests."""
    names = ["everything", "rslora", "large", "patterns"] * 3
    requests = [request_for(f"r{i}", adapters[n], 3 + 4 * i, 24) for i, n in enumerate(names)]
    expected = {k: r.token_ids for k, r in run(make_engine(tiny.folder), requests).items()}
    num_preemptions = 0
    for _ in range(10):  # whether there is need for one depends on when adapters arrive
        tight = make_engine(tiny.folder, memory_bytes=420_000, max_model_len=128)
        assert {k: r.token_ids for k, r in run(tight, requests).items()} == expected
        num_preemptions += tight.stats.total_preemptions
        if num_preemptions:
            break
    assert num_preemptions > 0
    assert len(tight.stats.resident_adapters) < 4


def test_phi3_adapters_target_the_fused_modules(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "base", "phi3")
    adapter = write_adapter(
        tiny.folder, tmp_path / "a", r=4, target_modules=["qkv_proj", "gate_up_proj", "o_proj"]
    )
    request = request_for("r", adapter, 9, 24)
    merged = peft_model(tiny, adapter).merge_and_unload()  # type: ignore[operator]
    result = run(make_engine(tiny.folder), [request])["r", 0]
    assert result.token_ids == generate(merged, request.prompt_token_ids, 24)


def test_every_linear_module_is_covered(tiny: Tiny) -> None:
    sites = make_engine(tiny.folder).model.lora_sites
    names = {part.module.rsplit(".", 1)[-1] for site in sites for part in site.slices}
    assert names == set(ALL_LINEAR)
