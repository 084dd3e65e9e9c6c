"""Reads a policy file into ``DaemonConfig`` and reports every problem at once, each with its place in the file."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from specblock.daemon.config import DaemonConfig
from specblock.daemon.config_types import redact_url
from specblock.daemon.config_yaml import Document, Loc, Position, dotted, parse
from specblock.daemon.errors import ConfigError

_YAML_1_1_BOOLEANS = frozenset({"yes", "no", "on", "off", "y", "n"})


@dataclass(frozen=True, slots=True)
class _Problem:
    where: Position
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def load_config(path: Path, overrides: Sequence[str] = ()) -> DaemonConfig:
    """Reads, overrides and checks a policy file.

    Args:
        path: the YAML file.
        overrides: ``a.b=value`` strings; the value is YAML.

    Raises:
        ConfigError: one line ``file:line:column: dotted.path: message`` per problem.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return parse_config(text, str(path), overrides)


def parse_config(text: str, source: str, overrides: Sequence[str] = ()) -> DaemonConfig:
    """Like ``load_config`` for text that is already in memory."""
    document = parse(text, source)
    if document.data is None and document.problems:
        raise ConfigError(document.problems)
    if not isinstance(document.data, dict):
        raise ConfigError(f"{document.value_position(())}: the file must hold sections such as target: and drafter:")
    for override in overrides:
        _apply_override(document, override)
    try:
        config = DaemonConfig.model_validate(document.data)
    except ValidationError as error:
        found = sorted(
            (problem for detail in error.errors(include_url=False) for problem in _explain(document, detail)),
            key=lambda problem: (problem.where.source != source, problem.where.line, problem.where.column),
        )
        raise ConfigError([*document.problems, *map(str, found)]) from None
    if document.problems:
        raise ConfigError(document.problems)
    return config


def _explain(document: Document, detail: ErrorDetails) -> list[_Problem]:
    loc: Loc = tuple(detail["loc"])
    kind = detail["type"]
    if kind == "extra_forbidden":
        return [_Problem(document.key_position(loc), f"{dotted(loc)}: unknown key{_suggestion(loc)}")]
    if kind == "missing":
        where = document.key_position(loc[:-1])
        return [_Problem(where, f"{dotted(loc)}: required, but not given")]
    message = detail["msg"].removeprefix("Value error, ")
    if kind == "value_error" and (not loc or message.startswith(f"{dotted(loc)}.")):
        # Rules across fields name the path they are about, one rule per line.
        rules = [line.partition(": ") for line in message.splitlines()]
        return [_Problem(document.value_position(tuple(path.split("."))), f"{path}: {rule}") for path, _, rule in rules]
    given = detail["input"]
    if isinstance(given, str) and kind.startswith("bool") and given.lower() in _YAML_1_1_BOOLEANS:
        message += "; write true or false"
    if loc == ("redis", "url") and isinstance(given, str):
        given = redact_url(given)
    hidden = isinstance(given, dict | list | BaseModel) or loc == ("http", "api_key")
    shown = "" if hidden else f" (got {given!r})"
    return [_Problem(document.value_position(loc), f"{dotted(loc)}: {message}{shown}")]


def _suggestion(loc: Loc) -> str:
    section = _section_at(loc[:-1])
    names = [] if section is None else [info.alias or name for name, info in section.model_fields.items()]
    close = difflib.get_close_matches(str(loc[-1]), names, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; this section knows {', '.join(names)}" if names else ""


def _section_at(loc: Loc) -> type[BaseModel] | None:
    section: type[BaseModel] | None = DaemonConfig
    for part in loc:
        if isinstance(part, int):
            continue  # a list element: the list's item type was already entered
        field = section.model_fields.get(part) if section is not None else None
        section = _model_in(field.annotation) if field is not None else None
    return section


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for inner in get_args(annotation) if (model := _model_in(inner))), None)


def _apply_override(document: Document, override: str) -> None:
    """Writes one ``a.b=value`` into the document; what is wrong with it is added to the problems."""
    path, equals, text = override.partition("=")
    position = Position(f"--set {override}", 0, 0)
    parts: Loc = tuple(int(part) if part.isdigit() else part for part in path.strip().split("."))
    if not equals or "" in parts:
        document.problems.append(f"{position}: write it as section.key=value")
        return
    value = parse(text, position.source)
    document.problems.extend(value.problems)
    target = _container(document.data, parts[:-1])
    last = parts[-1]
    if isinstance(target, list) and isinstance(last, int) and last < len(target):
        target[last] = value.data
    elif isinstance(target, dict):
        target[str(last)] = value.data
    else:
        document.problems.append(f"{position}: {dotted(parts)}: nothing there to set")
        return
    for table in (document.keys, document.values):
        for loc in [loc for loc in table if loc[: len(parts)] == parts]:
            del table[loc]
        table[parts] = position


def _container(data: Any, parts: Loc) -> Any:
    """The mapping or list at ``parts``; missing sections are made on the way."""
    for part in parts:
        if isinstance(data, dict):
            if data.get(str(part)) is None:
                data[str(part)] = {}
            data = data[str(part)]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            return None
    return data


def write_yaml(config: DaemonConfig) -> str:
    """The resolved configuration as YAML text, secrets redacted."""
    return str(yaml.safe_dump(config.resolved(), sort_keys=False))
