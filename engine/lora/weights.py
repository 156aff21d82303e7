"""LoraWeights: one adapter in host memory, in a form that does not depend on the backend."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from engine.lora.overlay import Overlay

Site = tuple[int, str]  # (layer, site)
Expand = tuple[int, int, int, int, torch.Tensor]  # (r0, r1, out0, out1, B)


class AdapterLoadError(ValueError):
    """The adapter cannot be applied to this base; the message names the module and the reason."""


class AdapterUnreadable(Exception):
    """The files are not those that were verified, or cannot be read; the message is for the log."""


@dataclass(frozen=True, slots=True)
class SiteWeights:
    """What an adapter makes of a site's output y: y * scale + shift + (x A^T) B.

    Rows [r0, r1) of `a` and their B give output columns [out0, out1). `scale` and `shift` are
    float32 over all outputs of the site, 1 and 0 where the adapter has none. A site may have them
    and no factors: then `a` is [0, in].
    """

    a: torch.Tensor  # [R, in]
    expands: tuple[Expand, ...]
    scale: torch.Tensor | None = None  # [out]; None: 1 everywhere
    shift: torch.Tensor | None = None  # [out]; None: 0 everywhere

    def to(self, device: torch.device) -> "SiteWeights":
        expands = tuple((*e[:4], e[4].to(device, non_blocking=True)) for e in self.expands)
        scale, shift = (
            None if t is None else t.to(device, non_blocking=True) for t in (self.scale, self.shift)
        )
        return SiteWeights(self.a.to(device, non_blocking=True), expands, scale, shift)

    @property
    def nbytes(self) -> int:
        affine = sum(t.nbytes for t in (self.scale, self.shift) if t is not None)
        return self.a.nbytes + sum(b.nbytes for *_, b in self.expands) + affine


Sites = dict[Site, SiteWeights]


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One adapter, each site at its own rank; what it does not change is absent.

    `norms` are whole weights, by the module's name (model.layers.0.input_layernorm), in the form
    that RmsNorm keeps: with the model's offset added, in float32 if there is one.
    """

    digest: str
    sites: Sites
    nbytes: int
    norms: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    embedding: Overlay | None = None
    head: Overlay | None = None
    invocation_token_ids: tuple[int, ...] = ()  # of an aLoRA: it acts from their last place on

    @property
    def changes_rows(self) -> bool:
        """Whether rows differ from the base's beside linear layers and the output layer."""
        return self.embedding is not None or bool(self.norms)

    @property
    def vocab_size(self) -> int:
        """Rows of its own embedding and output layer, if it changes one of them; else 0."""
        own = (o.vocab_size for o in (self.embedding, self.head) if o is not None)
        return max(own, default=0)

    def to(self, device: torch.device) -> "LoraWeights":
        if device.type == "cpu":
            return self
        return replace(
            self,
            sites={key: site.to(device) for key, site in self.sites.items()},
            norms={name: norm.to(device) for name, norm in self.norms.items()},
            embedding=None if self.embedding is None else self.embedding.to(device),
            head=None if self.head is None else self.head.to(device),
        )
