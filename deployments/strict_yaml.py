"""Reads a YAML or JSON file and refuses duplicate keys.

YAML's own loaders silently keep the last one.
"""

from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    _SafeLoader = yaml.SafeLoader
else:
    _SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C if libyaml is installed

MERGE = "tag:yaml.org,2002:merge"


class YamlMistake(ValueError):
    """The text is not one YAML document; the message names the mistake and its line."""


class StrictLoader(_SafeLoader):
    """A loader for `yaml.load` and `yaml.load_all` that refuses duplicate keys."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._checked: set[yaml.MappingNode] = set()

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Convert a node; name a value that cannot be converted, such as a date, and its place."""
        try:
            return super().construct_object(node, deep)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        except yaml.YAMLError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            what = f"{str(node.value)[:40]!r} cannot be read ({error}): put it in quotes"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from None

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Check the keys as written, before those of `<<` are inserted in front."""
        if node not in self._checked:
            self._checked.add(node)
            self._check(node)
        super().flatten_mapping(node)

    def _check(self, node: yaml.MappingNode) -> None:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # the loader itself refuses these
            if key in seen:
                mark = key_node.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} comes twice", mark)
            seen.add(key)


def read_yaml(path: Path) -> Any:
    """Read a file's only document. Raises OSError or YamlMistake."""
    try:
        return yaml.load(path.read_text(), StrictLoader)
    except UnicodeDecodeError:
        raise YamlMistake("it is not text") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise YamlMistake(f"{error.problem}{line}") from None
    except yaml.YAMLError:
        raise YamlMistake("it is neither YAML nor JSON") from None
    except RecursionError:
        raise YamlMistake("it is nested too deeply") from None
