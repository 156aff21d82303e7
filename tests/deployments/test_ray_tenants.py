"""Keys, tenants and two base models on a real Ray cluster, through the official client.

The oracle is transformers with PEFT: greedy token ids, computed before the server starts.
"""

import http.client
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapter_store.store import AdapterStore
from deployments.local.ray_head import free_port
from reef.__main__ import main
from tests.deployments.support.processes import assert_gone, descendants, stop
from tests.deployments.support.tiny_models import make_adapter, make_base

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / ".venv-clients" / "bin" / "python"
MAX_POSITION = 8192
COMPLETIONS = "/v1/completions"
BASES: dict[str, dict[str, Any]] = {
    "large": {},
    "small": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
}
# In the order in which they are published: tenant, name, base
ADAPTERS = [
    ("acme", "style", "large"),
    ("umbrella", "style", "large"),
    ("acme", "both", "small"),
    ("acme", "both", "large"),
    ("public", "common", "small"),
]
ANSWERS = [
    ("acme", "large", None, "large"),
    ("acme", "small", None, "small"),
    ("acme", "style", 0, "large"),
    ("umbrella", "style", 1, "large"),
    ("umbrella", "umbrella/style@1", 1, "large"),
    ("acme", "both", 3, "large"),
    ("acme", "small:both", 2, "small"),
    ("acme", "both@1", 2, "small"),
    ("acme", "common", 4, "small"),
    ("umbrella", "public/common", 4, "small"),
]
MISSING = [
    ("acme", "umbrella/style"),
    ("umbrella", "acme/style"),
    ("umbrella", "both"),
    ("acme", "small:style"),
    ("acme", "large:both@1"),
]
COMMON = {"large": None, "small": None, "common": "small"}
LISTS = {
    "acme": {**COMMON, "style": "large", "both": "large", "small:both": "small"},
    "umbrella": {**COMMON, "style": "large"},
}


