"""python -m adapter_store: publish, list, alias, retire and verify from a shell.

One line per success; an error is one sentence on stderr and exit code 1, wrong usage is 2.
"""

import argparse
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from adapter_store import bases
from adapter_store.errors import AdapterNotFound, AdapterStoreError
from adapter_store.manifest import WEIGHTS_NAME
from adapter_store.names import AdapterRecord, check_name
from adapter_store.object_store import OnBytes
from adapter_store.store import AdapterStore

ROOT_VARIABLE = "ADAPTER_STORE_ROOT"
CACHE_BYTES = 2**30  # no adapter is downloaded here: the folder keeps the hashes of base models
DEFAULT_TENANT = "public"

Command = Callable[[AdapterStore, argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    root: str | None = options.root or os.environ.get(ROOT_VARIABLE)
    if root is None:
        parser.error(f"--root or the variable {ROOT_VARIABLE} must say where the store is")
    command: Command = options.command
    try:
        endpoint_url: str | None = options.endpoint_url
        store = AdapterStore(root, options.cache, CACHE_BYTES, endpoint_url=endpoint_url)
        command(store, options)
    except (AdapterStoreError, OSError) as error:  # OSError: the scratch folder
        print(f"adapter_store: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="adapter_store", description="Manage LoRA adapters.")
    where = f"file:///path or s3://bucket/prefix (default: ${ROOT_VARIABLE})"
    parser.add_argument("--root", help=where)
    parser.add_argument("--endpoint-url", help="of an S3 server (default: $S3_ENDPOINT_URL)")
    cache = Path.home() / ".cache" / "reef" / "adapter_store"
    parser.add_argument("--cache", type=Path, default=cache, help="scratch folder (%(default)s)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str, tenant: str | None) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=text, description=text)
        subparser.set_defaults(command=command)
        subparser.add_argument("--tenant", default=tenant, help=f"(default: {tenant or 'all'})")
        return subparser

    publish = add("publish", _publish, "Check a PEFT folder and store it.", DEFAULT_TENANT)
    publish.add_argument("folder")
    publish.add_argument("--name", required=True)
    publish.add_argument("--base", help="a model folder, or the beginning of a fingerprint")
    add("list", _list, "Show all live versions.", None)
    alias = add("alias", _alias, "Make NAME@ALIAS mean a version.", DEFAULT_TENANT)
    alias.add_argument("name")
    alias.add_argument("alias")
    alias.add_argument("version", type=int)
    retire = add("retire", _retire, "Withdraw NAME@VERSION, or all of NAME.", DEFAULT_TENANT)
    retire.add_argument("name")
    verify = add("verify", _verify, "Hash what is stored again.", None)
    verify.add_argument("name", nargs="?")
    return parser


def _publish(store: AdapterStore, options: argparse.Namespace) -> None:
    base: str | None = options.base
    if base is not None and (Path(base) / bases.CONFIG_NAME).is_file():
        base = _register(store, Path(base))
    weights = Path(options.folder) / WEIGHTS_NAME
    nbytes = weights.stat().st_size if weights.is_file() else 0
    with _progress("checking and copying", 3 * nbytes) as on_bytes:
        ref = store.publish(options.folder, options.tenant, options.name, base, on_bytes)
    print(f"published {ref.tenant}/{ref.name}@{ref.version} as {ref.digest}")


def _register(store: AdapterStore, model_folder: Path) -> str:
    nbytes = sum(path.stat().st_size for path in model_folder.glob("*.safetensors"))
    with _progress("hashing the base", nbytes) as on_bytes:
        return store.register_base(model_folder, on_bytes)


def _list(store: AdapterStore, options: argparse.Namespace) -> None:
    for record in store.list(options.tenant):
        print(
            f"{record.tenant}/{record.name}@{record.version}  rank {record.lora_rank}  "
            f"{record.nbytes} bytes  digest {record.digest[:12]}  base {record.base[:12]}  "
            f"{' '.join(record.aliases)}".rstrip()
        )


def _alias(store: AdapterStore, options: argparse.Namespace) -> None:
    store.alias(options.tenant, options.name, options.alias, options.version)
    print(f"{options.tenant}/{options.name}@{options.alias} is version {options.version}")


def _retire(store: AdapterStore, options: argparse.Namespace) -> None:
    versions = store.retire(options.tenant, options.name)
    listed = ", ".join(str(version) for version in versions)
    print(f"retired {options.tenant}/{options.name.partition('@')[0]}, version {listed}")


def _verify(store: AdapterStore, options: argparse.Namespace) -> None:
    records = _records(store, options.tenant, options.name)
    with _progress("hashing", sum(record.nbytes for record in records)) as on_bytes:
        problems = store.verify(records, on_bytes)
    for problem in problems[:-1]:
        print(f"adapter_store: {problem}", file=sys.stderr)
    if problems:
        raise AdapterStoreError(problems[-1])
    print(f"verified {len({record.digest for record in records})} adapters")


def _records(store: AdapterStore, tenant: str | None, name: str | None) -> list[AdapterRecord]:
    records = store.list(tenant)
    if name is None:
        return list(records)
    found = [record for record in records if record.name == check_name("adapter", name)]
    if not found:
        raise AdapterNotFound(f"there is no live adapter {name!r}")
    return found


@contextmanager
def _progress(text: str, num_bytes: int) -> Generator[OnBytes, None, None]:
    """A bar on stderr while it is a terminal."""
    hidden = not sys.stderr.isatty()
    bar: Any = tqdm(total=num_bytes, desc=text, unit="B", unit_scale=True, disable=hidden)
    with bar:
        yield bar.update


if __name__ == "__main__":
    sys.exit(main())
