"""Tests CudaDevice on a GPU: the order between its streams, and its graphs."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from engine.backends.cuda.streams import CudaDevice
from engine.model.quantize import QUANTIZERS

pytestmark = pytest.mark.gpu
SIZE = 2048


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice(torch.device("cuda"))


def half_beside(device: CudaDevice, x: Tensor, w: Tensor) -> tuple[Callable[[], None], Tensor]:
    """Compute out = x @ w + 3 x, the last term concurrently with the product."""
    part, out = torch.zeros_like(x), torch.zeros_like(x)

    def work() -> None:
        wait = device.beside(lambda: part.copy_(x).mul_(3.0))  # type: ignore[arg-type]
        torch.mm(x, w, out=out)
        wait()
        out.add_(part)
        x.zero_()  # must not affect the side-stream work

    return work, out


@pytest.mark.parametrize("is_captured", [False, True])
@torch.inference_mode()
def test_concurrent_work_is_joined(device: CudaDevice, is_captured: bool) -> None:
    x, w = torch.zeros(SIZE, SIZE, device="cuda"), torch.eye(SIZE, device="cuda")
    work, out = half_beside(device, x, w)
    work()
    device.synchronize()
    run = device.capture(work) if is_captured else work
    for value in (1.0, 2.0, 5.0):
        x.fill_(value)
        run()
        assert torch.equal(out, torch.full_like(out, 4 * value))


@torch.inference_mode()
def test_memory_is_pinned_by_another_thread_during_a_capture(device: CudaDevice) -> None:
    x = torch.zeros(16, device="cuda")
    with ThreadPoolExecutor(1) as pool:

        def work() -> None:
            x.add_(1.0)
            pinned = pool.submit(device.pinned, 2**24 + 4096).result()
            assert pinned.is_pinned()

        work()
        device.synchronize()
        replay = device.capture(work)
    replay()
    assert x.tolist() == [2.0] * 16


@torch.inference_mode()
def test_copies_concurrent_with_steps_arrive_complete(device: CudaDevice) -> None:
    source, target = device.pinned(2**26), torch.zeros(2**26, dtype=torch.uint8, device="cuda")
    source.fill_(7)
    with device.side(device.record()):
        device.copy(target, source)
        event = device.record()
    device.main_waits(event)
    assert bool((target == 7).all())
    assert event.is_done()


LOSE_THE_DEVICE = """
import os, torch
from engine.backends.runner import DeviceLost, check_device
cuda = torch.device("cuda")
torch.zeros(1, device=cuda)[torch.tensor([5], device=cuda)]
try:
    check_device(cuda)
except DeviceLost:
    os._exit(7)
"""


def test_a_lost_device_is_noticed_and_its_process_can_end() -> None:
    """Run in a separate process, because the device cannot be used afterwards."""
    done = subprocess.run([sys.executable, "-c", LOSE_THE_DEVICE], timeout=120)
    assert done.returncode == 7


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_quantized_on_a_gpu_as_on_a_cpu(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 2**18, generator=generator) * torch.logspace(-42, 3, 96)[:, None]
    weight = weight.to(dtype)  # values from denormal to large; more than one chunk
    expected, found = QUANTIZERS[kind](weight), QUANTIZERS[kind](weight.cuda())
    assert found.codes.is_cuda and found.scales.is_cuda
    assert torch.equal(found.scales.cpu(), expected.scales)
    assert torch.equal(found.codes.view(torch.uint8).cpu(), expected.codes.view(torch.uint8))