@dataclass
class Running:
    process: "subprocess.Popen[bytes]"
    port: int
    folder: Path
    keys: Mapping[str, str]
    answers: list[list[Any]]

    def start(self, method: str, path: str, key: str | None, body: object = None) -> Any:
        """A connection on which the question has been asked."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        return connection

    def status(self, method: str, path: str, key: str | None, body: object = None) -> int:
        connection = self.start(method, path, key, body)
        try:
            response = connection.getresponse()
            response.read()
            return response.status
        finally:
            connection.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    answers = make_models(folder)
    keys = make_keys(folder)
    port = free_port()
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration()))
    command = [sys.executable, "-m", "reef", "serve", "--config", "config.yaml"]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_for(lambda: b"curl" in log.read_bytes() or process.poll() is not None, 120, "serving")
        assert process.poll() is None, log.read_text()
        yield Running(process, port, folder, keys, answers)
    finally:
        family = descendants(process.pid)
        assert stop(process, family) == 0, log.read_text()
    assert_gone(family)


def make_models(folder: Path) -> list[list[Any]]:
    """Bases and adapters in the store; [tenant, model, greedy token ids] for each of ANSWERS."""
    for base, changes in BASES.items():
        make_base(folder / base, MAX_POSITION, **changes)
    store = AdapterStore(f"file://{folder}/store", folder / "cache", 10**9)
    fingerprints = {base: store.register_base(folder / base) for base in BASES}
    for number, (tenant, name, base) in enumerate(ADAPTERS):
        adapter = folder / f"adapter-{number}"
        make_adapter(adapter, folder / base, 4 + number, number)
        store.publish(adapter, tenant, name, fingerprints[base])
    known: dict[tuple[int | None, str], list[int]] = {}
    for _, _, number, base in ANSWERS:
        if (number, base) not in known:
            known[number, base] = greedy(folder, number, base)
    told = [known[number, base] for _, _, number, base in ANSWERS]
    assert len({tuple(ids) for ids in known.values()}) == len(known), "they must differ"
    return [[tenant, model, ids] for (tenant, model, _, _), ids in zip(ANSWERS, told, strict=True)]


@torch.inference_mode()
def greedy(folder: Path, adapter: int | None, base: str) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder / base).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, folder / f"adapter-{adapter}").eval()
    ids = list(b"hello")
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[5:]


def make_keys(folder: Path) -> dict[str, str]:
    keys = {tenant: new_key(folder, tenant) for tenant in ("acme", "umbrella", "slow", "single")}
    keys["metrics"] = new_key(folder, "--metrics")
    path = folder / "keys.yaml"
    document = yaml.safe_load(path.read_text())
    document["tenants"]["slow"]["requests_per_minute"] = 2
    document["tenants"]["single"]["max_concurrent_requests"] = 1
    path.write_text(yaml.safe_dump(document))
    return keys


def new_key(folder: Path, whose: str) -> str:
    with redirect_stdout(StringIO()) as shown:
        assert main(["new-key", whose, "--file", str(folder / "keys.yaml")]) == 0
    return shown.getvalue().strip()


def configuration() -> dict[str, Any]:
    engine = {"device": "cpu", "memory_bytes": "32MiB", "num_threads": 1}
    args = {
        "models": [{"id": base, "source": base, "engine": engine} for base in BASES],
        "adapters": {"root": "file://store", "disk_path": "cache"},
        "tenancy": {"mode": "keys", "keys_file": "keys.yaml"},
    }
    entry = {"name": "reef", "import_path": "deployments.app:build_app", "args": args}
    return {"applications": [entry]}


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def test_each_tenant_gets_the_answers_of_its_own_adapters(server: Running) -> None:
    if not CLIENTS.exists():
        pytest.skip(f"{CLIENTS} is missing: `make test` makes it")
    wanted = {
        "keys": server.keys,
        "answers": server.answers,
        "missing": MISSING,
        "lists": LISTS,
        "limited": "slow",
    }
    result = subprocess.run(
        [CLIENTS, ROOT / "tests/clients/tenants_client.py", f"http://127.0.0.1:{server.port}"],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_health_is_open_and_metrics_have_a_key_of_their_own(server: Running) -> None:
    assert server.status("GET", "/health", None) == 200
    assert server.status("GET", "/metrics", None) == 401
    assert server.status("GET", "/metrics", server.keys["acme"]) == 401
    assert server.status("GET", "/metrics", server.keys["metrics"]) == 200


def test_a_client_that_hangs_up_frees_its_concurrency_place(server: Running) -> None:
    key = server.keys["single"]
    short = {"model": "small", "prompt": "x", "max_tokens": 1}
    long = {**short, "stream": True, "ignore_eos": True, "max_tokens": MAX_POSITION - 10}
    connection = server.start("POST", COMPLETIONS, key, long)
    connection.getresponse().read(500)
    assert server.status("POST", COMPLETIONS, key, short) == 429
    assert server.status("POST", COMPLETIONS, server.keys["acme"], short) == 200
    connection.close()
    wait_for(lambda: server.status("POST", COMPLETIONS, key, short) == 200, 5, "a free place")


def test_keys_can_be_added_and_removed_while_the_server_runs(server: Running) -> None:
    command = [sys.executable, "-m", "reef", "new-key", "newcomer"]
    made = subprocess.run(
        [*command, "--file", "keys.yaml"], cwd=server.folder, check=True, capture_output=True
    )
    key = made.stdout.decode().strip()
    path = server.folder / "keys.yaml"
    wait_for(lambda: server.status("GET", "/v1/models", key) == 200, 10, "the new key")
    document = yaml.safe_load(path.read_text())
    del document["tenants"]["newcomer"]
    draft = path.with_name("draft")
    draft.write_text(yaml.safe_dump(document))
    draft.replace(path)
    wait_for(lambda: server.status("GET", "/v1/models", key) == 401, 10, "the key's end")
    assert server.status("GET", "/v1/models", server.keys["acme"]) == 200


def test_a_broken_keys_file_is_logged_and_no_key_is_in_any_log(server: Running) -> None:
    path = server.folder / "keys.yaml"
    good, broken = path.read_text(), f"{server.keys['acme']}: misplaced"
    path.write_text(broken)
    try:
        wait_for(lambda: "the keys stay as they were" in logs(server), 10, "an error")
        assert server.status("GET", "/v1/models", server.keys["acme"]) == 200
    finally:
        path.write_text(good)
    text = logs(server)
    assert not any(key in text for key in server.keys.values())


def logs(server: Running) -> str:
    """Everything that the server and all of Ray's processes have written so far."""
    commands = [Path(f"/proc/{p}/cmdline").read_text() for p in descendants(server.process.pid)]
    found = re.search(rf"{tempfile.gettempdir()}/reef-[^/]+", "".join(commands))
    assert found is not None, "Ray's processes are told where its folder is"
    paths = [path for kind in ("log", "out", "err") for path in Path(found[0]).rglob(f"*.{kind}")]
    paths.append(server.folder / "log")
    return "".join(path.read_text(errors="replace") for path in paths if path.is_file())


IN_A_CLUSTER = """
import sys
import ray
from ray import serve
from deployments.app import build_app
from engine.config import ConfigError
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=10**8,
         _temp_dir=sys.argv[1] + "/ray", _node_ip_address="127.0.0.1", log_to_driver=False,
         logging_level="warning")
serve.start(http_options={"host": "0.0.0.0"}, proxy_location="Disabled", logging_config=None)
args = {"models": [{"id": "demo", "source": "somewhere"}]}
for build in (build_app, lambda args: ray.get(ray.remote(build_app).remote(args))):
    try:
        build(args)
    except ConfigError as error:
        print(str(error).replace("\\n", " "))
allowed = {"tenancy": {"allow_open_on_network": True}}
print(type(build_app({**args, **allowed})).__name__)
ray.shutdown()
"""


def test_an_open_application_is_refused_where_a_cluster_listens_to_the_network() -> None:
    with tempfile.TemporaryDirectory(prefix="r") as folder:
        command = [sys.executable, "-c", IN_A_CLUSTER, folder]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    here, in_a_task, allowed = result.stdout.splitlines()
    assert "allow_open_on_network" in here and "tenancy.mode to keys" in in_a_task
    assert allowed == "Application"
