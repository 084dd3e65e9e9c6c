"""Scalar types of the configuration: byte sizes, paths, probabilities and secrets in URLs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def parse_bytes(value: object) -> object:
    """Turns ``"256MiB"`` into 268435456; leaves anything that is not text alone.

    Raises:
        ValueError: the text is no size.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise ValueError("not a size in bytes; write a whole number or a number with KiB, MiB, GiB, KB, MB or GB")
    return int(float(match[1]) * factor)


def _parse_path(value: object) -> object:
    if not isinstance(value, str):
        return value
    if not value:
        raise ValueError("a path must not be empty")
    return Path(value).expanduser()


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, no conversion between types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


ByteSize = Annotated[int, BeforeValidator(parse_bytes)]
ConfigPath = Annotated[Path, BeforeValidator(_parse_path)]
Strings = Annotated[tuple[str, ...], BeforeValidator(_tuple)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]
Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=1)]


def redact_url(url: str) -> str:
    """The URL with user and password, and any query (it may name key files), replaced by ``***``."""
    base, question, _ = url.partition("?")
    scheme, separator, rest = base.partition("://")
    credentials, at, host = rest.rpartition("@")
    return scheme + separator + ("***@" if at and credentials else "") + host + ("?***" if question else "")
