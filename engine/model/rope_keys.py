"""Reads the rope keys of a config into a Rotary. Handles the scalings, but no families.

Missing keys get defaults from the model's sizes; an unknown key or scaling is an error.
"""

import math
from dataclasses import dataclass
from typing import Any

from engine.model.config_keys import ConfigKeys
from engine.model.rotary import (
    Dynamic,
    LinearScaling,
    Llama3,
    LongRope,
    Rotary,
    Scaling,
    Unscaled,
    Yarn,
)


@dataclass(frozen=True, slots=True)
class RopeReader:
    """Reads rope keys, with defaults from the sizes of the model."""

    where: str
    head_dim: int
    max_position: int

    def read(self, raw: dict[str, Any], max_model_len: int | None, partial: bool) -> Rotary:
        keys = ConfigKeys(raw, f"{self.where}: rope_parameters")
        kind = keys.text("rope_type", keys.text("type", "default"))
        if kind not in SCALINGS:
            raise keys.error("rope_type", kind, f"one of {', '.join(SCALINGS)}")
        served_len = self.max_position if max_model_len is None else max_model_len
        share = keys.number("partial_rotary_factor", 1.0)
        if not (0.0 < share <= 1.0 if partial else share == 1.0):
            raise keys.error("partial_rotary_factor", share, "1.0")
        dim = int(self.head_dim * share)
        if dim % 2:
            raise keys.error("partial_rotary_factor", share, f"even dimensions, not {dim}")
        rotary = Rotary(dim, keys.number("rope_theta"), SCALINGS[kind](self, keys, served_len))
        keys.finish({}, frozenset())
        return rotary

    def longest(self, scaling: Scaling) -> int:
        """Return the longest supported sequence, which some scalings extend."""
        if isinstance(scaling, Dynamic | Yarn):
            return max(self.max_position, int(scaling.trained_len * scaling.factor))
        return self.max_position

    def trained_len(self, keys: ConfigKeys) -> int:
        return keys.integer("original_max_position_embeddings", self.max_position)

    def unscaled(self, keys: ConfigKeys, served_len: int) -> Scaling:
        return Unscaled()

    def linear(self, keys: ConfigKeys, served_len: int) -> Scaling:
        return LinearScaling(keys.number("factor"))

    def dynamic(self, keys: ConfigKeys, served_len: int) -> Scaling:
        return Dynamic(keys.number("factor"), self.max_position, served_len)

    def llama3(self, keys: ConfigKeys, served_len: int) -> Scaling:
        return Llama3(
            factor=keys.number("factor"),
            low_freq_factor=keys.number("low_freq_factor"),
            high_freq_factor=keys.number("high_freq_factor"),
            trained_len=self.trained_len(keys),
        )

    def yarn(self, keys: ConfigKeys, served_len: int) -> Scaling:
        trained_len = self.trained_len(keys)
        factor = keys.optional_number("factor", None) or self.max_position / trained_len
        wide, narrow = (
            keys.optional_number("mscale", None),
            keys.optional_number("mscale_all_dim", None),
        )
        inferred = _yarn_amplitude(factor, 1.0)
        if wide and narrow:
            inferred = _yarn_amplitude(factor, wide) / _yarn_amplitude(factor, narrow)
        given = keys.optional_number("attention_factor", None)
        return Yarn(
            factor=factor,
            trained_len=trained_len,
            beta_fast=keys.optional_number("beta_fast", None) or 32,
            beta_slow=keys.optional_number("beta_slow", None) or 1,
            truncate=keys.flag("truncate", True),
            attention_factor=inferred if given is None else given,
        )

    def longrope(self, keys: ConfigKeys, served_len: int) -> Scaling:
        trained_len = self.trained_len(keys)
        factor = keys.optional_number("factor", None) or self.max_position / trained_len
        inferred = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(trained_len))
        given = keys.optional_number("attention_factor", None)
        short, long = keys.numbers("short_factor"), keys.numbers("long_factor")
        return LongRope(
            factors=long if served_len > trained_len else short,
            attention_factor=inferred if given is None else given,
        )


def _yarn_amplitude(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


SCALINGS = {
    "default": RopeReader.unscaled,
    "linear": RopeReader.linear,
    "dynamic": RopeReader.dynamic,
    "llama3": RopeReader.llama3,
    "yarn": RopeReader.yarn,
    "longrope": RopeReader.longrope,
}
