"""guidellm measures a running server.

check.py <url> <base model> <adapter>
"""

import json
import os
import subprocess
import sys
from pathlib import Path

NUM_REQUESTS = 12
NUM_TOKENS = 10  # of every answer
GUIDELLM = Path(sys.executable).with_name("guidellm")


def measure(url: str, model: str, request_format: str, stream: bool) -> dict:
    """Return the report of the one benchmark of a run."""
    report = Path("report.json")
    report.unlink(missing_ok=True)
    options = {
        "backend": f"kind=openai_http,target={url},model={model},request_format={request_format},"
        f"stream={stream}",
        "profile": "kind=concurrent,streams=4",
        "constraint": f"kind=max_requests,count={NUM_REQUESTS}",
        "data": "kind=json_file,path=prompts.jsonl",
        "output": f"kind=json,path={report}",
    }
    command = [str(GUIDELLM), "run", "--disable-console"]
    for name, value in options.items():
        command += [f"--{name}", value]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(Path("cache").absolute())}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **offline}
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    return benchmark


def check_generation(url: str, model: str, request_format: str, stream: bool) -> None:
    benchmark = measure(url, model, request_format, stream)
    requests = benchmark["requests"]
    assert not requests["errored"], requests["errored"][0]
    assert len(requests["successful"]) == NUM_REQUESTS, benchmark
    for request in requests["successful"]:
        assert request["output_tokens"] == NUM_TOKENS, request
        assert request["prompt_tokens"] > 0, request
    if stream:
        first = benchmark["metrics"]["time_to_first_token_ms"]["successful"]["median"]
        gap = benchmark["metrics"]["inter_token_latency_ms"]["successful"]["median"]
        assert first > 0 and gap > 0, benchmark["metrics"]


def check_embeddings(url: str, model: str) -> None:
    requests = measure(url, model, "/v1/embeddings", False)["requests"]
    assert not requests["errored"], requests["errored"][0]
    assert len(requests["successful"]) == NUM_REQUESTS
    assert all(request["prompt_tokens"] > 0 for request in requests["successful"])


def main() -> None:
    url, base, adapter = sys.argv[1:]
    lines = [
        json.dumps({"prompt": f"one {number} three", "output_tokens_count": NUM_TOKENS})
        for number in range(100)
    ]
    Path("prompts.jsonl").write_text("\n".join(lines))
    for model in (base, adapter):
        check_generation(url, model, "/v1/chat/completions", True)
    check_generation(url, adapter, "/v1/chat/completions", False)
    check_generation(url, adapter, "/v1/completions", True)
    check_embeddings(url, adapter)


if __name__ == "__main__":
    main()
