"""Runs vLLM's Triton kernels for many adapters, from vLLM's own files.

Only those kernels are loaded, from the `vllm` package on the path. Their imports from the rest of
vLLM (a logger, the platform, the registration of an op) are replaced by stand-ins, so that neither
its compiled extensions nor its other requirements are needed. Written for vLLM 0.32.
"""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from engine.lora.weights import LoraWeights, SiteWeights
from engine.model.layers import LoraSite
from tests.bench.gpu_clock import Work

OPS = "vllm.lora.ops.triton_ops"


class Unavailable(RuntimeError):
    """Raised if vLLM's kernels cannot be run here; the message gives the reason."""


@cache
def load_kernels() -> SimpleNamespace:
    """Load `shrink`, `expand` and `Meta`, which prepares their arguments. Raises Unavailable."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable("vllm is not on the path")
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / "lora" / "ops" / "triton_ops").is_dir():
        raise Unavailable(f"{folder} has no LoRA kernels")
    try:
        _stand_in(folder)
        names = ("lora_shrink_op", "lora_expand_op", "lora_kernel_metadata")
        shrink, expand, meta = (importlib.import_module(f"{OPS}.{name}") for name in names)
    except Exception as error:
        raise Unavailable(f"vLLM's kernels do not load: {type(error).__name__}: {error}") from error
    return SimpleNamespace(
        shrink=shrink.lora_shrink, expand=expand.lora_expand, Meta=meta.LoRAKernelMeta
    )


# ==== imports of the kernels' files ====


def _stand_in(folder: Path) -> None:
    """Install empty packages, and the few names that the kernels import from other modules."""
    if "vllm" in sys.modules:
        return
    import triton
    import triton.language as tl

    for package in ("vllm", "vllm.utils", "vllm.lora", "vllm.lora.ops", OPS):
        module = _module(package)
        module.__path__ = [str(folder.joinpath(*package.split(".")[1:]))]
    _module("vllm.logger", init_logger=_logger)
    _module("vllm.triton_utils", triton=triton, tl=tl)
    _module("vllm.platforms", current_platform=_Platform())
    _module(
        "vllm.utils.torch_utils",
        direct_register_custom_op=_register_nothing,
        async_tensor_h2d=_to_device,
    )
    importlib.import_module("vllm.envs")


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def _logger(name: str) -> Any:
    log = logging.getLogger(name)
    return SimpleNamespace(
        warning_once=log.debug, info_once=log.debug, warning=log.warning, info=log.info
    )


class _Platform:
    def is_cuda(self) -> bool:
        return torch.cuda.is_available()

    def has_device_capability(self, capability: int) -> bool:
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor >= capability


def _register_nothing(**_: Any) -> None:
    """Fail to register, so that vLLM's files offer plain functions, with the same kernels."""
    raise AttributeError("ops are not registered")


def _to_device(data: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(data, dtype=dtype).to(device)


# ==== a batch ====


class VllmLora:
    """Holds adapters 0, 1, ... of `weights` as vLLM does, padded to the largest rank.

    Each of `slots_of_copies` is a batch: the adapter slots of its rows, from 1 on.
    """

    def __init__(
        self,
        sites: Sequence[LoraSite],
        weights: Sequence[LoraWeights],
        slots_of_copies: Sequence[Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._kernels = load_kernels()
        self._sites, self._device = sites, device
        ranks = [b.shape[0] for w in weights for s in w.sites.values() for *_, b in s.expands]
        self._rank = max(ranks)
        of_site = {(s.layer, s.site): [w.sites[s.layer, s.site] for w in weights] for s in sites}
        self._a = {key: self._stack_a(of, dtype) for key, of in of_site.items()}
        self._b = {key: self._stack_b(of, dtype) for key, of in of_site.items()}
        self._metas = [self._meta(slots, len(weights)) for slots in slots_of_copies]
        self._rows = len(slots_of_copies[0])
        slices = {len(s.slices) for s in sites}
        size = self._rows, self._rank
        self._planes = {n: torch.empty(n, *size, device=device) for n in slices}

    def works(self, xs: Mapping[int, Tensor], ys: Mapping[int, Tensor]) -> list[Work]:
        """Make a call per batch that adds its adapters at all sites; `ys` has one y per width."""
        return [partial(self._add, meta, xs, ys) for meta in self._metas]

    def _add(self, meta: Any, xs: Mapping[int, Tensor], ys: Mapping[int, Tensor]) -> None:
        numbers = meta.meta_args(self._rows, True)
        for site in self._sites:
            key = site.layer, site.site
            planes, y = self._planes[len(site.slices)], ys[site.out_features]
            self._kernels.shrink(xs[site.in_features], self._a[key], planes, *numbers, 1.0)
            self._kernels.expand(planes, self._b[key], y, *numbers, add_inputs=True)

    def _meta(self, slots: Sequence[int], num_adapters: int) -> Any:
        meta = self._kernels.Meta.make(num_adapters, len(slots), self._device)
        meta.prepare_tensors(torch.tensor(slots, dtype=torch.int32, device=self._device) - 1)
        return meta

    def _stack_a(self, of: list[SiteWeights], dtype: torch.dtype) -> list[Tensor]:
        """Stack A of each slice to [adapters, 1, rank, in]."""
        stacks: list[Tensor] = []
        for part in range(len(of[0].expands)):
            size = len(of), 1, self._rank, of[0].a.shape[1]
            stack = torch.zeros(size, dtype=dtype, device=self._device)
            for i, site in enumerate(of):
                first, last = site.expands[part][:2]
                stack[i, 0, : last - first] = site.a[first:last]
            stacks.append(stack)
        return stacks

    def _stack_b(self, of: list[SiteWeights], dtype: torch.dtype) -> list[Tensor]:
        """Stack B of each slice to [adapters, 1, out, rank]."""
        stacks: list[Tensor] = []
        for part in range(len(of[0].expands)):
            size = len(of), 1, of[0].expands[part][4].shape[1], self._rank
            stack = torch.zeros(size, dtype=dtype, device=self._device)
            for i, site in enumerate(of):
                b = site.expands[part][4]
                stack[i, 0, :, : len(b)] = b.T
            stacks.append(stack)
        return stacks
