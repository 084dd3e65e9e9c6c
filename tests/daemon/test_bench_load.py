"""``bench load``: both ways answer the same prompts with the same text, and every second is counted once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from specblock.daemon.bench_load import CHOSEN, PLAIN, LoadRow, LoadSettings, Round, _row, run
from specblock.daemon.messages import RequestStats


def stats(tokens: int, cycles: int, drafting: int, drafts: int) -> RequestStats:
    return RequestStats(
        prompt_tokens=3, completion_tokens=tokens, cycles=cycles, draft_tokens=drafts, accepted_tokens=tokens - cycles,
        acceptance_histogram=(), queue_s=0.0, prefill_s=0.0, decode_s=0.0, drafter_version="", drafting_cycles=drafting,
    )  # fmt: skip


def test_figures_are_pooled_and_ratios_paired_by_round() -> None:
    plain = [
        Round(2.0, [(1, 2), (3, 4)], [stats(2, 2, 0, 0)] * 2, [0.1, 0.3], [0.5, 0.5], [0.5, 0.5]) for _ in range(3)
    ]
    chosen = [Round(1.0, [(1, 2), (3, 5)], [stats(2, 1, 1, 4)] * 2, [0.1, 0.1], [0.2, 0.2], [0.2]) for _ in range(3)]
    own, other = _row(PLAIN, 2, plain, plain), _row(CHOSEN, 2, chosen, plain)
    assert (own.tokens_per_s, other.tokens_per_s) == (2.0, 4.0)
    assert (own.ratio_to_plain, other.ratio_to_plain) == (1.0, 2.0) and other.ratio_to_plain_interval == (2.0, 2.0)
    assert (own.acceptance_length, other.acceptance_length, other.nodes) == (1.0, 2.0, 4.0)
    assert (own.drafting_share, other.drafting_share) == (0.0, 1.0)
    assert own.different_answers == 0 and other.different_answers == 3
    assert own.first_token_ms_p50 == pytest.approx(200) and other.per_token_ms_p95 == pytest.approx(200)


def test_a_run_with_the_demo_models(tmp_path: Path) -> None:
    said: list[str] = []
    few = LoadSettings(concurrency=(2,), rounds=2, new_tokens=6, per_client=1, learning_prompts=1)  # or drafting is off
    settings = replace(few, dtype="float32", out=tmp_path)
    assert run(settings, True, said.append) == 0
    found = json.loads((tmp_path / "load.json").read_text())
    assert json.loads(said[-1]) == found and found["facts"]["dtype"] == "float32" and found["facts"]["commit"]
    rows = [LoadRow(**row) for row in found["rows"]]
    assert [(row.concurrency, row.way) for row in rows] == [(2, PLAIN), (2, CHOSEN)]
    assert rows[0].acceptance_length == 1.0 and rows[0].drafting_share == 0.0
    assert rows[1].acceptance_length >= 1.0 and rows[1].drafting_share > 0
    for row in rows:
        assert row.tokens_per_s > 0 and row.per_token_ms_p50 <= row.per_token_ms_p95
        assert row.different_answers == 0, "text never depends on the drafter"
