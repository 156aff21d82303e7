"""Other people's client libraries, each in an environment of its own, against one real server.

A client is a folder here: `requirements.txt` for its environment, and `check.py`, which makes the
client's own calls and ends with 0 if what came back was right. The weights are random, so calls of
tools and structured answers are forced: their form holds whatever the model would rather say.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapter_store.store import AdapterStore
from tests.chaos.server import running
from tests.deployments.support.tiny_models import make_adapter, make_base
from tests.deployments.support.tool_templates import template_of

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

FOLDER = Path(__file__).parent
ENVIRONMENTS = FOLDER.parents[1] / ".venv-clients.d"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/requirements.txt"))
CONTEXT = 32768  # agents' own prompts have some ten thousand bytes, each a token here


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("clients")
    make_base(folder / "base", CONTEXT)
    (folder / "base" / "chat_template.jinja").write_text(template_of("llama-3"))
    make_adapter(folder / "red", folder / "base", 4, 0)
    store = AdapterStore(f"file://{folder}/store", folder / "cache", 10**9)
    store.publish(folder / "red", "public", "red", store.register_base(folder / "base"))
    with running(write_config(folder), folder / "disk", folder / "log") as server:
        yield server.url


def write_config(folder: Path) -> Path:
    """Write the configuration as JSON, which is valid YAML."""
    engine = {"device": "cpu", "memory_bytes": "128MiB", "num_threads": 1, "max_model_len": CONTEXT}
    model = {"id": "tiny", "source": str(folder / "base"), "engine": engine}
    model["embeddings"] = {"pooling": "mean", "normalize": True}
    adapters = {"root": f"file://{folder}/store", "disk_path": str(folder / "disk")}
    args = {"models": [model], "adapters": adapters}
    entry = {"name": "reef", "import_path": "deployments.app:build_app", "args": args}
    path = folder / "config.yaml"
    path.write_text(json.dumps({"applications": [entry]}))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_client_gets_what_it_asks_for(url: str, name: str, tmp_path: Path) -> None:
    python = ENVIRONMENTS / name / "bin" / "python"
    assert (ENVIRONMENTS / name / "stamp").exists(), f"no environment for {name}: `make clients`"
    result = subprocess.run(
        [python, FOLDER / name / "check.py", url, "tiny", "red"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-6000:]}"
