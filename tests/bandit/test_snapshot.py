"""Snapshots are whole or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specblock.bandit.errors import SnapshotError
from specblock.bandit.snapshot import SnapshotStore


def test_the_newest_is_loaded_and_two_are_kept(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    assert store.load() is None
    for text in ("one", "two", "three"):
        store.save(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-000000002.snap", "state-000000003.snap"]
    again = SnapshotStore(tmp_path).load()
    assert again is not None and again.text == "three" and again.refused == ()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7), cut=st.booleans())
def test_any_damage_to_the_newest_falls_back_to_the_one_before(
    tmp_path: Path, position: int, bit: int, cut: bool
) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    store = SnapshotStore(tmp_path)
    store.save("before")
    path = store.save('{"after": 12345}')
    data = bytearray(path.read_bytes())
    position %= len(data)
    data[position] ^= 1 << bit
    path.write_bytes(bytes(data[:position]) if cut else bytes(data))
    loaded = SnapshotStore(tmp_path).load()
    assert loaded is not None and loaded.text == "before"
    assert len(loaded.refused) == 1 and path.name in loaded.refused[0]


def test_when_none_is_whole_it_says_so(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    for text in ("one", "two"):
        store.save(text).write_text("garbage")
    with pytest.raises(SnapshotError, match="no snapshot is whole"):
        SnapshotStore(tmp_path).load()


def test_a_half_written_temporary_file_is_ignored(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    store.save("whole")
    (tmp_path / "state-000000002.tmp").write_text("half")
    loaded = SnapshotStore(tmp_path).load()
    assert loaded is not None and loaded.text == "whole"
    assert SnapshotStore(tmp_path).save("next").name == "state-000000002.snap"


def test_the_number_goes_on_after_a_refused_snapshot(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    store.save("one")
    store.save("two").write_text("garbage")
    again = SnapshotStore(tmp_path)
    again.save("three")
    loaded = SnapshotStore(tmp_path).load()
    assert loaded is not None and loaded.text == "three"
