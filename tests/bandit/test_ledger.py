"""The ledger file: append only, at most once per stage, repaired after a torn write."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specblock.bandit.config import PolicyConfig
from specblock.bandit.errors import LedgerError
from specblock.bandit.ledger import Ledger, LedgerRecord, read_balance, read_ledger, read_newest
from specblock.bandit.ledger_files import compress, next_part
from specblock.bandit.policy import decide
from specblock.bandit.replay import reproductions
from tests.bandit.test_policy import CONTEXT, checked
from tests.bandit.test_service import drive, make

DECISION, _ = decide(CONTEXT, checked(), PolicyConfig())


def record(number: int, stage: str = "decided", **changes: object) -> LedgerRecord:
    values: dict[str, object] = {"action": "probe", "time_s": 10.0 + number, **changes}
    return LedgerRecord(decision_id=f"d{number:06d}", stage=stage, **values)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bandit" / "ledger.jsonl"


def test_records_come_back_as_they_were(path: Path) -> None:
    ledger = Ledger(path)
    full = record(
        0,
        arm=DECISION.arm,
        verdict=DECISION.verdict,
        reason=DECISION.reason,
        options=DECISION.options,
        context=CONTEXT,
        numbers={"saving": 0.1 + 0.2},
    )
    ledger.append(full)
    ledger.append(record(0, "probing"))
    ledger.close()
    assert list(read_ledger(path)) == [full, record(0, "probing")]
    assert full.option() is not None and full.option().value.arm == DECISION.arm


def test_a_stage_is_recorded_once_even_after_a_restart(path: Path) -> None:
    ledger = Ledger(path)
    ledger.append(record(3))
    with pytest.raises(LedgerError, match="d000003"):
        ledger.append(record(3))
    ledger.close()
    again = Ledger(path)
    with pytest.raises(LedgerError, match="decided"):
        again.append(record(3))
    assert again.next_number == 4 and again.knows("d000003", "decided")
    again.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 400))
def test_a_torn_last_line_is_cut_off_wherever_it_is_torn(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "ledger.jsonl"
    path.unlink(missing_ok=True)
    ledger = Ledger(path)
    ledger.append(record(0))
    whole = path.stat().st_size
    ledger.append(record(1, reason="x" * 200))
    ledger.close()
    size = max(whole, path.stat().st_size - cut)
    with path.open("r+b") as file:
        file.truncate(size)
    assert [r.decision_id for r in read_ledger(path)] == ["d000000"], "a reader ignores it too"
    again = Ledger(path)
    assert again.repaired_bytes == size - whole and path.stat().st_size == whole
    again.append(record(1))
    assert [r.decision_id for r in again.records()] == ["d000000", "d000001"]
    again.close()


def test_damage_in_the_middle_is_refused_with_its_line(path: Path) -> None:
    ledger = Ledger(path)
    for i in range(3):
        ledger.append(record(i))
    ledger.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"decision_id": 7}\n' + lines[2])
    with pytest.raises(LedgerError, match=r"ledger\.jsonl:2"):
        Ledger(path)


def test_open_updates_are_those_that_act_and_have_not_ended(path: Path) -> None:
    ledger = Ledger(path)
    ledger.append(record(0, action="skip"))
    ledger.append(record(1))
    ledger.append(record(2, action="check_parity"))
    ledger.append(record(1, "probing"))
    assert [(r.decision_id, r.stage) for r in ledger.open_records()] == [
        ("d000001", "probing"),
        ("d000002", "decided"),
    ]
    ledger.append(record(1, "abandoned"))
    ledger.append(record(2, "checked", action="check_parity"))
    assert ledger.open_records() == () and ledger.open_record("d000001") is None
    ledger.close()


def test_the_balance_adds_up_and_survives_a_restart(path: Path) -> None:
    ledger = Ledger(path)
    ledger.append(record(0, action="skip"))
    ledger.append(record(1, arm=DECISION.arm, options=DECISION.options))
    ledger.append(record(1, "trained", charged_s=3.0))
    ledger.append(record(1, "promoted", charged_s=0.5, arm=DECISION.arm, options=DECISION.options))
    ledger.append(record(1, "settled", charged_s=1.0, numbers={"realised_s": 7.0}))
    ledger.append(record(1, "closed", numbers={"realised_s": 2.0}))
    balance = ledger.balance
    assert (balance.charged_s, balance.realised_s, balance.net_s) == (4.5, 9.0, 4.5)
    assert balance.predicted_s == DECISION.option().value.benefit
    assert (balance.decisions, balance.skips, balance.promoted, balance.rolled_back) == (2, 1, 1, 0)
    ledger.close()
    again = Ledger(path)
    assert again.balance == balance
    assert [r.stage for r in again.tail(2)] == ["settled", "closed"] and again.tail(0) == ()
    again.close()


def test_a_disk_that_refuses_leaves_the_file_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(path)
    ledger.append(record(0))
    size = path.stat().st_size

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("specblock.bandit.ledger.os.fsync", full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                ledger.append(record(1, reason="x" * 500))
    assert path.stat().st_size == size and not ledger.knows("d000001", "decided")
    ledger.append(record(1))
    ledger.close()
    assert [r.decision_id for r in read_ledger(path)] == ["d000000", "d000001"]


def test_opening_a_ledger_of_months_does_not_hold_it_in_memory(tmp_path: Path) -> None:
    _, service = make(tmp_path / "small")
    drive(_, service, 1000, 20)
    service.close(1020.0)
    path = tmp_path / "small" / "ledger.jsonl"
    skips = [line for line in path.read_bytes().splitlines(keepends=True) if b'"action":"skip"' in line]
    path.write_bytes(skips[-1] * 4000 + b'{"torn')
    size = path.stat().st_size
    tracemalloc.start()
    ledger = Ledger(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ledger.balance.decisions == 4000 and ledger.repaired_bytes == 6 and path.stat().st_size == size - 6
    assert peak < size / 4
    assert ledger.tail(1)[0].context is not None, "the inputs stay in the file"
    ledger.close()


# Closing a file that has grown large


def grown(path: Path, count: int, part_bytes: int = 4000) -> list[LedgerRecord]:
    """Skips, and in between updates that end; part_bytes makes a dozen of files of them."""
    ledger, written = Ledger(path, part_bytes), []
    for number in range(count):
        acts = number % 5 == 2
        stages = ("decided", "probing", "settled") if acts else ("decided",)
        for stage in stages:
            written.append(
                record(number, stage, action="probe" if acts else "skip", charged_s=0.5 * acts, reason="r" * 200)
            )
            ledger.append(written[-1])
    ledger.close()
    return written


def test_closed_files_are_read_as_if_it_were_one(path: Path) -> None:
    written = grown(path, 80)
    parts = sorted(path.parent.glob("ledger-*"))
    assert len(parts) > 5 and all(part.suffix == ".gz" for part in parts)
    assert path.stat().st_size < 3 * 4000, "the carried line and what came since"
    assert list(read_ledger(path)) == written
    for count in (1, 3, 40, len(written) + 5):
        assert list(read_newest(path, count)) == written[-count:]
    again = Ledger(path, 4000)
    assert again.next_number == 80 and again.knows("d000003", "decided")
    assert again.balance == read_balance(path) and again.balance.decisions == 80 and again.balance.charged_s == 24.0
    again.append(record(77, "closed", numbers={"realised_s": 2.0}))  # booked on an update of an earlier file
    with pytest.raises(LedgerError, match="closed"):
        again.append(record(77, "closed"))
    assert again.balance.realised_s == 2.0
    again.close()


def test_one_file_and_many_know_the_same(tmp_path: Path) -> None:
    grown(tmp_path / "one" / "ledger.jsonl", 60, 1 << 30)
    grown(tmp_path / "many" / "ledger.jsonl", 60)
    one, many = Ledger(tmp_path / "one" / "ledger.jsonl"), Ledger(tmp_path / "many" / "ledger.jsonl")
    assert many.balance == one.balance and many.charges == one.charges and many.last_record == one.last_record
    assert many.next_number == one.next_number and many.open_records() == one.open_records() == ()
    one.close()
    many.close()


def test_a_file_is_not_closed_amid_an_update(path: Path) -> None:
    ledger = Ledger(path, 1000)
    ledger.append(record(0))
    for look in range(20):
        ledger.append(record(0, f"gated-{look}", reason="r" * 200))
    assert not list(path.parent.glob("ledger-*")) and ledger.open_record("d000000") is not None
    ledger.append(record(0, "rejected"))
    assert [part.name for part in path.parent.glob("ledger-*")] == ["ledger-000001.jsonl.gz"]
    ledger.close()


def part(path: Path, number: int) -> Path:
    return path.with_name(f"ledger-{number:06d}.jsonl.gz")


@pytest.mark.parametrize("crash", ["before", "linked", "uncompressed", "half compressed"])
def test_a_crash_while_closing_loses_nothing(path: Path, crash: str) -> None:
    written = grown(path, 40)
    newest, new = part(path, len(list(path.parent.glob("ledger-*")))), path.with_name("ledger.jsonl.new")
    if crash in ("before", "linked"):  # the new file was written, and is not yet in place
        new.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    if crash == "linked":
        path.with_name(next_part(path)).hardlink_to(path)
    if "compressed" in crash:
        closed = newest.with_suffix("")
        closed.write_bytes(gzip.decompress(newest.read_bytes()))
        newest.unlink()
        if crash == "half compressed":
            closed.with_name(closed.name + ".partial").write_bytes(b"half")
    assert list(read_ledger(path)) == written, "whoever reads before the daemon is back"
    ledger = Ledger(path, 4000)
    assert list(read_ledger(path)) == written and not new.exists()
    more = [record(number, action="skip", reason="r" * 400) for number in range(40, 60)]
    for one in more:
        ledger.append(one)
    ledger.close()
    assert list(read_ledger(path)) == [*written, *more]
    assert all(file.suffix == ".gz" for file in path.parent.glob("ledger-*"))


def test_a_reader_that_began_before_a_file_was_closed_sees_every_line_once(path: Path) -> None:
    written = grown(path, 40)
    reading = read_ledger(path)
    seen = [next(reading) for _ in range(3)]
    ledger = Ledger(path, 4000)
    for number in range(40, 60):
        ledger.append(record(number, action="skip", reason="r" * 400))
    ledger.close()
    assert [*seen, *reading][: len(written)] == written


def test_a_part_that_was_taken_away_only_shortens_the_history(path: Path) -> None:
    written = grown(path, 60)
    part(path, 1).unlink()
    left = list(read_ledger(path))
    assert 0 < len(left) < len(written) and left == written[-len(left) :]
    assert read_balance(path).decisions == 60, "the balance is carried"
    part(path, 2).write_bytes(part(path, 2).read_bytes()[:50])
    with pytest.raises(LedgerError, match=r"ledger-000002\.jsonl\.gz: cannot be read"):
        list(read_ledger(path))


def test_parts_of_another_ledger_stay_what_they_are(path: Path) -> None:
    grown(path, 40)
    before = {file.name: file.read_bytes() for file in path.parent.glob("ledger-*")}
    path.unlink()  # somebody started afresh beside the old parts
    written = grown(path, 40)
    assert list(read_ledger(path)) == written
    assert {name: path.with_name(name).read_bytes() for name in before} == before


def test_a_booking_after_many_checks_is_remembered_across_files(path: Path) -> None:
    ledger = Ledger(path, 30_000)
    for stage in ("decided", "probing", "settled"):
        ledger.append(record(0, stage))
    for number in range(1, 90):
        ledger.append(record(number, action="check_parity"))
        ledger.append(record(number, "checked", action="check_parity"))
    ledger.append(record(0, "closed", numbers={"realised_s": 5.0}, reason="r" * 30_000))
    assert ledger.parts, "the booking closed the file"
    with pytest.raises(LedgerError, match="closed"):
        ledger.append(record(0, "closed", numbers={"realised_s": 5.0}))
    assert ledger.balance.realised_s == 5.0
    ledger.close()


def test_every_file_says_what_the_rule_knew(tmp_path: Path) -> None:
    _, service = make(tmp_path)
    service._ledger._part_bytes = service._ledger._roll_at = 20_000
    drive(_, service, 1000, 400)
    service.close(1400.0)
    path = tmp_path / "ledger.jsonl"
    assert len(service._ledger.parts) > 2
    reproduced = [r.reproduced for r in reproductions(read_ledger(path), PolicyConfig())]
    whole = len(reproduced)
    path.with_name(service._ledger.parts[1] + ".gz").unlink()
    left = [r.why for r in reproductions(read_ledger(path), PolicyConfig()) if not r.reproduced]
    assert whole > 100 and not [why for why in left if "not in the ledger" in why]


@pytest.mark.parametrize("call", ["link", "fsync"])
def test_a_disk_that_refuses_a_new_file_lets_the_old_one_grow(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    ledger = Ledger(path, 1000)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"specblock.bandit.ledger_files.os.{call}", full)
        for number in range(8):
            ledger.append(record(number, action="skip", reason="r" * 300), durable=False)
    assert not list(path.parent.glob("ledger-*")) and not path.with_name("ledger.jsonl.new").exists()
    for number in range(8, 12):
        ledger.append(record(number, action="skip", reason="r" * 300))
    ledger.close()
    assert list(path.parent.glob("ledger-*")) and [r.decision_id for r in read_ledger(path)][-1] == "d000011"


def test_compressed_parts_are_the_same_bytes_each_time(path: Path) -> None:
    grown(path, 30)
    packed = part(path, 1)
    before = packed.read_bytes()
    packed.with_suffix("").write_bytes(gzip.decompress(before))
    packed.unlink()
    compress(packed.with_suffix(""))
    assert packed.read_bytes() == before
