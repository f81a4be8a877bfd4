"""YAML files of settings: read one with the files that it inherits from, and remember the lines."""
from __future__ import annotations

import contextlib
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mindrlhf.cli import UserError, existing_file, shown
from mindrlhf.parallel import Settings


class Loader(yaml.SafeLoader):
    """yaml.SafeLoader for settings: plain keys and values, limited in number and depth.

    It reads 5e-7 as a number, which YAML 1.1 reads as a string, and dates as strings. It refuses a
    key that appears twice. Aliases count as many values as they stand for.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        self.counts: dict[int, int] = {}  # id of a complete node -> number of its values

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Read a node, or raise MarkedYAMLError if it is too large, too deep or contains itself."""
        mark = self.peek_event().start_mark
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"more than {DEEPEST} levels", problem_mark=mark)
        is_alias = self.check_event(yaml.AliasEvent)
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if not is_alias:
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in parts for part in pair]
            self.counts[id(node)] = 1 + sum(self.counts[id(part)] for part in parts)
        elif id(node) not in self.counts:
            raise yaml.MarkedYAMLError(problem="an alias inside its own anchor", problem_mark=mark)
        if self.counts[id(node)] > MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {MOST_VALUES} values, those of aliases "
                                       "included", problem_mark=mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Build a value, or raise MarkedYAMLError if its text does not fit its type."""
        if node.tag not in PLAIN_TAGS:
            problem = f"the tag {shown(node.tag)} is not supported"
        elif node.tag.endswith((":int", ":float")) and len(node.value) > LONGEST_NUMBER:
            problem = f"a number of more than {LONGEST_NUMBER} digits"
        else:
            with contextlib.suppress(ValueError, KeyError, IndexError, TypeError, OverflowError):
                return super().construct_object(node, deep)
            problem = f"{shown(node.value)} does not fit the tag {node.tag}"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a dict, or raise MarkedYAMLError if a key appears twice or is not a word."""
        if not isinstance(node, yaml.MappingNode):
            raise yaml.MarkedYAMLError(problem="keys and values expected",
                                       problem_mark=node.start_mark)
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if key_node.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem="a key must be a word",
                                           problem_mark=key_node.start_mark)
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"{shown(key)} appears twice",
                                           problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# limits of a YAML; ours have about 100 values in 4 levels
LARGEST_YAML, MOST_VALUES, DEEPEST, LONGEST_NUMBER = 1 << 20, 10_000, 20, 100
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}"
              for name in ("null", "bool", "int", "float", "str", "seq", "map")}
Loader.yaml_implicit_resolvers = {  # all but dates
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}
Loader.add_implicit_resolver("tag:yaml.org,2002:float",
                             re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


class Document(NamedTuple):
    """The content of a YAML and of the files that it inherits from.

    Attributes:
        settings: merged, without checks.
        origins: dotted key -> "file:line" of its value. A list is one value.
    """
    settings: Settings
    origins: dict[str, str]


def read_yaml(path: str | Path) -> Settings:
    """The settings of read_document()."""
    return read_document(path).settings


def read_document(path: str | Path, chain: tuple[Path, ...] = ()) -> Document:
    """Read a YAML and its base_config; keys and values are not checked.

    Args:
        path: the YAML.
        chain: the files whose base_config led here.

    Raises:
        UserError: a file is missing or not YAML, or a base_config leads back to itself.
    """
    path = Path(path)
    existing_file(path, f"the base_config of {chain[-1]}" if chain else "the YAML of --config")
    if path.resolve() in [link.resolve() for link in chain]:
        raise UserError(f"{path}: its base_config leads back to it; remove one base_config")
    if path.stat().st_size > LARGEST_YAML:
        raise UserError(f"{path}: has more than {LARGEST_YAML >> 20} MB; give a YAML of settings")
    own, node = _parse(path)
    if not isinstance(own, dict):
        raise UserError(f"{path}: expected keys and values, got {type(own).__name__}")
    base = own.pop("base_config", None)
    origins = {key: f"{path}:{line}" for key, line in _lines(node) if key != "base_config"}
    if base is None:
        return Document(own, origins)
    if not isinstance(base, str):
        raise UserError(f"{path}: base_config is {shown(base)}; give the name of one YAML file")
    inherited = read_document(path.parent / base, (*chain, path))
    kept = {key: place for key, place in inherited.origins.items()
            if not any(key == other or key.startswith(f"{other}.") for other in origins)}
    return Document(overlay(inherited.settings, own), {**kept, **origins})


def _parse(path: Path) -> tuple[Any, yaml.Node]:
    """The content of one file, and the node that it was made from.

    Raises:
        UserError: it is not YAML.
    """
    try:
        loader = Loader(path.read_text(encoding="utf-8"))
        node: Any = loader.get_single_node()
        # building it resolves the merge keys of the node in place
        return loader.construct_document(node) if node else None, node
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{place}: not YAML ({problem})") from None


def _lines(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Dotted keys of a mapping, and the lines where they are."""
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _lines(value, f"{prefix}{key.value}.")
        else:
            yield f"{prefix}{key.value}", key.start_mark.line + 1


def overlay(base: Settings, own: Settings) -> Settings:
    """Merge dicts into a new one: own wins, nested dicts are merged, lists are replaced."""
    merged = {key: overlay(value, {}) if isinstance(value, dict) else value
              for key, value in base.items()}
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = overlay(base[key], value) if both else value
    return merged
