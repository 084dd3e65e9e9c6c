"""The ledger file: append only, at most once per stage, repaired after a torn write."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specblock.bandit.config import PolicyConfig
from specblock.bandit.errors import LedgerError
from specblock.bandit.ledger import Ledger, LedgerRecord, read_ledger
from specblock.bandit.policy import decide
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
