"""Defines the fp8 format: e4m3 codes with a float32 scale per row, for weights and activations."""

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # largest value of e4m3
TINY = 1e-12  # least max|x| that a scale is made for: 1 / scale must not overflow
MULTIPLE = 16  # FP8 tensor cores need layers' inputs and outputs to be multiples of it


@dataclass(frozen=True, slots=True)
class E4m3Rows:
    """Rows x = codes * scales. codes e4m3 [N, in], contiguous; scales float32 [N, 1]."""

    codes: Tensor
    scales: Tensor

    @staticmethod
    def empty(rows: int, width: int, device: torch.device) -> "E4m3Rows":
        codes = torch.empty(rows, width, dtype=E4M3, device=device)
        return E4m3Rows(codes, torch.empty(rows, 1, device=device))

    def first(self, rows: int) -> "E4m3Rows":
        return E4m3Rows(self.codes[:rows], self.scales[:rows])


def quantize_rows(x: Tensor) -> E4m3Rows:
    """Quantize x [N, in] of any float: scale = max|x| / 448, codes rounded to nearest even."""
    wide = x.float()
    largest = wide.abs().amax(1, keepdim=True).clamp(min=TINY)
    limit = torch.full_like(largest, LARGEST)  # CUDA divides by a number as * (1 / number)
    codes = (wide * (limit / largest)).clamp(-LARGEST, LARGEST).to(E4M3)
    return E4m3Rows(codes, largest / limit)
