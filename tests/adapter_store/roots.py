"""Describe the two kinds of root that a test may run on, and how to damage their content."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import boto3.session
from botocore.config import Config

from adapter_store.object_store import ObjectStore
from adapter_store.open_store import open_store
from tests.swift.process import ACCESS_KEY, SECRET

BUCKET = "adapters"


@dataclass(frozen=True, slots=True)
class Root:
    url: str
    remove: Callable[[str], None]  # what the store itself never does: delete an object

    def open(self) -> ObjectStore:
        return open_store(self.url)

    def objects(self) -> list[str]:
        return [key for key in self.open().list("") if not key.startswith("probe/")]


def s3_client(endpoint_url: str) -> Any:
    """Make a client of the server for what the store cannot do."""
    session = boto3.session.Session(ACCESS_KEY, SECRET)
    config = Config(s3={"addressing_style": "path"}, max_pool_connections=32)
    return session.client("s3", endpoint_url=endpoint_url, config=config)
