"""A server that does not start says why."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deployments.local.serve import _builder, reason
from engine.config import ConfigError
from tests.deployments.support.config_files import config_file

MODEL: dict[str, Any] = {"id": "demo", "source": "somewhere"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"tenancy": {"mode": "keys", "keys_file": "none.yaml"}}, ["none.yaml: No such file"]),
        ({"adapters": {"root": "file://config.yaml/x"}}, ["config.yaml/x"]),
        ({"adapters": {"root": "ftp://x"}}, ["ftp://x"]),
        ({"tenancy": {"mode": "cloosed"}}, ["tenancy.mode", "cloosed"]),
        ({}, ["'0.0.0.0'", "tenancy.mode to keys"]),
    ],
)
def test_a_server_that_cannot_start_says_why_in_a_sentence(
    tmp_path: Path, args: dict[str, Any], words: list[str]
) -> None:
    host = "127.0.0.1" if args else "0.0.0.0"
    path = config_file(
        tmp_path, {"models": [MODEL], **args}, http_options={"host": host, "port": 0}
    )
    command = [sys.executable, "-m", "reef", "serve", "--config", str(path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("reef: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize("host", ["a..b", "nowhere.invalid", "127.0.0.1"])
def test_an_address_that_cannot_be_used_is_a_sentence(tmp_path: Path, host: str) -> None:
    path = config_file(tmp_path, {"models": [MODEL]}, http_options={"host": host, "port": 70_000})
    command = [sys.executable, "-m", "reef", "serve", "--config", str(path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert host in result.stderr


@pytest.mark.parametrize("import_path", ["", "7", "nowhere:build", "json:build", "json"])
def test_an_application_that_is_nowhere_is_a_sentence(import_path: str) -> None:
    with pytest.raises(ConfigError, match=f"import_path '{import_path}': "):
        _builder(import_path)
    assert callable(_builder("json:dumps"))


def test_our_own_message_is_extracted_from_that_of_a_failed_deployment() -> None:
    ours = """The deployment failed to start 3 times in a row. See controller logs. Error:
Traceback (most recent call last):
  File "deployments/app.py", line 1, in __init__
    raise engine.client.EngineFailed: nothing
adapter_store.errors.SourceUnavailable: the bucket 'b' does not exist

"""
    assert reason(ours) == "the bucket 'b' does not exist"
    anybodys = "The deployment failed.\nTraceback (most recent call last):\nKeyError: 'x'"
    assert reason(anybodys) == anybodys
