"""Versions of the drafter on disk: immutable directories, checksums, and one atomic pointer to the serving one.

    drafters/
      v000000-base/             the drafter the operator configured, copied on first start
      v000001-head-1f00ba44/    manifest.json and the model files
      SERVING  PREVIOUS         names of versions
      WITHDRAWN                 names of versions that were rolled back by hand, one per line

The registry moves bytes; it never looks inside a model. One process owns it at a time.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from specblock.daemon.errors import CorruptVersionError, IncompatibleError
from specblock.daemon.manifest import (
    MANIFEST,
    Manifest,
    content_hash,
    is_version_name,
    list_files,
    parse_name,
    read_manifest,
    verify_files,
)

_LOG = logging.getLogger(__name__)
BASE_VERSION = "v000000-base"
_SERVING = "SERVING"
_PREVIOUS = "PREVIOUS"
_WITHDRAWN = "WITHDRAWN"
_TEMPORARY = ".tmp-"


def fsync_path(path: Path) -> None:
    """Flushes a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class DrafterRegistry:
    """The drafter versions of one state directory.

    Args:
        state_dir: versions live in ``state_dir/drafters``.
        clock: seconds since the epoch.
    """

    def __init__(self, state_dir: Path, clock: Callable[[], float] = time.time) -> None:
        self._root = state_dir / "drafters"
        self._clock = clock

    def import_base(self, base_path: Path, target_fingerprint: str = "") -> str:
        """Prepares the registry at daemon start: clears half-written versions, imports the base, picks the serving one.

        The serving version is the one of the last run if its checksums hold, else the newest that holds.

        Returns:
            The version to serve.

        Raises:
            IncompatibleError: ``base_path`` holds no drafter, or no stored version is intact.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        for left in self._root.glob(f"{_TEMPORARY}*"):
            _LOG.warning("removing the half-written drafter version %s", left)
            shutil.rmtree(left)
        if not (self._root / BASE_VERSION).exists():
            self._copy_base(base_path, target_fingerprint)
        return self._first_intact()

    def save(
        self,
        arm: str,
        parent: str,
        write: Callable[[Path], None],
        metadata: Mapping[str, Any] | None = None,
        *,
        target_fingerprint: str | None = None,
    ) -> str:
        """Stores a new version; it appears complete or not at all.

        Args:
            arm: the update that made it; becomes part of the name.
            parent: the version it was trained from.
            write: puts the model files into the empty directory it is given.
            metadata: plain JSON values, such as the decision id and measured gains.
            target_fingerprint: the target it was trained for; None takes the parent's.

        Returns:
            The new version's name. It does not serve until it is promoted.

        Raises:
            OSError: for example a full disk; nothing is left behind.
            ValueError: ``write`` left no file, or the arm's name cannot be part of a directory name.
        """
        number = 1 + max((parse_name(name) for name in self.names()), default=0)
        if target_fingerprint is None:
            target_fingerprint = self.show(parent).target_fingerprint
        return self._store(write, number, arm, parent, target_fingerprint, dict(metadata or {})).version

    def path(self, version: str) -> Path:
        """The directory of a version after its checksums were verified.

        Raises:
            CorruptVersionError: a file is missing or damaged; the message names it.
            IncompatibleError: no such version.
        """
        folder = self._folder(version)
        verify_files(folder, read_manifest(folder))
        return folder

    def show(self, version: str) -> Manifest:
        """The manifest of a version; its files are not read."""
        return read_manifest(self._folder(version))

    def list(self) -> tuple[Manifest, ...]:
        """Manifests of all versions, oldest first; unreadable ones are logged and left out."""
        found = []
        for name in self.names():
            try:
                found.append(read_manifest(self._root / name))
            except CorruptVersionError as error:
                _LOG.warning("left out of the list: %s", error)
        return tuple(found)

    def latest(self) -> str | None:
        """The newest version, None in an empty registry."""
        names = self.names()
        return names[-1] if names else None

    def serving(self) -> str | None:
        """The version that serves, or would serve after a restart; None before the first ``import_base``."""
        return self._read_pointer(_SERVING)

    def previous(self) -> str | None:
        """The version that served before; None if there was none."""
        return self._read_pointer(_PREVIOUS)

    def promote(self, version: str) -> None:
        """Makes a version the serving one after verifying it; the current one becomes the previous."""
        self.path(version)
        current = self.serving()
        if current == version:
            return
        if current is not None:
            self._write_pointer(_PREVIOUS, current)
        self._write_pointer(_SERVING, version)

    def rollback(self) -> str:
        """Goes back to the previous version and returns it; the present one is withdrawn, unless it is the base.

        Raises:
            IncompatibleError: there is none.
        """
        previous, present = self.previous(), self.serving()
        if previous is None:
            raise IncompatibleError("there is no previous drafter version to go back to")
        self.path(previous)
        withdrawn = [name for name in (*self.withdrawn(), present) if name and name not in (BASE_VERSION, previous)]
        self._write_pointer(_WITHDRAWN, "\n".join(dict.fromkeys(withdrawn)))
        self.promote(previous)
        return previous

    def withdrawn(self) -> tuple[str, ...]:
        """Versions that were rolled back by hand: they serve again only if somebody rolls back to them."""
        text = self._read_pointer(_WITHDRAWN)
        return tuple(text.split()) if text else ()

    def prune(self, keep: int) -> tuple[str, ...]:
        """Deletes all but the ``keep`` newest versions; never the base, the serving or the previous one.

        The newest always stays, so that numbers are never used twice.

        Returns:
            The deleted versions.
        """
        if keep < 1:
            raise ValueError("keep: must be at least 1")
        names = self.names()
        kept = {BASE_VERSION, self.serving(), self.previous(), *names[-keep:]}
        deleted = tuple(name for name in names if name not in kept)
        for name in deleted:
            # Renamed first, so that a crash in the middle leaves a temporary directory and no torn version.
            doomed = self._root / f"{_TEMPORARY}{name}"
            (self._root / name).rename(doomed)
            shutil.rmtree(doomed)
        return deleted

    def names(self) -> tuple[str, ...]:
        """Names of all versions, oldest first; nothing is read but the directory."""
        if not self._root.is_dir():
            return ()
        found = [path.name for path in self._root.iterdir() if path.is_dir() and is_version_name(path.name)]
        return tuple(sorted(found, key=parse_name))

    def _folder(self, version: str) -> Path:
        if not is_version_name(version) or not (self._root / version).is_dir():
            known = ", ".join(self.names()) or "none"
            raise IncompatibleError(f"no drafter version {version!r}; there are: {known}")
        return self._root / version

    def _store(
        self,
        write: Callable[[Path], None],
        number: int,
        arm: str,
        parent: str | None,
        target_fingerprint: str,
        metadata: dict[str, Any],
    ) -> Manifest:
        temporary = self._root / f"{_TEMPORARY}{number:06d}"
        temporary.mkdir(parents=True)
        try:
            write(temporary)
            files = list_files(temporary)
            if not files:
                raise ValueError("a drafter version needs at least one file")
            name = BASE_VERSION if parent is None else f"v{number:06d}-{arm}-{content_hash(files)}"
            parse_name(name)
            manifest = Manifest(
                version=name,
                parent=parent,
                arm=arm,
                created_at_unix_s=self._clock(),
                target_fingerprint=target_fingerprint,
                files=files,
                metadata=metadata,
            )
            (temporary / MANIFEST).write_bytes(manifest.encode())
            for path in temporary.rglob("*"):
                fsync_path(path)
            fsync_path(temporary)
            temporary.rename(self._root / name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_path(self._root)
        return manifest

    def _copy_base(self, base_path: Path, target_fingerprint: str) -> None:
        if not (base_path / "config.json").is_file():
            raise IncompatibleError(f"{base_path}: no drafter here (config.json is missing)")

        def copy(folder: Path) -> None:
            for path in sorted(base_path.iterdir()):
                if path.is_file() and path.name != MANIFEST:
                    shutil.copyfile(path, folder / path.name)

        self._store(copy, 0, "base", None, target_fingerprint, {"imported_from": str(base_path)})

    def _first_intact(self) -> str:
        """The serving version if it is intact, else the previous, else the newest intact one, else the base."""
        serving = self.serving()
        order = [serving, self.previous(), *reversed(self.names())] if serving else [BASE_VERSION]
        failures = []
        last = self.withdrawn()
        for version in sorted(dict.fromkeys(name for name in order if name), key=lambda name: name in last):
            try:
                self.path(version)
            except IncompatibleError as error:
                _LOG.error("drafter version %s cannot be used: %s", version, error)
                failures.append(str(error))
                continue
            if version != serving:
                self._write_pointer(_SERVING, version)
            if self.previous() == version:
                (self._root / _PREVIOUS).unlink()
            return version
        raise IncompatibleError("no stored drafter version is intact:\n" + "\n".join(failures))

    def _read_pointer(self, name: str) -> str | None:
        try:
            text = (self._root / name).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        return text or None

    def _write_pointer(self, name: str, version: str) -> None:
        temporary = self._root / f"{_TEMPORARY}{name}"
        try:
            temporary.write_text(f"{version}\n", encoding="utf-8")
            fsync_path(temporary)
            temporary.replace(self._root / name)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(self._root)
