"""The command that makes a key."""

from pathlib import Path

import pytest
import yaml

from deployments.policy.admission import Limits
from deployments.tenants.keys_file import KeysFileError
from deployments.tenants.tenants import KeyRefused, Keyring
from reef.__main__ import main
from tests.deployments.support.keys import ACME, PROMETHEUS, bearer, digest, keys_file

DEFAULTS = Limits(100, 10)


@pytest.mark.parametrize("name", ["keys.yaml", "keys.json"])
def test_a_new_key_is_shown_once_and_its_hash_is_what_the_file_has(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    made: list[str] = []
    for arguments in (["acme"], ["umbrella"], ["acme"], ["--metrics"]):
        assert main(["new-key", *arguments, "--file", str(path)]) == 0
        made.append(capsys.readouterr().out.strip())
    assert len(set(made)) == 4 and all(k.startswith("reef-") and len(k) > 40 for k in made)
    assert not any(key in path.read_text() for key in made)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == [name], "nothing else is left behind"
    ring = Keyring(path, DEFAULTS)
    assert [ring.identify(bearer(k)).name for k in made[:3]] == ["acme", "umbrella", "acme"]
    ring.check_metrics(bearer(made[3]))


def test_a_new_key_leaves_the_rest_of_the_file_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tenants = {
        "acme": {"keys": [digest(ACME)], "requests_per_minute": None, "namespaces": ["lab"]},
        "idle": {"max_concurrent_requests": 4},
    }
    target = keys_file(tmp_path, tenants=tenants)
    target.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to(target)
    assert main(["new-key", "new", "--file", str(link)]) == 0
    added = digest(capsys.readouterr().out.strip())
    wanted = {"tenants": {**tenants, "new": {"keys": [added]}}}
    assert yaml.safe_load(target.read_text()) == {**wanted, "metrics_keys": [digest(PROMETHEUS)]}
    assert link.is_symlink() and target.stat().st_mode & 0o777 == 0o640


def test_a_new_key_without_a_file_comes_with_the_lines_to_add(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["new-key", "acme"]) == 0
    shown = capsys.readouterr()
    lines = shown.err.partition("\n\n")[2]
    assert yaml.safe_load(lines) == {"tenants": {"acme": {"keys": [digest(shown.out.strip())]}}}


def test_a_broken_file_gets_no_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("tenants: [")
    assert main(["new-key", "acme", "--file", str(path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and str(path) in shown.err and path.read_text() == "tenants: ["


@pytest.mark.parametrize("arguments", [[], ["new-key"], ["new-key", "a", "--metrics"]])
def test_a_command_with_missing_or_extra_arguments_is_refused(arguments: list[str]) -> None:
    assert main(arguments) == 2


def test_a_key_for_the_admin_api_has_a_name_and_opens_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = keys_file(tmp_path)
    made: list[str] = []
    for arguments in (["acme", "--publish", "ci"], ["--admin", "ann"]):
        assert main(["new-key", *arguments, "--file", str(path)]) == 0
        made.append(capsys.readouterr().out.strip())
        assert main(["new-key", *arguments, "--file", str(path)]) == 2
        assert "already" in capsys.readouterr().err
    ring = Keyring(path, DEFAULTS)
    found = [ring.identify_publisher(bearer(key)) for key in made]
    assert [(p.name, p.tenant) for p in found] == [("ci", "acme"), ("ann", None)]
    for key in made:
        with pytest.raises(KeyRefused):
            ring.identify(bearer(key))
    for wrong in (["--publish", "ci"], ["acme", "--admin", "x"], ["--metrics", "--admin", "x"]):
        assert main(["new-key", *wrong]) == 2


def test_a_hash_in_two_places_is_refused(tmp_path: Path) -> None:
    twice = digest(ACME)
    for more in (
        {"admin_keys": {"ann": twice}},
        {"admin_keys": {"ann": digest(PROMETHEUS)}},
        {"tenants": {"acme": {"publish_keys": {"a": twice, "b": twice}}}},
    ):
        with pytest.raises(KeysFileError, match="comes twice in the file"):
            Keyring(keys_file(tmp_path, **more), DEFAULTS)
