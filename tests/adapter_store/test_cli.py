"""The command line: one clear line on success, one sentence and an exit code on failure."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapter_store.layout import WEIGHTS_NAME
from adapter_store.open_store import open_store
from adapter_store.peft_config import CONFIG_NAME
from reef.__main__ import main
from reef.author import author
from tests.adapter_store.adapters import changed
from tests.adapter_store.fake_hub import REPOSITORY, running_hub
from tests.adapter_store.roots import Root
from tests.swift.process import Swift

Run = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def run(root: Root, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return exit code, lines of stdout, stderr; runs in this process, which is faster."""

    def call(*arguments: object) -> tuple[int, list[str], str]:
        options = ["--root", root.url, "--cache", str(tmp_path / "cache")]
        code = main([*(str(argument) for argument in arguments), *options])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return call


def test_a_shell_can_publish_and_list(
    root: Root, base_folder: Path, peft_folder: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"ADAPTER_STORE_ROOT": root.url}

    def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "reef", *arguments, "--cache", tmp_path / "cache"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    published = shell("publish", peft_folder, "--name", "sql", "--base", base_folder)
    assert (published.returncode, published.stderr) == (0, "")
    assert published.stdout.startswith("published public/sql@1 as ")
    listed = shell("list")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert listed.stdout.startswith("public/sql@1  rank 4  ")
    refused = shell("publish", tmp_path, "--name", "sql")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"reef: {tmp_path} has no adapter_config.json\n"
    assert shell("publish").returncode == 2


def test_an_adapter_is_published_aliased_verified_and_retired(
    run: Run, base_folder: Path, peft_folder: Path, tmp_path: Path
) -> None:
    second = changed(peft_folder, tmp_path / "second", {"lora_alpha": 3})
    run("publish", peft_folder, "--name", "sql", "--base", base_folder)
    code, (line,), _ = run("publish", second, "--name", "sql", "--tenant", "public")
    assert code == 0
    assert line.startswith("published public/sql@2 as ")
    assert run("publish", second, "--name", "sql")[1] == [line]
    assert run("alias", "sql", "prod", 1) == (0, ["public/sql@prod is version 1"], "")
    assert [line.split()[-1] for line in run("list")[1]] == ["prod", "latest"]
    shared = ["public/sql@prod is version 1 for 95%, version 2 for 5%"]
    code, lines, _ = run("alias", "sql", "prod", "--canary", 2, "--share", "5%", "--alpha", 0.1)
    assert (code, lines[:2]) == (0, [*shared, "on trial: version 2"])
    assert lines[2:] == [
        "stable: version 1",
        "candidate: version 2",
        "so far: go on, undecided so far",
    ]
    assert run("alias", "sql", "prod")[1] == lines
    assert run("alias", "sql", "prod", "--weights", "1=19,2=1") == (0, shared, "")
    assert run("alias", "sql", "prod", 1)[0] == 0
    assert run("list", "--tenant", "other") == (0, [], "")
    assert run("verify") == (0, ["verified 2 adapters"], "")
    assert run("retire", "sql@1") == (0, ["retired public/sql, version 1"], "")
    assert run("retire", "sql") == (0, ["retired public/sql, version 2"], "")
    assert run("list") == (0, [], "")


def test_a_version_is_retired_restored_and_deleted_and_the_log_says_by_whom(
    run: Run, base_folder: Path, peft_folder: Path
) -> None:
    run("publish", peft_folder, "--name", "sql", "--base", base_folder)
    run("retire", "sql")
    listed = run("list", "--state", "retired", "--name", "s*")[1]
    assert len(listed) == 1 and "  retired  not proven yet" in listed[0]
    assert run("restore", "sql@1") == (0, ["restored public/sql, version 1"], "")
    assert len(run("list", "--base", listed[0].split()[-5])[1]) == 1
    described = run("describe", "sql")[1]
    assert described[0] == "version    public/sql@1, live"
    assert described[-1] == "modules    4 of rank 4, scaling 2, F32: q_proj, v_proj"
    assert f" by {author()}" in described[4] and described[5] == "proof      none yet"
    assert run("delete", "sql") == (0, ["deleted public/sql, version 1"], "")
    code, lines, said = run("restore", "sql@1")
    assert (code, lines) == (2, []) and "was deleted: publish it again" in said
    assert [len(run("list", "--state", s)[1]) for s in ("live", "any")] == [0, 1]
    assert run("describe", "sql@1")[1][0] == "version    public/sql@1, deleted"
    assert run("describe", "sql")[0] == 2
    code, lines, _ = run("audit", "--last", 3)
    assert code == 0 and [line.split("  ")[2] for line in lines] == ["delete", "restore", "retire"]
    assert all(line.endswith(f"  by {author()}") for line in lines)
    (entry,) = run("audit", "--json", "--last", 1)[1]
    assert json.loads(entry)["details"] == {"versions": [1]}
    assert run("audit", "--tenant", "other") == (0, [], "")


