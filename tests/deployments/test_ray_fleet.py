"""Several engine replicas on a real Ray cluster: who gets what, and what survives whom.

Every answer is compared with the one that the same request gets when nothing happens to it.
"""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from adapter_store.store import AdapterStore
from deployments.local.ray_head import free_port
from tests.adapter_store.adapters import changed
from tests.deployments.support.processes import assert_gone, command, descendants, end
from tests.deployments.support.tiny_models import make_adapter, make_base
from tests.deployments.test_ray import ROOT, wait_for

pytestmark = pytest.mark.ray

ADAPTERS = ("red", "blue", "green", "gold", "grey", "pink")
NUM_STREAMS = 20
LONG, LONG_TOKENS = 100, 4000  # a stream that goes on while settings change
NUM_TOKENS = 600  # a few seconds: long enough to be interrupted
MAX_NUM_SEQS = 32  # more than all streams together: each begins at once
MAX_IN_A_ROW = 24  # adapters by chance at one of two replicas: once in four million times
DRAIN_S = 0.5  # less than a stream takes: it has to be handed over


@dataclass
class Cluster:
    driver: "subprocess.Popen[str]"
    port: int
    folder: Path

    def order(self, order: object) -> Any:
        assert self.driver.stdin is not None and self.driver.stdout is not None
        self.driver.stdin.write(json.dumps(order) + "\n")
        self.driver.stdin.flush()
        answer = self.driver.stdout.readline()
        assert answer, (self.folder / "driver.log").read_text()
        return json.loads(answer)

    def deploy(self, num_ingresses: int = 1, **replicas: Any) -> None:
        assert self.order(self.args(num_ingresses, **replicas)) == "deployed"

    def deploy_file(self, args: Any, **user_configs: Any) -> None:
        """As `serve deploy` does, which decides itself what has to be started anew."""
        settings = [{"name": name, "user_config": each} for name, each in user_configs.items()]
        entry = {"name": "reef", "import_path": "deployments.app:build_app", "args": args}
        assert self.order({"applications": [{**entry, "deployments": settings}]}) == "deployed"

    def args(
        self, num_ingresses: int = 1, max_num_seqs: int = MAX_NUM_SEQS, **replicas: Any
    ) -> Any:
        engine = {
            "device": "cpu",
            "memory_bytes": "64MiB",
            "num_threads": 1,
            "max_num_seqs": max_num_seqs,
        }
        replicas = {"num_cpus": 0.5, "drain_s": DRAIN_S, **replicas}
        source = str(self.folder / "base")
        model = {"id": "tiny", "source": source, "engine": engine, "replicas": replicas}
        root = f"file://{self.folder}/store"
        adapters = {"root": root, "disk_path": str(self.folder / "cache")}
        return {"models": [model], "adapters": adapters, "ingress": {"replicas": num_ingresses}}

    def figures(self) -> list[dict[str, Any]]:
        return sorted(self.order("figures"), key=lambda figures: str(figures["device"]))

    def pids(self, word: str) -> list[int]:
        return [pid for pid in descendants(self.driver.pid) if word in command(pid)]

    def connect(self, **body: Any) -> http.client.HTTPConnection:
        """A connection with a request that has been sent."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        raw = json.dumps({"model": "tiny", **body})
        connection.request("POST", "/v1/completions", raw, {"Content-Type": "application/json"})
        return connection

    def answer(self, **body: Any) -> tuple[int, bytes]:
        connection = self.connect(**body)
        response = connection.getresponse()
        answer = response.status, response.read()
        connection.close()
        return answer

    def post(self, **body: Any) -> Any:
        connection = self.connect(**body)
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        assert response.status == 200, answer
        return answer


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("fleet")
    make_base(folder / "base", 8192)
    store = AdapterStore(f"file://{folder}/store", folder / "cache", 10**9)
    fingerprint = store.register_base(folder / "base")
    for seed, name in enumerate(ADAPTERS):
        make_adapter(folder / name, folder / "base", 4, seed)
        store.publish(folder / name, "public", name, fingerprint)
    port = free_port()
    with (folder / "driver.log").open("wb") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "tests.deployments.support.ray_driver", str(port)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    cluster = Cluster(driver, port, folder)
    try:
        cluster.deploy(min=2)
        yield cluster
    finally:
        family = descendants(driver.pid)
        with driver:
            assert driver.stdin is not None
            driver.stdin.close()
            assert end(driver, family) == 0, (folder / "driver.log").read_text()
        assert_gone(family)


# ---- streams -------------------------------------------------------------------------------


@dataclass
class Heard:
    """All that a client heard of one stream, but the time it took."""

    token_ids: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, Any] = field(default_factory=dict)
    finished: dict[int, str] = field(default_factory=dict)
    num_tokens: int = 0
    error: Any = None

    def take(self, chunk: dict[str, Any]) -> None:
        self.error = self.error or chunk.get("error")
        for choice in chunk.get("choices", ()):
            index = choice["index"]
            self.token_ids.setdefault(index, []).extend(choice.get("token_ids") or [])
            self.text[index] = self.text.get(index, "") + choice["text"]
            if choice.get("logprobs"):
                found = choice["logprobs"]["token_logprobs"]
                self.logprobs.setdefault(index, []).extend(found)
            if choice.get("finish_reason"):
                self.finished[index] = choice["finish_reason"]
        if chunk.get("usage"):
            self.num_tokens = chunk["usage"]["completion_tokens"]

    def roughly(self) -> "Heard":
        """To compare with: a logprob may differ in its last bits, tokens may not."""
        logprobs = {i: pytest.approx(found, abs=1e-4) for i, found in self.logprobs.items()}
        return replace(self, logprobs=logprobs)


def request(number: int) -> dict[str, Any]:
    """Greedy and seeded, base and adapters, one choice and two, with logprobs and without."""
    return {
        "model": ("tiny", "tiny", "tiny", *ADAPTERS)[number % 5],
        "prompt": f"stream {number}",
        "max_tokens": LONG_TOKENS if number == LONG else NUM_TOKENS,
        "ignore_eos": True,
        "temperature": number % 2,
        "seed": number,
        "n": 2 if number % 4 == 1 else 1,
        "logprobs": 1 if number % 4 == 0 else None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }


def listen(cluster: Cluster, number: int, heard: dict[int, Heard]) -> None:
    connection = cluster.connect(**request(number))
    mine = heard[number] = Heard()
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            mine.take(json.loads(line.removeprefix(b"data: ")))
    connection.close()


def all_streams(cluster: Cluster, meanwhile: Callable[[], None] = lambda: None) -> dict[int, Heard]:
    """Runs them all at once, and does something once every one of them has begun."""
    heard: dict[int, Heard] = {}
    threads = [
        threading.Thread(target=listen, args=(cluster, number, heard))
        for number in range(NUM_STREAMS)
    ]
    for thread in threads:
        thread.start()

    def have_begun() -> bool:
        return len(heard) == NUM_STREAMS and all(h.token_ids for h in list(heard.values()))

    wait_for(have_begun, 30, "streaming")
    meanwhile()
    for thread in threads:
        thread.join()
    return heard


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> dict[int, Heard]:
    heard = all_streams(cluster)
    for number, mine in heard.items():
        n = request(number)["n"]
        assert mine.error is None and mine.num_tokens == n * NUM_TOKENS
        assert [len(ids) for ids in mine.token_ids.values()] == [NUM_TOKENS] * n
    return {number: mine.roughly() for number, mine in heard.items()}


# ---- who gets what -------------------------------------------------------------------------


def test_an_adapter_sticks_to_a_replica_and_new_ones_spread(cluster: Cluster) -> None:
    """A hash chooses between equal replicas: it may choose the same one many times in a row."""
    names = list(ADAPTERS)
    first, second = set[str](), set[str]()
    while not (first and second) and len(names) < MAX_IN_A_ROW:
        names += [publish_variant(cluster, len(names))] if first or second else []
        for name in names:
            cluster.post(model=name, prompt="x", max_tokens=2)
        first, second = (set(figures["disk"]) for figures in cluster.figures())
    for name in names * 2:
        cluster.post(model=name, prompt="x", max_tokens=2)
    first, second = (set(figures["disk"]) for figures in cluster.figures())
    assert len(first | second) == len(names), "all of them are somewhere"
    assert not first & second, "and none is at two places"
    assert first and second, "and each replica has some"


def publish_variant(cluster: Cluster, number: int) -> str:
    name = f"variant-{number}"
    folder = changed(cluster.folder / ADAPTERS[0], cluster.folder / name, {"lora_alpha": number})
    store = AdapterStore(f"file://{cluster.folder}/store", cluster.folder / "cache", 10**9)
    store.publish(folder, "public", name)
    return name


def test_no_replica_is_idle_while_the_other_has_a_queue(cluster: Cluster) -> None:
    """One adapter that everybody wants: it must not stay with its replica at any price."""
    fields = {"prompt": "x", "max_tokens": 100, "ignore_eos": True, "n": 1}
    before = [figures["num_received"] for figures in cluster.figures()]
    sent = [cluster.connect(model="red", **fields) for _ in range(3 * MAX_NUM_SEQS)]
    answers = [connection.getresponse() for connection in sent]
    assert {answer.status for answer in answers} == {200}
    for connection, answer in zip(sent, answers, strict=True):
        answer.read()
        connection.close()
    after = [figures["num_received"] for figures in cluster.figures()]
    received = sorted(b - a for a, b in zip(sorted(before), sorted(after), strict=True))
    assert sum(received) == len(sent)
    assert received[0] >= MAX_NUM_SEQS, received


def test_base_requests_and_the_prompts_of_one_request_use_all_replicas(cluster: Cluster) -> None:
    before = sum(figures["num_received"] for figures in cluster.figures())
    prompts = [f"prompt {number}" for number in range(12)]
    fields = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}
    together = cluster.post(prompt=prompts, **fields)["choices"]
    counts = [figures["num_received"] for figures in cluster.figures()]
    assert sum(counts) - before == len(prompts)
    alone = [cluster.post(prompt=prompt, **fields)["choices"][0] for prompt in prompts]
    assert [c["text"] for c in together] == [c["text"] for c in alone]


# ---- what survives whom --------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["ServeReplica:reef:Engine", "engine.process"])
def test_streams_go_on_as_if_nothing_had_been_killed(
    cluster: Cluster, undisturbed: dict[int, Heard], victim: str
) -> None:
    busy = Counter[str]()

    def kill_one() -> None:
        busy.update(str(figures["num_requests"] > 0) for figures in cluster.figures())
        os.kill(cluster.pids(victim)[0], signal.SIGKILL)

    heard = all_streams(cluster, kill_one)
    assert heard == undisturbed
    assert busy == {"True": 2}, "whichever was killed had streams"
    wait_for(lambda: len(cluster.pids("engine.process")) == 2, 60, "two engines again")
    wait_for(lambda: cluster.order("running") == 2, 60, "two replicas again")


def test_a_new_deployment_loses_no_stream(cluster: Cluster, undisturbed: dict[int, Heard]) -> None:
    before = set(cluster.pids("engine.process"))
    heard = all_streams(cluster, lambda: cluster.deploy(min=2, drain_s=DRAIN_S + 1))
    assert heard == undisturbed
    assert not before & set(cluster.pids("engine.process"))


def test_requests_of_a_dead_ingress_are_freed_within_ten_seconds(cluster: Cluster) -> None:
    def num_requests() -> int:
        return sum(figures["num_requests"] for figures in cluster.figures())

    fields = {"prompt": "x", "max_tokens": 8000, "ignore_eos": True, "stream": True}
    sent = [cluster.connect(**fields) for _ in range(4)]
    for connection in sent:
        connection.getresponse().read(100)
    assert num_requests() == len(sent)
    (ingress,) = cluster.pids("ServeReplica:reef:Ingress")
    os.kill(ingress, signal.SIGKILL)
    wait_for(lambda: num_requests() == 0, 10, "orphans gone")
    for connection in sent:
        connection.close()
    wait_for(lambda: is_serving(cluster), 30, "serving again")


def test_of_two_ingresses_the_other_serves_on(cluster: Cluster) -> None:
    cluster.deploy(min=2, num_ingresses=2)
    ingresses = cluster.pids("ServeReplica:reef:Ingress")
    assert len(ingresses) == 2
    fields = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    sent = [cluster.connect(**fields) for _ in range(4)]
    streams = [connection.getresponse() for connection in sent]
    assert all(stream.read(100) for stream in streams)
    os.kill(ingresses[0], signal.SIGKILL)
    wait_for(lambda: not has_sockets(ingresses[0]), 10, "one ingress")
    answers = [cluster.answer(prompt="x", max_tokens=1) for _ in range(30)]
    assert [status for status, _ in answers] == [200] * 30
    assert sorted(map(is_whole, streams)) == [False, False, True, True], "each ingress had two"
    wait_for(lambda: len(cluster.pids("ServeReplica:reef:Ingress")) == 2, 60, "two again")
    for connection in sent:
        connection.close()


def is_whole(stream: http.client.HTTPResponse) -> bool:
    try:
        return stream.read().endswith(b"data: [DONE]\n\n")
    except http.client.IncompleteRead:
        return False


def has_sockets(pid: int) -> bool:
    """A killed process closes them after its memory is gone, and then is a zombie."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def is_serving(cluster: Cluster) -> bool:
    try:
        connection = cluster.connect(prompt="x", max_tokens=1)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return False
    connection.close()
    return status == 200


