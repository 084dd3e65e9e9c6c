"""Drafter versions on disk: complete or absent, verified when opened, recoverable after damage."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from specblock.daemon import registry as registry_module
from specblock.daemon.errors import CorruptVersionError, ExitCode, IncompatibleError
from specblock.daemon.registry import BASE_VERSION, DrafterRegistry


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        self.now_s += 1
        return self.now_s


def writer(content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(content)
        (folder / "config.json").write_text("{}")

    return write


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    writer(b"base weights")(folder)
    return folder


@pytest.fixture
def registry(tmp_path: Path, base: Path) -> DrafterRegistry:
    registry = DrafterRegistry(tmp_path, Clock())
    assert registry.import_base(base, "fp") == BASE_VERSION
    return registry


def test_first_start_copies_the_base(registry: DrafterRegistry, base: Path) -> None:
    (base / "model.safetensors").unlink()
    assert (registry.path(BASE_VERSION) / "model.safetensors").read_bytes() == b"base weights"
    manifest = registry.show(BASE_VERSION)
    assert (manifest.parent, manifest.arm, manifest.target_fingerprint) == (None, "base", "fp")
    assert manifest.created_at_unix_s == 101.0
    assert registry.serving() == BASE_VERSION and registry.previous() is None


def test_add_promote_rollback(registry: DrafterRegistry, tmp_path: Path, base: Path) -> None:
    first = registry.save("head", BASE_VERSION, writer(b"one"), metadata={"decision": "d1", "gain": 0.1})
    assert first.startswith("v000001-head-") and registry.show(first).metadata["gain"] == 0.1
    assert registry.show(first).target_fingerprint == "fp", "inherited from the parent"
    assert registry.serving() == BASE_VERSION, "adding does not promote"
    registry.promote(first)
    second = registry.save("rank_head", first, writer(b"two"))
    registry.promote(second)
    registry.promote(second)
    assert (registry.serving(), registry.previous()) == (second, first)
    assert registry.latest() == second
    assert registry.rollback() == first
    assert (registry.serving(), registry.previous()) == (first, second)
    assert [manifest.number for manifest in registry.list()] == [0, 1, 2]
    again = DrafterRegistry(tmp_path)
    assert again.import_base(base) == first, "a restart serves the same version"
    assert again.show(first) == registry.show(first)


def test_rollback_without_a_previous(registry: DrafterRegistry) -> None:
    with pytest.raises(IncompatibleError, match="no previous"):
        registry.rollback()


@pytest.mark.parametrize("name", ["v000009-head-00000000", "../base", "v1", ""])
def test_unknown_versions(registry: DrafterRegistry, name: str) -> None:
    with pytest.raises(IncompatibleError, match="no drafter version") as caught:
        registry.path(name)
    assert caught.value.exit_code == ExitCode.INCOMPATIBLE


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "no manifest", "format"])
def test_damage_is_refused_and_the_last_good_version_serves(
    registry: DrafterRegistry, tmp_path: Path, base: Path, damage: str
) -> None:
    good = registry.save("head", BASE_VERSION, writer(b"good"))
    bad = registry.save("head", good, writer(b"evil"))
    registry.promote(good)
    registry.promote(bad)
    folder = tmp_path / "drafters" / bad
    model, manifest = folder / "model.safetensors", folder / "manifest.json"
    expected = manifest if damage in ("manifest", "no manifest", "format") else model
    if damage == "flip":
        model.write_bytes(b"evim")
    elif damage == "truncate":
        model.write_bytes(b"ev")
    elif damage == "remove":
        model.unlink()
    elif damage == "manifest":
        manifest.write_bytes(manifest.read_bytes()[:40])
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 2}))
    with pytest.raises(CorruptVersionError) as caught:
        registry.path(bad)
    assert str(expected) in str(caught.value)
    with pytest.raises(CorruptVersionError):
        DrafterRegistry(tmp_path).promote(bad)
    fresh = DrafterRegistry(tmp_path)
    assert fresh.import_base(base) == good
    assert (fresh.serving(), fresh.previous()) == (good, None)


def test_nothing_intact(registry: DrafterRegistry, tmp_path: Path, base: Path) -> None:
    (tmp_path / "drafters" / BASE_VERSION / "model.safetensors").write_bytes(b"x")
    with pytest.raises(IncompatibleError, match=r"model\.safetensors"):
        DrafterRegistry(tmp_path).import_base(base)


def test_no_base_drafter(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match=r"config\.json is missing"):
        DrafterRegistry(tmp_path).import_base(tmp_path / "nowhere")


def test_a_pointer_to_a_deleted_version(registry: DrafterRegistry, tmp_path: Path, base: Path) -> None:
    (tmp_path / "drafters" / "SERVING").write_text("v000077-head-12345678\n")
    assert DrafterRegistry(tmp_path).import_base(base) == BASE_VERSION


def test_a_full_disk_leaves_no_half_version(registry: DrafterRegistry, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        registry.save("head", BASE_VERSION, write)
    assert sorted(path.name for path in (tmp_path / "drafters").iterdir()) == ["SERVING", BASE_VERSION]
    assert registry.save("head", BASE_VERSION, writer(b"ok")).startswith("v000001-")


def test_a_full_disk_at_the_flush(registry: DrafterRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(registry_module, "fsync_path", full)
        with pytest.raises(OSError, match="No space left"):
            registry.save("head", BASE_VERSION, writer(b"x"))
    version = registry.save("head", BASE_VERSION, writer(b"y"))
    with monkeypatch.context() as patch:
        patch.setattr(registry_module, "fsync_path", full)
        with pytest.raises(OSError, match="No space left"):
            registry.promote(version)
    assert registry.serving() == BASE_VERSION, "a pointer that was not flushed was not moved"
    assert not list((tmp_path / "drafters").glob(".tmp-*"))


def test_a_crash_while_writing_is_cleared_at_start(registry: DrafterRegistry, tmp_path: Path, base: Path) -> None:
    torn = tmp_path / "drafters" / ".tmp-000001"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    fresh = DrafterRegistry(tmp_path)
    fresh.import_base(base)
    assert not torn.exists()
    assert fresh.save("head", BASE_VERSION, writer(b"x")).startswith("v000001-")


@pytest.mark.parametrize("arm", ["../up", "Head", "a b", ""])
def test_arm_names_stay_inside_the_registry(registry: DrafterRegistry, arm: str) -> None:
    with pytest.raises(ValueError, match="no version name"):
        registry.save(arm, BASE_VERSION, writer(b"x"))


def test_a_version_needs_files(registry: DrafterRegistry) -> None:
    with pytest.raises(ValueError, match="at least one file"):
        registry.save("head", BASE_VERSION, lambda folder: None)


def test_what_was_rolled_back_by_hand_is_withdrawn_until_somebody_wants_it_again(registry: DrafterRegistry) -> None:
    first = registry.save("head", BASE_VERSION, writer(b"1"))
    second = registry.save("head", first, writer(b"2"))
    registry.promote(first)
    registry.promote(second)
    assert registry.withdrawn() == ()
    assert registry.rollback() == first and registry.withdrawn() == (second,)
    assert registry.rollback() == second and registry.withdrawn() == (first,), "twice: there and back again"
    registry.promote(BASE_VERSION)
    assert registry.rollback() == second and registry.withdrawn() == (first,), "the base may always serve"


def test_prune_keeps_base_serving_and_previous(registry: DrafterRegistry) -> None:
    names = [registry.save("head", BASE_VERSION, writer(b"%d" % i)) for i in range(6)]
    registry.promote(names[0])
    registry.promote(names[2])
    assert registry.prune(keep=1) == (names[1], names[3], names[4])
    assert [manifest.version for manifest in registry.list()] == [BASE_VERSION, names[0], names[2], names[5]]
    assert registry.prune(keep=99) == ()
    with pytest.raises(ValueError, match="at least 1"):
        registry.prune(keep=0)
    assert registry.save("head", BASE_VERSION, writer(b"z")).startswith("v000007-"), "numbers are never used twice"


def test_lists_leave_out_what_cannot_be_read(
    registry: DrafterRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = registry.save("head", BASE_VERSION, writer(b"x"))
    (tmp_path / "drafters" / name / "manifest.json").write_text("{")
    assert [manifest.version for manifest in registry.list()] == [BASE_VERSION]
    assert name in caplog.text