@pytest.mark.parametrize("root", ["s3"], indirect=True)
def test_the_endpoint_may_come_from_the_environment(
    run: Run, swift: Swift, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("S3_ENDPOINT_URL", swift.endpoint_url)
    assert run("list") == (0, [], "")
    code, _, error = run("list", "--endpoint-url", "http://127.0.0.1:1")
    assert code == 2
    assert "127.0.0.1:1" in error


@pytest.mark.parametrize("root", ["file"], indirect=True)
def test_verify_says_what_is_damaged(
    run: Run, root: Root, base_folder: Path, peft_folder: Path
) -> None:
    run("publish", peft_folder, "--name", "sql", "--base", base_folder)
    (weights,) = (key for key in root.objects() if key.endswith(WEIGHTS_NAME))
    root.open().put(weights, b"")
    code, lines, error = run("verify", "sql")
    assert (code, lines) == (1, [])
    assert error.startswith("reef: public/sql@1: blobs/")
    assert error.count("\n") == 1


@pytest.mark.parametrize("root", ["file"], indirect=True)
def test_verify_names_all_adapters_of_a_damaged_file(
    run: Run, root: Root, base_folder: Path, peft_folder: Path
) -> None:
    run("publish", peft_folder, "--name", "sql", "--base", base_folder)
    for tenant in ("acme", "umbrella"):
        run("publish", peft_folder, "--name", "sql", "--tenant", tenant)
    assert run("verify") == (0, ["verified 1 adapter"], "")
    (weights,) = (key for key in root.objects() if key.endswith(WEIGHTS_NAME))
    root.remove(weights)
    code, lines, error = run("verify")
    assert (code, lines) == (1, [])
    assert error.startswith("reef: acme/sql@1, public/sql@1, umbrella/sql@1: ")
    assert run("verify", "--tenant", "acme")[2].startswith("reef: acme/sql@1: ")
    assert run("verify", "--tenant", "nobody") == (0, ["verified 0 adapters"], "")


@pytest.mark.parametrize("root", ["file"], indirect=True)
def test_verify_reads_the_bases_too(
    run: Run, root: Root, base_folder: Path, peft_folder: Path
) -> None:
    run("publish", peft_folder, "--name", "sql", "--base", base_folder)
    (base,) = (key for key in root.objects() if key.startswith("bases/"))
    root.open().put(base, b"{}")
    code, lines, error = run("verify")
    assert (code, lines) == (1, [])
    assert error.startswith("reef: base ") and "is damaged" in error
    assert run("verify", "sql") == (0, ["verified 1 adapter"], "")


@pytest.mark.parametrize("root", ["file"], indirect=True)
def test_verify_names_a_damaged_record_of_the_log(
    run: Run, root: Root, base_folder: Path, peft_folder: Path
) -> None:
    run("publish", peft_folder, "--name", "sql", "--base", base_folder)
    root.open().put(f"log/{2:020}.json", b"{}")
    code, lines, error = run("verify")
    assert (code, lines) == (1, [])
    assert f"reef: log/{2:020}.json" in error
    code, (line,), _ = run("list")
    assert code == 0 and line.startswith("public/sql@1")


@pytest.mark.parametrize("root", ["file"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("retire", "sql"), "tenant public has no adapter 'sql'"),
        (("alias", "sql", "7", "1"), "alias '7' is reserved"),
        (("alias", "sql", "p", "--canary", "2"), "--canary and --share belong together"),
        (("alias", "sql", "p", "--canary", "2", "--share", "2%"), "means 0 versions beside 2"),
        (("alias", "sql", "p", "--weights", "1"), "'1' is not version=weight"),
        (("alias", "sql", "p", "1", "--alpha", "0.1"), "bounds of a trial need --canary"),
        (("retire", "../sql"), "adapter '../sql' does not match"),
        (("verify", "sql"), "there is no live adapter 'sql'"),
        (("publish", "/", "--name", "sql"), "the store knows none"),
        (("publish", "hf://adapter", "--name", "sql"), "must be hf://organisation/name@revision"),
        (("publish", "ftp://host/a", "--name", "sql"), "must begin with file:/// or s3://"),
        (("publish", "sql@2", "--name", "other"), "tenant public has no adapter 'sql'"),
    ],
)
def test_an_error_is_one_sentence(arguments: tuple[str, ...], sentence: str, run: Run) -> None:
    code, lines, error = run(*arguments)
    assert (code, lines) == (2, [])
    assert sentence in error
    assert error.count("\n") == 1


