"""Where log records go in a replica."""

import logging
import logging.handlers
from pathlib import Path

import pytest

from deployments import serve_logging as logs


def test_our_log_records_are_in_serves_file_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "OURS", ("test-ours",))
    monkeypatch.setattr(logs, "SERVE", "test-serve")
    file = logging.FileHandler(tmp_path / "log")
    buffer = logging.handlers.MemoryHandler(1000, target=file)
    ours, serves = logging.getLogger("test-ours.module"), logging.getLogger("test-serve")
    logs.log_to_serves_file()  # nothing is set up yet
    assert logging.getLogger("test-ours").handlers == []
    serves.addHandler(buffer)
    try:
        logs.log_to_serves_file()
        ours.info("news")
        assert (tmp_path / "log").read_text() == "news\n"
    finally:
        buffer.close()
        file.close()
