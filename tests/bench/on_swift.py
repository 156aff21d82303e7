"""Run a benchmark against a Swift server of its own on loopback.

python -m tests.bench.on_swift store_bench 10000
"""

import os
import runpy
import sys
import tempfile
from pathlib import Path

from tests.adapter_store.roots import BUCKET, s3_client
from tests.swift.process import ACCESS_KEY, SECRET, running_swift, why_not


def main() -> int:
    program, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        if reason := why_not(Path(name)):
            print(reason, file=sys.stderr)
            return 2
        with running_swift(Path(name)) as server:
            s3_client(server.endpoint_url).create_bucket(Bucket=BUCKET)
            os.environ |= {
                "S3_ENDPOINT_URL": server.endpoint_url,
                "AWS_ACCESS_KEY_ID": ACCESS_KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_EC2_METADATA_DISABLED": "true",
            }
            sys.argv = [program, *arguments, "--root", f"s3://{BUCKET}/bench"]
            runpy.run_module(f"tests.bench.{program}", run_name="__main__")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
