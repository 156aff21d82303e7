"""The command as a whole: what it is called, how fast it is there, and how it refuses."""

import subprocess
import sys
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest

import reef as package
from tests.reef.console import ROOT, reef

COMMANDS = [
    *("alias", "audit", "bench", "check", "completion", "config-keys", "delete", "describe", "gc"),
    *(
        "keys",
        "list",
        "new-key",
        "plan",
        "profile",
        "prove",
        "publish",
        "restore",
        "retire",
        "serve",
        "simulate",
    ),
    *("tune", "usage", "verify"),
]
HEAVY = {"torch", "ray", "numpy", "pydantic", "yaml", "boto3", "tqdm", "tokenizers"}


def test_the_version_is_that_of_the_distribution() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert package.__version__ == metadata("reef")["Version"] == wanted
    assert reef("--version").stdout == f"reef {wanted}\n"


def test_help_names_every_command() -> None:
    shown = reef("--help").stdout
    listed = shown.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == COMMANDS
    assert not any(line.endswith("...") for line in listed), "a first sentence is too long"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    shown = reef(command, "--help")
    assert shown.returncode == 0 and shown.stdout.startswith(f"Usage: reef {command} ")


@pytest.mark.parametrize(
    "statement", ["import reef", "from reef.__main__ import main; main(['--help'])"]
)
def test_nothing_heavy_is_imported_before_a_command_runs(statement: str) -> None:
    script = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.splitlines()[-1].split())
    assert "reef" in loaded and not loaded & HEAVY


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fly"], "No such command 'fly'"),
        (["list"], "ADAPTER_STORE_ROOT"),
        (["list", "--root", "ftp://x"], "must begin with file:/// or s3://"),
        (["publish"], "'reef publish --help'"),
        (["alias", "sql", "prod", "one"], "'one' is not a valid integer"),
        (["serve", "--config", "none.yaml"], "none.yaml: No such file or directory"),
        (["serve", "--port", "many"], "'many' is not a valid integer"),
        (["new-key"], "Name a tenant"),
        (["new-key", "a/b"], "'a/b'"),
        (["keys", "create", "a", "--name", "x", "--root", "ftp://x"], "must begin with file:///"),
        (["plan"], "Name a model's folder, or --fleet FILE"),
        (["plan", "nowhere"], "nowhere/config.json"),
        (["plan", "nowhere", "--memory", "24GX"], "'24GX' is not a size in bytes"),
        (["check", "--demo", "nowhere"], "nowhere holds no demo"),
        (["bench", "fastest"], "There is no program 'fastest'"),
        (["completion", "tcsh"], "'tcsh'"),
    ],
)
def test_a_refusal_is_one_line_and_status_2(arguments: list[str], words: str) -> None:
    refused = reef(*arguments, ADAPTER_STORE_ROOT="")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("reef: ") and refused.stderr.count("\n") == 1
    assert words in refused.stderr


def test_without_a_command_it_shows_its_help() -> None:
    shown = reef()
    assert shown.returncode == 2 and "Commands:" in shown.stderr


@pytest.mark.parametrize(
    ("shell", "words"),
    [("bash", "complete"), ("zsh", "#compdef reef"), ("fish", "complete --no-files")],
)
def test_a_shell_gets_its_completion_script(shell: str, words: str) -> None:
    script = reef("completion", shell)
    assert script.returncode == 0 and words in script.stdout and "_REEF_COMPLETE" in script.stdout


def test_words_are_completed() -> None:
    completed = reef(_REEF_COMPLETE="bash_complete", COMP_WORDS="reef pu", COMP_CWORD="1")
    assert completed.stdout == "plain,publish\n"


def test_a_program_of_the_bench_gets_its_arguments() -> None:
    listed = reef("bench").stdout
    assert "reef bench step_bench " in listed and "reef bench environment" not in listed
    shown = reef("bench", "gpu_report", "--help")
    assert shown.returncode == 0 and shown.stdout.startswith("usage: ")


@pytest.mark.parametrize("name", ["engine", "adapter_store", "deployments"])
def test_a_folder_that_hides_a_package_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    refused = reef("--help", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"'{name}'" in refused.stderr and refused.stderr.count("\n") == 1
