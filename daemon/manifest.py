"""``manifest.json`` of a stored drafter version: what it is, where it came from and what its files must hash to."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specblock.daemon.errors import CorruptVersionError

MANIFEST = "manifest.json"
_FORMAT = 1
_NAME = re.compile(r"v(\d{6,})-([a-z0-9_]+)(?:-([0-9a-f]{8}))?")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """One file of a version: path relative to the version's directory, SHA-256 in hex, size in bytes."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything the registry knows about one version.

    Attributes:
        version: its name and directory, ``v000012-head-1f00ba44``.
        parent: the version it was trained from; None for the base drafter.
        arm: the update that made it; ``base`` for the shipped drafter.
        created_at_unix_s: seconds since the epoch, from the registry's clock.
        target_fingerprint: identifies the target it was trained for; empty if unknown.
        files: every file of the version, manifest excluded.
        metadata: decision id, metrics and the like; plain JSON values.
    """

    version: str
    parent: str | None
    arm: str
    created_at_unix_s: float
    target_fingerprint: str
    files: tuple[StoredFile, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """The running number in the version's name."""
        return parse_name(self.version)

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(file.size_bytes for file in self.files)

    def encode(self) -> bytes:
        """The file's content."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=2, sort_keys=True).encode() + b"\n"


def parse_name(version: str) -> int:
    """The running number of a version name.

    Raises:
        ValueError: not a version name.
    """
    match = _NAME.fullmatch(version)
    if match is None:
        raise ValueError(f"{version!r} is no version name; they look like v000012-head-1f00ba44")
    return int(match[1])


def is_version_name(name: str) -> bool:
    """True for directory names that hold versions."""
    return _NAME.fullmatch(name) is not None


def read_manifest(folder: Path) -> Manifest:
    """Reads a version's manifest without checking the files it lists.

    Raises:
        CorruptVersionError: missing, unreadable, of another format, or for another directory.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_bytes())
        if data.pop("format") != _FORMAT:
            raise ValueError(f"format is not {_FORMAT}")
        data["files"] = tuple(StoredFile(**file) for file in data["files"])
        manifest = Manifest(**data)
    except FileNotFoundError:
        raise CorruptVersionError(f"{path}: missing") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptVersionError(f"{path}: not a readable manifest: {error}") from None
    if manifest.version != folder.name:
        raise CorruptVersionError(f"{path}: describes {manifest.version}, not {folder.name}")
    return manifest


def list_files(folder: Path) -> tuple[StoredFile, ...]:
    """Every regular file below ``folder`` except the manifest, hashed, in path order."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder) != Path(MANIFEST))
    return tuple(
        StoredFile(path=path.relative_to(folder).as_posix(), sha256=hash_file(path), size_bytes=path.stat().st_size)
        for path in paths
    )


def hash_file(path: Path) -> str:
    """SHA-256 of a file in hex, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def content_hash(files: tuple[StoredFile, ...]) -> str:
    """Eight hex digits that identify the content of a version."""
    return hashlib.sha256("".join(f"{file.path}\0{file.sha256}\0" for file in files).encode()).hexdigest()[:8]


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Checks size and hash of every listed file.

    Raises:
        CorruptVersionError: names the first file that is missing or differs.
    """
    for file in manifest.files:
        path = folder / file.path
        try:
            size_bytes = path.stat().st_size
            if size_bytes != file.size_bytes:
                raise CorruptVersionError(f"{path}: {size_bytes} bytes, the manifest says {file.size_bytes}")
            if hash_file(path) != file.sha256:
                raise CorruptVersionError(f"{path}: content does not match the manifest's SHA-256")
        except OSError as error:
            raise CorruptVersionError(f"{path}: {error.strerror}") from None
