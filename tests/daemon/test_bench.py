"""What bench speed computes from runs, and that its page and table hold every row."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from specblock.daemon import bench_ablation, bench_load, bench_speed
from specblock.daemon.app import app
from specblock.daemon.bench_report import write_speed_report
from specblock.daemon.bench_rivals import RANDOM, random_network, settings_json, tuned_settings, weight_bytes
from specblock.daemon.bench_rows import (
    PLAIN,
    TRANSFORMERS,
    Row,
    WayName,
    acceptance_ratio,
    cycles_before_repeat,
    make_row,
    repeated_grams,
    speed_ratio,
)
from specblock.daemon.bench_speed import asked_for, interleaved, table
from specblock.daemon.bench_ways import Question, Run
from specblock.daemon.collect import Prompt
from specblock.daemon.errors import ConfigError
from specblock.drafter.config import DraftSettings, published_settings
from tests.daemon.test_engine import drafter_of, target_of


def a_run(kept: list[int], seconds: float, forwards: int = 0, drafting: int = 0) -> Run:
    rng = Random(len(kept))
    tokens = tuple(rng.randrange(1000) for _ in range(sum(kept)))
    return Run(tokens=tokens, kept=tuple(kept), seconds=seconds, forwards=forwards, drafting_cycles=drafting,
               draft_s=0.1, verify_s=0.2)  # fmt: skip


def test_repeated_grams_are_counted_within_one_text() -> None:
    assert repeated_grams([1, 2, 3, 4, 5, 6], 4) == 0
    assert repeated_grams([1, 2, 3, 4, 1, 2, 3, 4], 4) == pytest.approx(1 / 5)
    assert repeated_grams([7] * 10, 4) == pytest.approx(6 / 7)
    assert repeated_grams([1], 4) == 0


def test_cycles_before_the_first_repeated_8_gram() -> None:
    text = [*range(8), 99, *range(8), 5, 5]  # the second 8-gram ends at token 17
    run = Run(tokens=tuple(text), kept=(4, 5, 4, 3, 3), seconds=1.0)
    assert cycles_before_repeat(run) == 4  # 16 tokens end before it does
    fresh = Run(tokens=tuple(range(19)), kept=(4, 5, 4, 3, 3), seconds=1.0)
    assert cycles_before_repeat(fresh) == 5


def test_ratios_are_paired_over_prompts() -> None:
    base = [a_run([1] * 10, s) for s in (1.0, 2.0, 4.0)]
    twice = [a_run([2] * 5, s / 2) for s in (1.0, 2.0, 4.0)]
    value, (low, high) = speed_ratio(base, twice)
    assert value == pytest.approx(2) and low == pytest.approx(2) and high == pytest.approx(2)
    assert acceptance_ratio(base, twice)[0] == pytest.approx(2)
    uneven = [a_run([2] * 5, s) for s in (0.5, 2.0, 1.0)]
    value, (low, high) = speed_ratio(base, uneven)
    assert value == pytest.approx(7 / 3.5) and low < value < high


def rows() -> list[Row]:
    plain = [a_run([1] * 12, 1.0), a_run([1] * 12, 2.0)]
    drafted = [a_run([3, 1, 5, 3], 0.5, forwards=6, drafting=3), a_run([4, 4, 4], 1.0, forwards=3, drafting=3)]
    name = WayName("specblock", True, "cost_chosen")
    return [
        make_row(PLAIN, "python", 1.0, plain, plain, plain, None, (0, 0)),
        make_row(name, "python", 1.0, drafted, plain, plain, plain, (100, 70)),
    ]


def test_rows_pool_cycles_and_leave_out_the_last_one_of_each_answer() -> None:
    plain, row = rows()
    assert plain.acceptance_length == 1 and plain.ratio_to_plain == 1 and plain.ratio_to_eagle3_tuned is None
    assert row.acceptance_length == pytest.approx((3 + 1 + 5 + 4 + 4) / 5)
    assert row.forwards_per_cycle == pytest.approx(9 / 7)
    assert row.weight_bytes_per_cycle == pytest.approx((6 * 100 + 3 * 70) / 7)
    assert row.tokens_per_s == pytest.approx(24 / 1.5) and row.ratio_to_plain == pytest.approx(2)
    assert row.drafting_ms_per_cycle == pytest.approx(1e3 * 0.2 / 7)


def test_table_and_page_show_every_row(tmp_path: Path) -> None:
    made = rows()
    text = table({"commit": "abc"}, made)
    assert len(text.splitlines()) == 3 + len(made) and "cost_chosen" in text
    result = {"facts": {"commit": "abc<>"}, "drafters": {}, "rows": json.loads(json.dumps([asdict(r) for r in made]))}
    page = write_speed_report(tmp_path / "p.html", result).read_text()
    assert page.count("<tr") == 1 + len(made) and "<svg" in page and "abc&lt;&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")


def test_every_way_answers_every_prompt_once_after_a_warm_up() -> None:
    asked: dict[str, list[tuple[str, int]]] = {"a": [], "b": []}

    def way(name: str):  # type: ignore[no-untyped-def]
        def answer(prompt: Prompt, how: Question, seed: int) -> Run:
            asked[name].append((prompt.text, seed))
            return a_run([1, 1], 1.0)

        return answer

    prompts = [Prompt("python", str(i)) for i in range(5)]
    how = Question(temperature=1.0, top_p=0.95, new_tokens=2)
    names = {WayName("a"): way("a"), WayName("b"): way("b")}
    results = interleaved(names, prompts, how, Prompt("python", "warm"))
    assert [len(runs) for runs in results.values()] == [5, 5]
    assert asked["a"] == asked["b"] and asked["a"][0] == ("warm", 1)
    assert [text for text, _ in asked["a"][1:]] == ["0", "1", "2", "3", "4"]


def test_a_planner_learns_before_what_is_counted() -> None:
    asked: dict[str, list[str]] = {"fixed": [], "cost_chosen": []}

    def way(tree: str):  # type: ignore[no-untyped-def]
        def answer(prompt: Prompt, how: Question, seed: int) -> Run:
            asked[tree].append(prompt.text)
            return a_run([1, 1], 1.0)

        return answer

    how, counted = Question(temperature=1.0, top_p=0.95, new_tokens=2), [Prompt("python", "counted")]
    before = [Prompt("python", f"before {i}") for i in range(3)]
    names = {WayName("a", True, tree): way(tree) for tree in asked}
    results = interleaved(names, counted, how, before[0], before)
    assert asked == {"fixed": ["before 0", "counted"], "cost_chosen": ["before 0", "before 1", "before 2", "counted"]}
    assert all(len(runs) == 1 for runs in results.values())


def test_some_drafters_can_be_asked_for_and_what_ratios_are_to_stays() -> None:
    names = [
        PLAIN,
        TRANSFORMERS,
        WayName("eagle3", True, "fixed"),
        WayName("eagle3", True, "cost_chosen"),
        WayName("x"),
    ]
    ways: dict[WayName, Any] = {name: name for name in names}
    assert asked_for(ways, ()) == ways
    assert list(asked_for(ways, ["eagle3"])) == names[:4]
    with pytest.raises(ConfigError, match="no drafter nothing here; there are eagle3, plain, transformers_generate, x"):
        asked_for(ways, ["nothing"])


def test_what_is_asked_for_reaches_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    for bench in (bench_speed, bench_load):
        monkeypatch.setattr(bench, "run", lambda settings, as_json, say: asked.append(settings) or 0)
    told = ["--drafter", "eagle3", "--drafter", "x", "--threads", "3", "--temperature", "0.5", "--dtype", "float32"]
    assert CliRunner().invoke(app, ["bench", "speed", "--prompts", "7", *told]).exit_code == 0
    assert CliRunner().invoke(app, ["bench", "load", "--threads", "2", "--rounds", "4"]).exit_code == 0
    speed, load = asked
    assert (speed.drafters, speed.threads, speed.temperatures, speed.dtype) == (("eagle3", "x"), 3, (0.5,), "float32")
    assert (speed.per_domain, load.threads, load.rounds) == (7, 2, 4)


def test_a_random_drafter_has_the_shape_and_no_knowledge_and_disturbs_no_generator() -> None:
    target = target_of("llama", torch.float32, head_dim=16)
    like = drafter_of(target).model
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    one, other = random_network(target, like), random_network(target, like)
    assert torch.equal(torch.rand(3), wanted)
    shapes = {name: weight.shape for name, weight in like.named_parameters()}
    assert {name: weight.shape for name, weight in one.named_parameters()} == shapes
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, like.lm_head.weight)
    assert weight_bytes(WayName(RANDOM, True, "cost_chosen"), {"specblock": one})[0] > 0


def test_tuned_settings_survive_the_file(tmp_path: Path) -> None:
    best = {
        "specblock": DraftSettings(blocks=1, node_budget=7, noise_scale=1.4),
        "eagle3": published_settings("eagle3"),
    }
    text = json.dumps({"settings": {kind: settings_json(s) for kind, s in best.items()}})
    (tmp_path / "tuned.json").write_text(text)
    assert tuned_settings(tmp_path) == best
    assert tuned_settings(tmp_path / "nothing") == {}


def test_ablation_changes_one_thing_at_a_time() -> None:
    base = DraftSettings()
    named = bench_ablation.variants(base)
    assert named.pop(bench_ablation.BASE) == base
    assert len(set(map(str, named.values()))) == len(named)
    for tree in named.values():
        changed = {name for name in asdict(base) if getattr(tree, name) != getattr(base, name)}
        assert len(changed) == 1 or changed in ({"rank_head", "beam", "fan_out"}, {"first_caps", "other_caps"})


def test_ablation_rows_are_ratios_to_the_unchanged_drafter() -> None:
    base = [a_run([2] * 6, 1.0), a_run([2] * 6, 3.0)]
    better = [a_run([4] * 3, 0.5), a_run([4] * 3, 1.5)]
    row = bench_ablation.make_row("4 leaves", better, base)
    assert row.acceptance_length == pytest.approx(4) and row.acceptance_ratio == pytest.approx(2)
    assert row.speed_ratio == pytest.approx(2) and row.tokens_per_s == pytest.approx(12)
    assert "4 leaves" in bench_ablation.table([row])
