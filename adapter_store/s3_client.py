"""Send requests to one bucket through boto3; every failure becomes an S3Error.

Only this file and s3_transfers.py import boto3. boto3 finds the credentials itself: they are never
looked at, kept or printed here. Knows no keys' meaning and makes no decisions.
"""

# pyright: reportMissingTypeStubs=false

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import boto3.session
from boto3.exceptions import RetriesExceededError
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    NoCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from botocore.parsers import ResponseParserError

from adapter_store.errors import SourceUnavailable

CONNECT_TIMEOUT_S = 3.0
READ_TIMEOUT_S = 20.0  # between two packets
MAX_ATTEMPTS = 3
# For reads that are repeated soon anyway: while one hangs, nothing newer is read.
IMPATIENT_TIMEOUT_S = 3.0
IMPATIENT_ATTEMPTS = 2
MAX_CONNECTIONS = 64  # kept open

Answer = Mapping[str, Any]  # what boto3 returns


class S3Error(SourceUnavailable):
    """A request that failed: the server's answer, or the reason why there is none."""

    def __init__(
        self,
        sentence: str,
        status: int = 0,
        code: str = "",
        was_repeated: bool = False,
        is_broken_off: bool = False,
    ) -> None:
        super().__init__(sentence)
        self.status = status  # of HTTP; 0 if there was no answer
        self.code = code  # of S3, e.g. NoSuchKey
        self.was_repeated = was_repeated  # an earlier attempt may have taken effect
        self.is_broken_off = is_broken_off  # the body of an answer was cut short


class S3Client:
    """Sends requests to one bucket. Thread-safe."""

    def __init__(
        self, bucket: str, endpoint_url: str | None, *, is_impatient: bool = False
    ) -> None:
        self.bucket = bucket
        self._endpoint_url = endpoint_url
        if endpoint_url is not None:
            _check_endpoint(endpoint_url)
        self.where = f"bucket {bucket} at {endpoint_url or 'the endpoint of AWS'}"
        with self.errors("connect to"):
            try:
                self.boto3_client = _connect(endpoint_url, **_patience(is_impatient))
            except ValueError as error:  # boto3's error for a malformed endpoint
                raise SourceUnavailable(f"cannot connect to {self.where}: {error}") from error
        found: str = self.boto3_client.meta.endpoint_url
        _check_endpoint(found)  # boto3 may have found it in AWS_ENDPOINT_URL or in AWS's files
        self.where = f"bucket {bucket} at {found}"

    def call(self, operation: str, doing: str, **request: Any) -> Answer:
        """Call boto3's operation of this name; `doing` completes the error "cannot ... bucket"."""
        with self.errors(doing):
            return getattr(self.boto3_client, operation)(Bucket=self.bucket, **request)

    def presigned_put_if_absent(self, key: str) -> str:
        """Make a URL for one PUT, with If-None-Match: *, of any body."""
        signer: Any = _connect(self._endpoint_url, signature_version="s3v4", **_patience(False))
        request = {"Bucket": self.bucket, "Key": key, "IfNoneMatch": "*"}
        return str(signer.generate_presigned_url("put_object", Params=request, ExpiresIn=60))

    def error(self, doing: str, reason: str) -> S3Error:
        """Make the error that says why something cannot be done."""
        return S3Error(f"cannot {doing} {self.where}: {reason}")

    @contextmanager
    def errors(self, doing: str) -> Generator[None, None, None]:
        """Raise S3Error for what boto3 raises in the block, also while a body is read."""
        try:
            yield
        except ClientError as error:
            raise _refusal(f"cannot {doing} {self.where}", error) from error
        except (BotoCoreError, ResponseParserError) as error:
            broken = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
            raise S3Error(
                f"cannot {doing} {self.where}: {_reason(error)}",
                is_broken_off=isinstance(error, broken),
            ) from error
        except RetriesExceededError as error:  # of a download whose body was cut short
            last: Exception = error.last_exception  # pyright: ignore[reportUnknownMemberType]
            raise self.error(doing, _reason(last)) from error


def _patience(is_impatient: bool) -> dict[str, Any]:
    timeout_s = min(IMPATIENT_TIMEOUT_S, READ_TIMEOUT_S) if is_impatient else READ_TIMEOUT_S
    attempts = min(IMPATIENT_ATTEMPTS, MAX_ATTEMPTS) if is_impatient else MAX_ATTEMPTS
    retries = {"mode": "standard", "total_max_attempts": attempts}
    return {"read_timeout": timeout_s, "retries": retries}


def _connect(endpoint_url: str | None, **more: Any) -> Any:
    config = Config(
        **more,
        connect_timeout=CONNECT_TIMEOUT_S,
        max_pool_connections=MAX_CONNECTIONS,
        s3={"addressing_style": "path" if endpoint_url else "auto"},
        # Not all servers support the newer checksums, and the manifests hold a SHA-256.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    session: Any = boto3.session.Session()  # not the default one, which is not thread-safe
    return session.client("s3", endpoint_url=endpoint_url, config=config)


def _check_endpoint(endpoint_url: str) -> None:
    url = urlsplit(endpoint_url)
    if "@" in url.netloc:  # the part before it may be a secret
        raise SourceUnavailable("endpoint_url must not hold a user or a password")
    if url.scheme not in ("http", "https") or not url.netloc or url.query or url.fragment:
        raise SourceUnavailable(
            f"endpoint_url {endpoint_url!r} must be http://host:port or https://host:port"
        )


def _refusal(sentence: str, error: ClientError) -> S3Error:
    response: Answer = error.response
    said: Answer = response.get("Error", {})
    answer: Answer = response.get("ResponseMetadata", {})
    code, message = str(said.get("Code", "no code")), str(said.get("Message", "no message"))
    return S3Error(
        f"{sentence}: {_one_line(f'{code}: {message}')}",
        status=int(answer.get("HTTPStatusCode", 0)),
        code=code,
        was_repeated=int(answer.get("RetryAttempts", 0)) > 0,
    )


def _reason(error: Exception) -> str:
    if isinstance(error, NoCredentialsError):
        return "there are no credentials, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    return _one_line(str(error))


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
