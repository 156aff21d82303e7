"""Select the modules that an adapter changes: target_modules and what goes with it, as in PEFT."""

from dataclasses import dataclass
from typing import Any, cast

from adapter_store.errors import AdapterInvalid
from adapter_store.patterns import Budget, Pattern, compile_pattern


@dataclass(frozen=True, slots=True)
class Targets:
    """Select the modules that PEFT would wrap."""

    modules: Pattern | frozenset[str]  # a pattern of whole names, or suffixes of names
    excluded: Pattern | frozenset[str]
    layers: frozenset[int]  # empty: all of them
    layer_patterns: tuple[Pattern, ...]

    def include(self, module: str) -> bool:
        """Check whether PEFT would wrap the module of this name."""
        if _names(self.excluded, module):
            return False
        if isinstance(self.modules, Pattern) or not self.layers or module in self.modules:
            return _names(self.modules, module)
        return _names(self.modules, module) and self._layer(module) in self.layers

    def _layer(self, module: str) -> int | None:
        for pattern in self.layer_patterns:
            if (layer := pattern.group(module, "idx")) is not None:
                return int(layer) if layer else None
        return None


def read_targets(config: dict[str, Any], budget: Budget) -> Targets:
    """Read the keys that select modules. Raises AdapterInvalid."""
    modules, layers = config.get("target_modules"), _layers(config.get("layers_to_transform"))
    if modules is None:
        raise AdapterInvalid("target_modules is missing: name the modules that the adapter changes")
    if config.get("layers_pattern") and config.get("layers_to_transform") is None:
        pattern = config["layers_pattern"]
        raise AdapterInvalid(f"layers_pattern={pattern!r} needs layers_to_transform, as in PEFT")
    if isinstance(modules, str) and layers:
        raise AdapterInvalid(f"layers_to_transform={layers} needs target_modules to be a list")
    layer_patterns = [
        _layer_pattern(pattern, rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", budget)
        for pattern in listed(config.get("layers_pattern") or [])
    ]
    return Targets(
        modules=_module_names("target_modules", modules, budget),
        excluded=_module_names("exclude_modules", config.get("exclude_modules") or [], budget),
        layers=frozenset(layers),
        layer_patterns=tuple(layer_patterns)
        or (_layer_pattern("", r".*?\.[^.]*\.(?P<idx>\d+)\.", budget),),
    )


def _layers(value: Any) -> list[int]:
    layers = [] if value is None else listed(value)
    if not all(type(layer) is int for layer in layers):
        raise AdapterInvalid(f"layers_to_transform={value!r} must be whole numbers")
    return layers


def _layer_pattern(pattern: Any, expression: str, budget: Budget) -> Pattern:
    return compile_pattern("layers_pattern", pattern, budget, expression)


def _module_names(key: str, value: Any, budget: Budget) -> Pattern | frozenset[str]:
    if isinstance(value, str):
        all_linear = key == "target_modules" and value.lower() == "all-linear"
        return compile_pattern(key, ".*" if all_linear else value, budget)
    if not all(isinstance(name, str) for name in listed(value)):
        raise AdapterInvalid(f"{key}={value!r} must be a list of module names or one pattern")
    return frozenset(listed(value))


def listed(value: Any) -> list[Any]:
    """Return the values of a list, or a single one as if it were in a list."""
    return cast("list[Any]", value) if isinstance(value, list) else [value]


def _names(names: Pattern | frozenset[str], module: str) -> bool:
    """Match as PEFT does: a pattern the whole name, a listed name all of it or its last parts."""
    if isinstance(names, Pattern):
        return names.fullmatch(module)
    parts = module.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))
