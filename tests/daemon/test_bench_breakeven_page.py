"""From measurements to JSON, lines and page: every arm and every rung is there, and the page needs nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from specblock.daemon.bench_breakeven import as_plain, findings
from specblock.daemon.bench_breakeven_measure import Measured, Served, judged_on, newest_last
from specblock.daemon.breakeven_ladder import LADDER_S
from specblock.daemon.breakeven_report import write_page
from specblock.daemon.breakeven_words import lines, span, verb
from specblock.drafter.window import Window
from tests.daemon.test_bench_breakeven import PARITY, POLICY, an_update
from tests.drafter.helpers import random_window

DOMAINS = ("python", "cpp")


def measured() -> Measured:
    updates = [
        replace(
            an_update(saved=saved, arm=arm),
            domain=domain,
            trial=replace(one.trial, rows=tuple(replace(r, domain=domain) for r in one.trial.rows)),
            final=replace(one.final, rows=tuple(replace(r, domain=domain) for r in one.final.rows)),
        )
        for domain, saved in zip(DOMAINS, (-3, 4), strict=True)
        for arm in ("head", "full")
        for one in [an_update(saved=saved, arm=arm)]
    ]
    served = Served(
        version="v000000-base",
        cycle_s=0.02,
        live_cycle_s=0.025,
        acceptance={"python": 2.2, "cpp": 1.8},
        cycles=dict.fromkeys(DOMAINS, 900),
        tokens_per_request=dict.fromkeys(DOMAINS, 60.0),
        num_train=dict.fromkeys(DOMAINS, 64),
        num_heldout=dict.fromkeys(DOMAINS, 32),
        parity=PARITY,
        parity_s=3.0,
    )
    return Measured(served=served, updates=tuple(updates))


@pytest.fixture
def result() -> dict[str, object]:
    found = findings(measured(), POLICY, 0)
    plain: dict[str, object] = json.loads(json.dumps(as_plain(found, measured(), {"commit": "abc"})))
    return plain


def test_every_arm_of_every_kind_has_a_row_and_a_ladder(result: dict[str, list[dict[str, object]]]) -> None:
    keys = [(row["domain"], row["arm"]) for row in result["rows"]]
    assert keys == [(d, a) for d in DOMAINS for a in ("head", "full")]
    assert len(result["arm_rungs"]) == 4 * len(LADDER_S) and len(result["rungs"]) == 2 * len(LADDER_S)
    never = [row for row in result["rows"] if row["domain"] == "python"]
    assert all(row["break_even_s"] is None and row["rule_trains_from_s"] is None for row in never)
    pays = [row for row in result["rows"] if row["domain"] == "cpp"]
    assert all(row["rule_trains_from_s"] > row["break_even_s"] for row in pays)  # type: ignore[operator]
    # Tokens are priced by the cost curve and the acceptance of their kind of text.
    assert pays[0]["s_per_token_old"] == pytest.approx(0.02 / 1.8)
    replayed = result["conversations"][-1]["tokens_old_trial_new"]["cpp"]  # type: ignore[index]
    assert len(replayed) == 32 and replayed[0].split()[0] == "64"


def test_lines_and_page_show_them(result: dict[str, object], tmp_path: Path) -> None:
    text = "\n".join(lines(result))
    assert text.count("never [never, never]") == 2 and text.count("choice  ") == 2 and "train full" in text
    page = write_page(tmp_path / "p.html", result).read_text()
    assert page.count("<tr") == 1 + 4 + 1 + 2 * 4 and "<svg" in page and page.count("class=never") == 2
    outside = page.replace("http://www.w3.org", "").replace("http://purl.org", "")
    assert "http" not in outside.replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")


def test_lengths_of_time_and_verbs() -> None:
    assert [span(s) for s in (None, 12.0, 300.0, 5400.0, 172_800.0)] == ["never", "12 s", "5 min", "1.5 h", "2 d"]
    assert verb({"action": "skip", "after_trial": ""}) == "skip"
    assert verb({"action": "probe", "after_trial": "continue"}) == "train"
    assert verb({"action": "probe", "after_trial": "abandon"}) == "trial only"


def test_the_phase_comes_last_and_what_it_may_forget_is_judged() -> None:
    def own(domain: str, count: int) -> list[Window]:
        return [replace(random_window(i), conversation_id=f"{domain}-{i}", domain=domain) for i in range(count)]

    windows = {domain: own(domain, 8) for domain in ("python", "cpp", "manual")}
    order = newest_last(windows, "cpp")
    assert [w.domain for w in order[-8:]] == ["cpp"] * 8 and len(order) == 24
    assert {w.domain for w in order[-10:-8]} == {"python", "manual"}, "a limit on positions must leave some of each"
    judged = judged_on(windows, "cpp")
    assert [w.domain for w in judged] == ["cpp"] * 8 + ["python"] * 2 + ["manual"] * 2
