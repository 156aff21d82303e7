"""Start and end that server, and say why where it cannot be had."""

import os
import signal
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ACCESS_KEY, SECRET = "test:tester", "SKtest"  # as in server.py
ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-swift" / "bin" / "python"
SERVER = Path(__file__).with_name("server.py")


@dataclass(frozen=True, slots=True)
class Swift:
    endpoint_url: str
    pid: int

    @contextmanager
    def paused(self) -> Generator[None, None, None]:
        """It keeps its connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)


def why_not(folder: Path) -> str | None:
    """Why there can be no server with its data in this folder."""
    if not PYTHON.is_file():
        return f"there is no {PYTHON.relative_to(ROOT)}: `make test` makes it"
    try:
        os.setxattr(folder, "user.test", b"")
    except OSError as error:
        return f"{folder} takes no extended attributes: {error}"
    return None


@contextmanager
def running_swift(folder: Path) -> Generator[Swift, None, None]:
    """An empty server. It ends with the block, or with this process."""
    command = [PYTHON, "-W", "ignore", SERVER, folder / "data"]
    log = folder / "swift.log"
    pipe = subprocess.PIPE
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        port = process.stdout.readline().decode().strip()
        assert port, f"swift did not start:\n{log.read_text()}"
        try:
            yield Swift(f"http://127.0.0.1:{port}", process.pid)
        finally:
            process.stdin.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
