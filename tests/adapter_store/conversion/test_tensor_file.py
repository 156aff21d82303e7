"""Numbers are widened bit by bit, and a tensor with one that is none is refused by its name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adapter_store.conversion.tensor_file import open_tensors
from adapter_store.errors import AdapterInvalid

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def tensors(folder: Path, values: Tensor) -> Path:
    save_file({"model.w": values}, folder / "a.safetensors")
    return folder / "a.safetensors"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_is_read_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16)  # all that 16 bits can be
    values = (values.view(dtype) if dtype.itemsize == 2 else values.to(dtype) / 7).view(64, -1)
    values = values.where(values.isfinite(), torch.tensor(0.5, dtype=dtype))
    found = open_tensors([tensors(tmp_path, values)]).read("model.w")
    assert torch.equal(torch.from_numpy(found), values.float())


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_is_refused(tmp_path: Path, dtype: torch.dtype, value: str) -> None:
    values = torch.ones(40, 9, dtype=dtype)
    values[39, 8] = float(value)
    file = open_tensors([tensors(tmp_path, values)])
    with pytest.raises(AdapterInvalid, match=r"tensor model\.w holds a NaN or an infinity"):
        file.read("model.w")


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    path = tensors(tmp_path, torch.ones(40, 9))
    file = open_tensors([path])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AdapterInvalid, match="ends early"):
        file.read("model.w")
