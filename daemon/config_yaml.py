"""YAML text as plain data plus the position of every key and value.

PyYAML's own loader follows YAML 1.1: ``off`` becomes a boolean, ``1e-4`` a string, and a repeated key silently wins.
Here scalars follow YAML 1.2 (only ``true`` and ``false`` are booleans) and repeated keys are reported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

Loc = tuple[str | int, ...]

# What PyYAML gives to plain nodes; anything else was written by hand and would be ignored.
_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp", "merge", "value")
}
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_HEX_OCT = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a source, 1-based; line 0 stands for the whole source (a command-line override)."""

    source: str
    line: int = 1
    column: int = 1

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source

    @classmethod
    def of(cls, source: str, mark: yaml.Mark | None) -> Position:
        """The position of a PyYAML mark."""
        return cls(source) if mark is None else cls(source, mark.line + 1, mark.column + 1)


@dataclass(slots=True)
class Document:
    """Plain data with, for every dotted path, where its key and its value stand."""

    source: str
    data: Any = None
    keys: dict[Loc, Position] = field(default_factory=dict)
    values: dict[Loc, Position] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def key_position(self, loc: Loc) -> Position:
        """Where the key at ``loc`` stands, or the closest enclosing one."""
        return self._closest(self.keys, loc)

    def value_position(self, loc: Loc) -> Position:
        """Where the value at ``loc`` stands, or the closest enclosing one."""
        return self._closest(self.values, loc)

    def _closest(self, table: dict[Loc, Position], loc: Loc) -> Position:
        if loc in table:
            return table[loc]
        for end in range(len(loc), -1, -1):
            found = self.keys.get(loc[:end]) or self.values.get(loc[:end])
            if found:
                return found
        return Position(self.source)


def dotted(loc: Loc) -> str:
    """``("adaptation", "arms", 0)`` as ``adaptation.arms.0``."""
    return ".".join(str(part) for part in loc)


def parse_scalar(text: str) -> Any:
    """A plain YAML 1.2 scalar as a Python value."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    if _HEX_OCT.fullmatch(text):
        return int(text, 0)
    return float(text) if _FLOAT.fullmatch(text) else text


def parse(text: str, source: str) -> Document:
    """Parses YAML text.

    Args:
        text: the file's content.
        source: its name, for messages.

    Returns:
        The document; ``problems`` holds malformed YAML (then ``data`` is None), repeated keys, tags and loops.
    """
    document = Document(source)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        where = Position.of(source, error.problem_mark or error.context_mark)
        context = f" ({error.context})" if error.context else ""
        document.problems.append(f"{where}: not valid YAML: {error.problem}{context}")
    except yaml.reader.ReaderError as error:
        head = text[: error.position]
        where = Position(source, head.count("\n") + 1, error.position - (head.rfind("\n") + 1) + 1)
        document.problems.append(f"{where}: not valid YAML: {error.reason}")
    else:
        if root is not None:
            document.data = _build(document, root, (), ())
    return document


def _build(document: Document, node: yaml.Node, loc: Loc, above: tuple[yaml.Node, ...]) -> Any:
    where = Position.of(document.source, node.start_mark)
    document.values[loc] = where
    if node.tag not in _TAGS:
        document.problems.append(f"{where}: {dotted(loc)}: the tag {node.tag} is not supported")
    if any(node is parent for parent in above):
        document.problems.append(f"{where}: {dotted(loc)}: this alias contains itself")
        return None
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        return [_build(document, item, (*loc, index), above) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(document, node, loc, above)
    assert isinstance(node, yaml.ScalarNode)
    return parse_scalar(node.value) if node.style is None else node.value


def _build_mapping(document: Document, node: yaml.MappingNode, loc: Loc, above: tuple[yaml.Node, ...]) -> Any:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where = Position.of(document.source, key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append(f"{where}: {dotted(loc)}: a key must be plain text")
            continue
        key = str(key_node.value)
        inner = (*loc, key)
        if key in result:
            first = document.keys[inner]
            document.problems.append(f"{where}: {dotted(inner)}: repeated key, first given at line {first.line}")
            continue
        document.keys[inner] = where
        result[key] = _build(document, value_node, inner, above)
    return result