# ---- as many as it takes -------------------------------------------------------------------


def test_from_none_to_three_at_once_and_back_by_settings_that_change_meanwhile(
    cluster: Cluster,
) -> None:
    """Of two seats each, and all of them used: 64 answers want more than there may be.

    Serve's own delays, half a minute up and ten minutes down, are nowhere seen.
    """
    scaling = {"busy": 1.0, "smoothing_s": 0.5, "lookahead_s": 0.0, "up_delay_s": 0.5}
    scaling |= {"ttft_s": 3600.0, "down_delay_s": 600.0, "down_margin": 1.0, "zero_delay_s": 600.0}
    args = cluster.args(max_num_seqs=2, min=0, max=3, autoscaling=scaling)
    cluster.order("delete")  # or there would be as many as before
    cluster.deploy_file(args)
    assert cluster.order("target") == 0
    for name in ADAPTERS:
        cluster.post(model=name, prompt="x", max_tokens=2)
    assert cluster.order("target") == 1, "the first request has waited for it"
    assert sum(figures["num_received"] for figures in cluster.figures()) == len(ADAPTERS)

    many = cluster.connect(prompt="x", n=64, max_tokens=8000, ignore_eos=True, stream=True)
    wait_for(lambda: cluster.order("target") == 3, 10, "three are wanted")
    wait_for(lambda: cluster.order("running") == 3, 60, "three")
    new = [figures for figures in cluster.figures() if not figures["num_received"]]
    assert len(new) == 2 and any(figures["device"] for figures in new), "adapters lie ready"
    many.close()

    heard: dict[int, Heard] = {}
    stream = threading.Thread(target=listen, args=(cluster, LONG, heard))
    stream.start()
    wait_for(lambda: LONG in heard and bool(heard[LONG].token_ids), 10, "a stream")
    before = cluster.pids("ServeReplica:reef")
    assert cluster.answer(prompt="x" * 2000, max_tokens=1)[0] == 200
    down = {"autoscaling": {"down_delay_s": 2.0, "zero_delay_s": 2.0}}
    limits = {"ingress": {"max_body_bytes": 1000}}
    assert cluster.order("target") == 3
    changed_s = time.monotonic()
    cluster.deploy_file(args, Ingress=limits, Engine={"replicas": down})
    wait_for(lambda: cluster.answer(prompt="x" * 2000)[0] == 413, 10, "the new limit")
    assert stream.is_alive(), "it has gone through the change"
    assert cluster.pids("ServeReplica:reef") == before, "nothing was started anew"
    wait_for(lambda: cluster.order("target") < 3, 20, "fewer are wanted")
    assert time.monotonic() - changed_s > 2.0, "not before the delay"
    wait_for(lambda: cluster.order("target") <= 1, 60, "one is wanted")
    stream.join()
    assert heard[LONG].error is None and heard[LONG].num_tokens == LONG_TOKENS


@pytest.mark.slow
def test_a_model_without_requests_has_no_replica_until_the_next_one(cluster: Cluster) -> None:
    scaling = {"zero_delay_s": 2.0, "down_delay_s": 2.0}
    cluster.order("delete")
    cluster.deploy_file(cluster.args(min=0, max=2, autoscaling=scaling))
    for _ in range(3):
        cluster.post(prompt="x", max_tokens=2)
        assert cluster.order("running") == 1
        wait_for(lambda: cluster.order("running") == 0, 60, "none")
