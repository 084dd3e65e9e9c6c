from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specblock.daemon import bench_tune
from specblock.daemon.bench_tune import TuneSettings, run
from specblock.daemon.collect import Prompt


def test_the_finalists_other_prompts_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the search 20 nodes look best by luck; measured again they are not, and 12 win."""
    lucky = {2: 1.0, 4: 2.0, 7: 3.0, 12: 4.0, 20: 5.0, 31: 0.5}
    honest = lucky | {20: 0.5}
    asked: list[set[str]] = []

    def measured(_target: Any, _network: Any, candidates: Any, prompts: list[Prompt], *_: Any) -> Any:
        asked.append({p.text for p in prompts})
        final = asked[-1] != asked[0]
        speeds = honest if final else lucky
        return [(c, speeds[c.node_budget] + (0 if c.noise_scale == 0.7 else -0.1)) for c in candidates]

    for name, value in (("_measured", measured), ("load_target", lambda *_: None)):
        monkeypatch.setattr(bench_tune, name, value)
    monkeypatch.setattr(bench_tune.rivals, "RIVALS", tmp_path)
    monkeypatch.setattr(bench_tune.rivals, "warm", lambda _target: None)
    monkeypatch.setattr(bench_tune.rivals, "networks", lambda _target: {"parallel": None})
    (tmp_path / "python.train.jsonl").write_text(
        "".join(json.dumps({"domain": "python", "prompt": str(i)}) + "\n" for i in range(8))
    )
    said: list[str] = []
    assert run(TuneSettings(prompts=tmp_path, per_domain=2, domains=("python",), dtype="float32"), said.append) == 0
    assert json.loads((tmp_path / "tuned.json").read_text())["settings"]["parallel"]["node_budget"] == 12
    assert asked[-1].isdisjoint(asked[0]) and "node_budget -> 20" in said[0]
