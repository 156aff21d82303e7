"""What is read of a Ray Serve config file, and how the rest is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.local.serve_yaml import Address, read_address, read_application
from engine.config import ConfigError
from tests.deployments.support.config_files import config_file


def test_a_config_file_with_unknown_keys_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    entry = {"import_path": "deployments.app:build_app", "args": {}, "num_replicaz": 2}
    path.write_text(yaml.safe_dump({"applications": [entry]}))
    with pytest.raises(ConfigError, match="num_replicaz"):
        read_application(path)


@pytest.mark.parametrize("entries", [None, [], [None], ["x"], [{}, {}], {"args": {}}])
def test_a_config_file_has_one_application(tmp_path: Path, entries: Any) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"applications": entries}))
    with pytest.raises(ConfigError, match="must be a list with one entry"):
        read_application(path)


@pytest.mark.parametrize("key", ["import_path", "args"])
def test_an_application_lacks_nothing(tmp_path: Path, key: str) -> None:
    entry = {"import_path": "deployments.app:build_app", "args": {}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"applications": [{**entry, key: 1}]}))
    assert read_application(path)[key] == 1
    del entry[key]
    path.write_text(yaml.safe_dump({"applications": [entry]}))
    with pytest.raises(ConfigError, match=f"has no {key}"):
        read_application(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("applications: []\napplications: []", "'applications' comes twice in line 2"),
        ("applications:\n- args: {models: [], models: []}", "'models' comes twice in line 2"),
        ("applications: [", "in line 2"),
        ("1: 2\nx: 3", r"\['1', 'x'\] at its top"),
    ],
)
def test_a_config_file_that_is_ambiguous_or_broken_is_refused(
    tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_application(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    assert read_address(path, None, None) == Address("127.0.0.1", 8000)
    path = config_file(tmp_path, http_options={"host": "0.0.0.0", "port": 81})
    assert read_address(path, None, None) == Address("0.0.0.0", 81)
    assert read_address(path, "::1", 82) == Address("::1", 82)


@pytest.mark.parametrize(
    "options", [{"hots": "x"}, {"port": "81"}, {"host": 7}, {"port": True}, [], None]
)
def test_invalid_http_options_are_refused(tmp_path: Path, options: Any) -> None:
    with pytest.raises(ConfigError, match="http_options"):
        read_address(config_file(tmp_path, http_options=options), None, None)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8"),
        ("0.0.0.0", "http://127.0.0.1:8"),
        ("::", "http://[::1]:8"),
        ("::1", "http://[::1]:8"),
    ],
)
def test_a_client_on_this_machine_has_an_url(host: str, url: str) -> None:
    assert Address(host, 8).url == url