def test_an_adapter_is_published_from_elsewhere_and_from_a_version(
    root: Root,
    run: Run,
    base_folder: Path,
    peft_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for path in peft_folder.iterdir():
        root.open().put(f"elsewhere/sql/{path.name}", path.read_bytes())
    url = f"{root.url}/elsewhere/sql"
    code, (line,), _ = run("publish", url, "--name", "sql", "--base", base_folder)
    assert (code, line.startswith("published public/sql@1 as ")) == (0, True)
    digest = line.rpartition(" ")[2]
    kept = [key for key in root.objects() if key.startswith("blobs/")]
    assert run("publish", "sql@latest", "--name", "b", "--tenant", "acme")[1] == [
        f"published acme/b@1 as {digest}"
    ]
    assert run("publish", "acme/b@1", "--name", "c")[1] == [f"published public/c@1 as {digest}"]
    assert [key for key in root.objects() if key.startswith("blobs/")] == kept
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        commit = hub.commit(peft_folder)
        of_hub = run("publish", f"hf://{REPOSITORY}@main", "--name", "d")
        assert of_hub[1] == [f"published public/d@1 as {digest}"], of_hub
        assert any(f"/resolve/{commit}/" in path for path in hub.requests)
    num_bytes = sum((peft_folder / n).stat().st_size for n in (CONFIG_NAME, WEIGHTS_NAME))
    _, _, said = run("publish", url, "--name", "e", "--max-download", "1KiB")
    assert f"has {num_bytes} bytes, more than the 1024 allowed" in said
    assert "leave options out" in run("publish", "sql@1", "--name", "e", "--convert")[2]
    assert list((tmp_path / "cache" / ".uploads").iterdir()) == []


@pytest.mark.parametrize("root", ["file"], indirect=True)
def test_listing_what_is_no_store_says_so_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "root"
    code, lines, error = run("list")
    assert (code, lines) == (2, []) and f"no adapter store at file://{folder}" in error
    assert not folder.exists()
    (folder / "photos").mkdir(parents=True)
    (folder / "photos" / "cat.jpg").touch()
    code, lines, error = run("list")
    assert (code, lines) == (2, []) and "is no adapter store: it holds other files" in error
    assert error.count("\n") == 1
    assert run("verify", "sql")[0] == 2
    assert [path.name for path in folder.rglob("*")] == ["photos", "cat.jpg"]


def test_listing_writes_nothing_to_an_empty_root(run: Run, root: Root, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    assert run("list") == (0, [], "")
    assert open_store(root.url, read_only=True).list("") == []
    assert list((tmp_path / "root").iterdir()) == []


def test_a_missing_root_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ADAPTER_STORE_ROOT", raising=False)
    assert main(["list"]) == 2
    assert "ADAPTER_STORE_ROOT" in capsys.readouterr().err


def test_a_scratch_folder_that_cannot_be_used_is_an_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    code, lines, error = run("list")
    assert (code, lines) == (2, [])
    assert str(tmp_path / "cache") in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--root", "http://bucket"], "must begin with file:/// or s3://"),
        (["--root", "s3://b"], "must be s3://bucket or s3://bucket/prefix"),
        (
            ["--root", "s3://bucket", "--endpoint-url", "127.0.0.1:1"],
            "endpoint_url '127.0.0.1:1' must be http://host:port or https://host:port",
        ),
    ],
)
def test_a_root_that_is_not_served_is_an_error(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", *arguments, "--cache", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_publishing_says_what_of_the_folder_is_used_beside_the_weights(
    run: Run, base_folder: Path, peft_folder: Path, tmp_path: Path
) -> None:
    folder = changed(peft_folder, tmp_path / "own")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    base = Path(shutil.copytree(base_folder, tmp_path / "base"))

    def notes() -> str:
        code, _, errors = run("publish", folder, "--name", "own", "--base", base)
        assert code == 0
        return errors

    assert "note: its own chat template is used" in notes()
    (folder / "generation_config.json").write_text("{}")
    assert "note: its own generation_config.json is used" in notes()
    (base / "chat_template.jinja").write_text("{{ messages }}")
    assert "chat template" not in notes()  # it is the base's


