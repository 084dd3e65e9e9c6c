"""Dataclasses to plain JSON values and back, checked against the annotations.

One codec for wire events, snapshots and the ledger: what is written is what the type says, floats survive exactly
(Python prints the shortest decimal that reads back to the same bits), and a wrong type is an error that names its path.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")
_SCALARS = (float, int, str, type(None))


def to_plain(value: Any) -> Any:
    """``value`` as nested dicts, lists and scalars. Sets are not supported: they have no order."""
    if isinstance(value, _SCALARS):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: to_plain(getattr(value, name)) for name in _names(type(value))}
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def dumps(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces; NaN and infinities are refused."""
    return json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON, hexadecimal."""
    return hashlib.sha256(dumps(value).encode()).hexdigest()


def loads(kind: type[T], text: str, *, ignore_unknown: bool = False) -> T:
    """Parse JSON ``text`` into ``kind``.

    Raises:
        ValueError: not JSON, or a field is missing, unknown (unless ignored) or of the wrong type; the path is named.
    """
    result: T = from_plain(kind, json.loads(text), ignore_unknown=ignore_unknown)
    return result


def from_plain(kind: Any, data: Any, path: str = "$", *, ignore_unknown: bool = False) -> Any:
    """Build ``kind`` from plain values; see :func:`loads`."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, data, path, ignore_unknown)
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _optional(kind, data, path, ignore_unknown)
    if origin in (tuple, list):
        return _sequence(kind, origin, data, path, ignore_unknown)
    if origin is dict:
        item = typing.get_args(kind)[1]
        _expect(isinstance(data, dict), path, "an object", data)
        return {k: from_plain(item, v, f"{path}.{k}", ignore_unknown=ignore_unknown) for k, v in data.items()}
    return data if kind is Any else _scalar(kind, data, path)


@functools.cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _expect(holds: bool, path: str, what: str, data: Any) -> None:
    if not holds:
        raise ValueError(f"{path}: expected {what}, got {type(data).__name__}")


def _dataclass(kind: Any, data: Any, path: str, ignore_unknown: bool) -> Any:
    _expect(isinstance(data, dict), path, "an object", data)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(fields))
    if unknown and not ignore_unknown:
        raise ValueError(f"{path}: unknown field {unknown[0]!r}")
    hints = _hints(kind)
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = from_plain(hints[name], data[name], f"{path}.{name}", ignore_unknown=ignore_unknown)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{path}: field {name!r} is missing")
    return kind(**values)


def _optional(kind: Any, data: Any, path: str, ignore_unknown: bool) -> Any:
    if data is None:
        return None
    inner = [arg for arg in typing.get_args(kind) if arg is not type(None)]
    assert len(inner) == 1, "only X | None is supported"
    return from_plain(inner[0], data, path, ignore_unknown=ignore_unknown)


def _sequence(kind: Any, origin: Any, data: Any, path: str, ignore_unknown: bool) -> Any:
    _expect(isinstance(data, list), path, "a list", data)
    args = typing.get_args(kind)
    if origin is tuple and Ellipsis not in args:
        _expect(len(data) == len(args), path, f"a list of {len(args)} values", data)
        kinds = list(args)
    else:
        kinds = [args[0]] * len(data)
    items = [
        from_plain(k, item, f"{path}[{i}]", ignore_unknown=ignore_unknown)
        for i, (k, item) in enumerate(zip(kinds, data, strict=True))
    ]
    return tuple(items) if origin is tuple else items


def _scalar(kind: Any, data: Any, path: str) -> Any:
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    exact = isinstance(data, kind) and (kind is bool or not isinstance(data, bool))
    _expect(exact, path, kind.__name__, data)
    return data
