"""Tests the engine against transformers, and for independence of batch mates."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.backends.runner import DeviceLost
from engine.lora.weights import LoraWeights
from engine.messages import AdapterFolder, ErrorKind, GenerateRequest
from engine.scheduler.request import InvalidRequest, SamplingParams
from tests.engine.support.driver import (
    Result,
    finish,
    generate,
    greedy,
    make_engine,
    prompt_of,
    run,
)
from tests.engine.support.tiny import Tiny, write_tiny

LENGTHS = (1, 3, 4, 5, 17, 30, 41)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("llama"), "llama")


def texts(results: dict[tuple[str, int], Result]) -> dict[tuple[str, int], list[int]]:
    return {key: result.token_ids for key, result in results.items()}


def mixed_requests(max_tokens: int = 20) -> list[GenerateRequest]:
    """Make greedy and sampled requests of different lengths."""
    hot = SamplingParams(max_tokens=max_tokens, temperature=1.3, top_p=0.9, seed=5, ignore_eos=True)
    return [
        GenerateRequest(f"r{n}", prompt_of(n, seed=n), hot if n % 2 else greedy(max_tokens))
        for n in LENGTHS
    ]


@pytest.fixture(scope="module")
def alone(tiny: Tiny) -> dict[tuple[str, int], list[int]]:
    """Run every request alone in its own engine, prompt unchunked, without prefix cache."""
    found: dict[tuple[str, int], list[int]] = {}
    for request in mixed_requests():
        engine = make_engine(tiny.folder, enable_prefix_caching=False)
        found.update(texts(run(engine, [request])))
    return found


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "mistral"])
def test_greedy_text_of_a_mixed_batch_equals_generate(model_type: str, tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path, model_type)
    requests = [GenerateRequest(f"r{n}", prompt_of(n, seed=n), greedy(64)) for n in LENGTHS]
    results = run(make_engine(tiny.folder), requests)
    for request in requests:
        expected = generate(tiny.reference, request.prompt_token_ids, 64)
        assert results[request.request_id, 0].token_ids == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_num_batched_tokens": 16},
        {"max_num_batched_tokens": 17, "block_size": 1},
        {"max_num_seqs": 2},
        {"block_size": 16},
        {"enable_prefix_caching": False},
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_batch_mates_or_chunking(
    tiny: Tiny, alone: dict[tuple[str, int], list[int]], changes: dict[str, int]
) -> None:
    assert texts(run(make_engine(tiny.folder, **changes), mixed_requests())) == alone


def test_pieces_sized_by_time_change_no_token(
    tiny: Tiny, alone: dict[tuple[str, int], list[int]]
) -> None:
    steps: list[int] = []
    for target_ms in (1.0, 86_400_000.0):
        ticks = itertools.count()
        engine = make_engine(
            tiny.folder, target_step_ms=target_ms, clock=lambda ticks=ticks: next(ticks) / 100
        )
        assert texts(run(engine, mixed_requests())) == alone
        steps.append(engine.stats.total_steps)
    assert steps[0] > steps[1], "10 ms a step leave no time for more than the least piece"


def test_preemption_changes_no_token(tiny: Tiny, alone: dict[tuple[str, int], list[int]]) -> None:
    bytes_per_token = 2 * 3 * 2 * 16 * 4
    engine = make_engine(tiny.folder, memory_bytes=72 * bytes_per_token, max_model_len=64)
    assert engine.info.num_blocks == 18
    echo = [replace(r, sampling=replace(r.sampling, prompt_logprobs=0)) for r in mixed_requests()]
    results = run(engine, echo)
    assert texts(results) == alone
    assert engine.stats.total_preemptions > 0
    for request in echo[1:]:  # the first has a prompt of one token
        first = results[request.request_id, 0].first
        assert first is not None and len(first.prompt_logprobs or []) == len(
            request.prompt_token_ids
        )


def test_prefix_hits_change_no_token(tiny: Tiny, alone: dict[tuple[str, int], list[int]]) -> None:
    engine = make_engine(tiny.folder)
    for _ in range(2):
        assert texts(run(engine, mixed_requests())) == alone
    assert engine.stats.total_cached_tokens >= 4 * sum((n - 1) // 4 for n in LENGTHS)


def test_aborting_others_changes_no_token_and_frees_at_once(
    tiny: Tiny, alone: dict[tuple[str, int], list[int]]
) -> None:
    engine = make_engine(tiny.folder)
    keep = mixed_requests()
    for request in keep:
        engine.add_request(request)
        doomed = GenerateRequest(f"x{request.request_id}", prompt_of(30, seed=99), greedy(50))
        engine.add_request(doomed)
    outputs = [o for _ in range(6) for o in engine.step()]
    held = engine.stats.num_blocks_used
    for request in keep:
        engine.abort(f"x{request.request_id}")
    assert engine.stats.num_blocks_used < held
    results = finish(engine)
    for output in reversed(outputs):
        if output.request_id[0] == "r":
            results[output.request_id, 0].token_ids[:0] = output.token_ids
    aborted = [r.last for (i, _), r in results.items() if i[0] == "x"]
    assert len(aborted) == len(keep)
    assert all(o is not None and o.finish_reason == "abort" for o in aborted)
    assert {k: r.token_ids for k, r in results.items() if k[0][0] == "r"} == alone
    assert engine.stats.num_blocks_used == 0


def test_a_resumed_request_draws_the_same_tokens(tiny: Tiny) -> None:
    sampling = SamplingParams(
        max_tokens=24,
        temperature=1.5,
        seed=3,
        frequency_penalty=0.5,
        repetition_penalty=1.2,
        ignore_eos=True,
    )
    prompt = prompt_of(11)
    whole = run(make_engine(tiny.folder), [GenerateRequest("r", prompt, sampling)])["r", 0]
    for cut in (1, 10, 23):
        resumed = GenerateRequest("r", prompt, sampling, output_token_ids=whole.token_ids[:cut])
        rest = run(make_engine(tiny.folder), [resumed])["r", 0]
        assert rest.token_ids == whole.token_ids[cut:]
        assert rest.last is not None and rest.last.metrics is not None
        assert rest.last.metrics.num_output_tokens == 24 - cut


def test_choices_are_those_of_single_requests_with_consecutive_seeds(tiny: Tiny) -> None:
    prompt = prompt_of(10)

    def sampling(seed: int) -> SamplingParams:
        return SamplingParams(max_tokens=12, temperature=1.0, seed=seed, ignore_eos=True)

    together = run(make_engine(tiny.folder), [GenerateRequest("r", prompt, sampling(7), n=4)])
    assert len({tuple(r.token_ids) for r in together.values()}) > 1
    for i in range(4):
        one = run(make_engine(tiny.folder), [GenerateRequest("s", prompt, sampling(7 + i))])
        assert together["r", i].token_ids == one["s", 0].token_ids


@torch.inference_mode()
def test_logprobs_are_those_of_the_model(tiny: Tiny) -> None:
    prompt = prompt_of(20)
    sampling = greedy(5, logprobs=20, prompt_logprobs=3)
    engine = make_engine(tiny.folder, max_num_batched_tokens=16)
    result = run(engine, [GenerateRequest("r", prompt, sampling)])["r", 0]
    tokens = prompt + result.token_ids
    expected = tiny.reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
    for i, got in enumerate(result.logprobs, len(prompt)):
        assert got.logprob == pytest.approx(expected[i - 1, tokens[i]].item(), abs=1e-4)
        assert len(got.top) == 20 and got.top[0][0] == tokens[i]
        for token_id, value in got.top:
            assert value == pytest.approx(expected[i - 1, token_id].item(), abs=1e-4)
    assert result.first is not None and result.first.prompt_logprobs is not None
    none, *rest = result.first.prompt_logprobs
    assert none is None and len(rest) == len(prompt) - 1
    for i, got in enumerate(rest, 1):
        assert got is not None and len(got.top) == 3
        assert got.logprob == pytest.approx(expected[i - 1, tokens[i]].item(), abs=1e-4)


def test_generation_ends_at_eos_at_stop_tokens_and_at_the_context(tiny: Tiny) -> None:
    prompt = prompt_of(6)
    text = run(make_engine(tiny.folder), [GenerateRequest("r", prompt, greedy(30))])["r", 0]
    stop = text.token_ids[4]
    first = text.token_ids.index(stop)
    params = SamplingParams(max_tokens=30, temperature=0, stop_token_ids=(stop,), ignore_eos=True)
    stopped = run(make_engine(tiny.folder), [GenerateRequest("r", prompt, params)])["r", 0]
    assert stopped.token_ids == text.token_ids[: first + 1]
    assert stopped.last is not None
    assert (stopped.last.finish_reason, stopped.last.stop_token_id) == ("stop", stop)
    short = make_engine(tiny.folder, max_model_len=16)
    ended = run(short, [GenerateRequest("r", prompt, greedy(30))])["r", 0]
    assert ended.token_ids == text.token_ids[:10]
    assert ended.last is not None and ended.last.finish_reason == "length"


def test_min_tokens_holds_stop_tokens_back(tiny: Tiny) -> None:
    prompt = prompt_of(6)
    text = run(make_engine(tiny.folder), [GenerateRequest("r", prompt, greedy(30))])["r", 0]
    stop = text.token_ids[0]
    params = SamplingParams(max_tokens=12, min_tokens=8, temperature=0, stop_token_ids=(stop,))
    held = run(make_engine(tiny.folder), [GenerateRequest("r", prompt, params)])["r", 0]
    assert len(held.token_ids) >= 8 and stop not in held.token_ids[:7]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerateRequest("r", [], greedy(1)), "prompt is empty"),
        (GenerateRequest("r", [3] * 256, greedy(1)), "256 tokens.*context of 256"),
        (GenerateRequest("r", [3, 256], greedy(1)), r"token id 256 .*\[0, 255\]"),
        (GenerateRequest("r", [-1], greedy(1)), "token id -1"),
        (GenerateRequest("r", [3], greedy(1), n=0), r"n must be in \[1, 128\], not 0"),
        (GenerateRequest("r", [3], greedy(1, logit_bias=((999, 1.0),))), "token id 999"),
        (GenerateRequest("r", [3], greedy(1), output_token_ids=[4]), "1 tokens are there already"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_requests_are_refused_by_name(
    tiny: Tiny, request_: GenerateRequest, message: str
) -> None:
    engine = make_engine(tiny.folder)
    with pytest.raises(InvalidRequest, match=message):
        engine.add_request(request_)
    assert not engine.scheduler.has_unfinished


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 3.0},
        {"frequency_penalty": float("nan")},
        {"logit_bias": ((1, float("nan")),)},
        {"max_tokens": 0},
        {"min_tokens": 17},
        {"logprobs": 21},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_sampling_values_out_of_range_are_refused_by_name(changes: dict[str, float]) -> None:
    (name,) = changes
    with pytest.raises(InvalidRequest, match=rf"{name}.* must be in"):
        SamplingParams(**changes)  # type: ignore[arg-type]


def test_a_step_that_raises_ends_its_requests_and_the_engine_goes_on(
    tiny: Tiny, alone: dict[tuple[str, int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny.folder)
    execute = engine.runner.execute
    engine.add_request(GenerateRequest("lost", prompt_of(9), greedy(9), n=2))
    engine.step()

    def fail(*arguments: object) -> None:
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(engine.runner, "execute", fail)
    ended = engine.step()
    assert {(o.request_id, o.index) for o in ended} == {("lost", 0), ("lost", 1)}
    for output in ended:
        assert output.error is not None and output.error.kind == ErrorKind.ENGINE_ERROR
        assert "on fire" in output.error.message
    assert engine.stats.num_blocks_used == 0
    monkeypatch.setattr(engine.runner, "execute", execute)
    assert texts(run(engine, mixed_requests())) == alone


@pytest.mark.parametrize("is_lost", [True, False])
def test_an_engine_whose_device_is_lost_raises_instead_of_failing_every_request(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, is_lost: bool
) -> None:
    engine = make_engine(tiny.folder)
    engine.settled = replace(engine.settled, device=torch.device("cuda"))
    engine.add_request(GenerateRequest("lost", prompt_of(9), greedy(9)))

    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine.runner, "execute", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", fail if is_lost else lambda _: None)
    if is_lost:
        with pytest.raises(DeviceLost, match=r"cuda is lost to this process: .*illegal"):
            engine.step()
        return
    (ended,) = engine.step()
    assert ended.error is not None and "illegal memory" in ended.error.message


def test_a_device_that_is_lost_while_an_adapter_is_read_is_noticed(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny.folder)
    engine.settled = replace(engine.settled, device=torch.device("cuda"))

    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    engine.loader.model = replace(engine.model, pack_adapter=fail)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    nothing = LoraWeights("d" * 64, {}, 0)
    monkeypatch.setattr("engine.adapter_loader.load_lora", lambda *_, **__: nothing)
    adapter = AdapterFolder("d" * 64, "/nowhere")
    engine.add_request(GenerateRequest("lost", prompt_of(9), greedy(9), adapter_folder=adapter))
    with pytest.raises(DeviceLost, match="cuda is lost"):
        finish(engine)


def test_tokens_outside_the_vocabulary_end_nothing_and_are_never_forbidden(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path, "llama")
    config = {"eos_token_id": [-1, 5, tiny.reference.config.vocab_size]}
    (tiny.folder / "generation_config.json").write_text(json.dumps(config))
    engine = make_engine(tiny.folder)
    assert engine.info.eos_token_ids == engine.info.named_eos_token_ids == (5,)
    params = SamplingParams(max_tokens=4, min_tokens=3, temperature=0)
    last = run(engine, [GenerateRequest("r", prompt_of(5), params)])["r", 0].last
    assert last is not None and last.error is None


def test_logits_that_are_not_finite_end_only_their_own_request(tiny: Tiny) -> None:
    engine = make_engine(tiny.folder)
    logits = engine.runner.model.logits

    def poisoned(hidden: torch.Tensor, adapter_slots: Sequence[int]) -> torch.Tensor:
        values = logits(hidden, adapter_slots)
        values[0] = torch.nan
        return values

    engine.runner.model.logits = poisoned  # type: ignore[method-assign]
    for name in ("first", "second"):
        engine.add_request(GenerateRequest(name, prompt_of(5), greedy(3)))
    outputs = {o.request_id: o for o in engine.step()}
    error = outputs["first"].error
    assert error is not None and "not finite" in error.message
    assert outputs["second"].error is None and outputs["second"].token_ids


def test_too_little_memory_is_refused_with_the_bytes_needed(tiny: Tiny) -> None:
    needed = 256 * 2 * 3 * 2 * 16 * 4
    match = f"max_model_len=256 needs memory_bytes of at least {needed}"
    with pytest.raises(ValueError, match=match):
        make_engine(tiny.folder, memory_bytes=needed - 1, max_model_len=256)
    assert make_engine(tiny.folder, memory_bytes=needed, max_model_len=256).info.num_blocks == 64


def test_the_default_context_length_leaves_room_for_an_adapter(tiny: Tiny) -> None:
    whole = 128 * 2 * 3 * 2 * 16 * 4
    assert make_engine(tiny.folder, memory_bytes=whole).info.max_model_len == 96
    alone = make_engine(tiny.folder, memory_bytes=whole, adapter_memory_bytes=0)
    assert alone.info.max_model_len == 128


def test_bfloat16_runs_and_stays_close_to_float32(tiny: Tiny) -> None:
    prompt = prompt_of(12)
    request = GenerateRequest("r", prompt, greedy(1, logprobs=20))
    exact = run(make_engine(tiny.folder), [request])["r", 0]
    rounded = run(make_engine(tiny.folder, dtype="bfloat16"), [request])["r", 0]
    difference = exact.logprobs[0].logprob - dict(rounded.logprobs[0].top)[exact.token_ids[0]]
    assert abs(difference) < 0.1