# ---- gc ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["file"], indirect=True)
def test_gc_removes_what_was_retired_and_says_what_it_freed(
    run: Run, root: Root, base_folder: Path, peft_folder: Path, tmp_path: Path
) -> None:
    second = changed(peft_folder, tmp_path / "second", {"lora_alpha": 3})
    _, first, _ = run("publish", peft_folder, "--name", "sql", "--base", base_folder)
    run("publish", second, "--name", "sql")
    run("retire", "sql@1")
    (digest,) = (line.split()[-1] for line in first)
    size = sum(each.nbytes for each in root.open().describe(f"blobs/{digest}/"))
    before = root.objects()
    unneeded = f"3 objects, {size} bytes: 3 files of 1 adapter, 0 log records, 0 snapshots"
    nothing = "removed 0 objects, 0 bytes: 0 files of 0 adapters, 0 log records, 0 snapshots"
    assert run("gc") == (0, [nothing], "")
    code, (line,), error = run("gc", "--grace", "0s", "--dry-run")
    assert (code, error) == (0, "") and root.objects() == before
    assert line == f"would remove {unneeded}"
    assert run("gc", "--grace", "0s")[1] == [line.replace("would remove", "removed")]
    assert len(root.objects()) == len(before) - 3 + 1, "and a record of the collection"
    assert run("gc", "--grace", "0s") == (0, [nothing], "")
    assert run("verify") == (0, ["verified 1 adapter"], "")
    assert run("publish", peft_folder, "--name", "sql")[1][0].startswith("published public/sql@3 ")
    assert run("verify") == (0, ["verified 2 adapters"], "")


@pytest.mark.parametrize(
    ("root", "options"),
    [("file", []), ("file", ["--dry-run"]), ("s3", [])],
    indirect=["root"],
)
def test_gc_leaves_what_is_no_store_alone(options: list[str], run: Run, root: Root) -> None:
    root.open().put("photos/cat.jpg", b"purr")
    root.remove("photos/cat.jpg")
    for key in root.open().list("probe/"):
        root.remove(key)
    objects = open_store(root.url, read_only=True)
    objects.put("photos/cat.jpg", b"purr")
    code, lines, error = run("gc", *options, "--grace", "0s")
    assert (code, lines) == (2, []) and "is no adapter store: it holds other files" in error
    assert error.count("\n") == 1
    assert objects.list("") == ["photos/cat.jpg"]


@pytest.mark.parametrize("root", ["file"], indirect=True)
def test_gc_refuses_a_root_that_is_not_there_and_a_damaged_log(run: Run, root: Root) -> None:
    code, lines, error = run("gc")
    assert (code, lines) == (2, []) and "no adapter store at" in error
    root.open().put(f"log/{1:020}.json", b"{}")
    code, lines, error = run("gc")
    assert (code, lines) == (2, []) and f"log/{1:020}.json" in error
    assert root.objects() == [f"log/{1:020}.json"]


@pytest.mark.parametrize("root", ["file"], indirect=True)
@pytest.mark.parametrize("grace", ["", "24", "-1h", "1.5h", "1w", "inf", "9999999d"])
def test_a_grace_that_is_no_time_is_refused(grace: str, run: Run) -> None:
    code, lines, error = run("gc", "--grace", grace)
    assert (code, lines) == (2, []) and f"{grace!r} is not a time from 0s to 999999d" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("root", ["file"], indirect=True)
def test_gc_without_the_right_to_remove_says_so(
    run: Run,
    root: Root,
    base_folder: Path,
    peft_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run("publish", peft_folder, "--name", "sql", "--base", base_folder)
    run("retire", "sql")
    before = root.objects()

    unlink = Path.unlink

    def refuse(path: Path, *options: Any, **more: Any) -> None:
        if path.is_relative_to(tmp_path / "root"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        unlink(path, *options, **more)

    monkeypatch.setattr(Path, "unlink", refuse)
    code, lines, error = run("gc", "--grace", "0s")
    assert (code, lines) == (2, [])
    assert error.startswith("reef: to remove garbage takes the rights to write and to remove: ")
    assert set(before) <= set(root.objects())
