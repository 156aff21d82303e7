"""One thread for torch: tiny models gain nothing from two, and lose much on a busy machine.

Without a GPU, Triton kernels run in Triton's interpreter, which it decides when it is imported.
"""

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.planted_keys import holds_key, logs_with_keys

ALARM_AGAIN_S = 30.0

# A busy machine is no failure: neither a slow example nor a slow choice of examples.
settings.register_profile("reef", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("reef")

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer() -> Generator[None, object, object]:
    """Repeat the alarm that ends a test which hangs.

    asyncio keeps what is raised in a task for whoever awaits the task: the first alarm may end a
    background task, and the test would wait for ever.
    """
    result = yield
    seconds, _ = signal.getitimer(signal.ITIMER_REAL)
    if seconds:
        signal.setitimer(signal.ITIMER_REAL, seconds, ALARM_AGAIN_S)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail whatever test has an API key in what it logged or printed."""
    report = yield
    shown = [name for name, text in report.sections if holds_key(text)]
    if shown:
        report.outcome, report.longrepr = "failed", f"an API key is in: {', '.join(shown)}"
    return report


@pytest.fixture(scope="session", autouse=True)
def _no_key_in_any_log(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    """Look for API keys in all logs that the tests' processes have written, Ray's too."""
    yield
    found = logs_with_keys(tmp_path_factory.getbasetemp())
    assert not found, f"an API key is in these logs: {found}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests for workers (`-n 2`): a file's in one, those that start Ray in one, and first.

    Two clusters at once would be too much for two cores, and last they would leave a core idle.
    """
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        refuse_unordered(item)
        group = "ray" if item.get_closest_marker("ray") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


def refuse_unordered(item: pytest.Item) -> None:
    """A set's order, and so a name made of it, differs between workers: they would not start."""
    for name, value in getattr(getattr(item, "callspec", None), "params", {}).items():
        if isinstance(value, set | frozenset) and str(value) in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid}: {name} is a set; write a sorted list")
