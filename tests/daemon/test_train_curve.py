"""The curve of a training run survives crashes and resumes, and is drawn."""

from __future__ import annotations

from pathlib import Path

from specblock.daemon.train_curve import CurvePoint, append_point, plot_curve, read_points


def point(step: int, value: float) -> CurvePoint:
    return CurvePoint(step=step, positions=1000 * step, acceptance_length={"python": value, "cpp": value / 2})


def test_a_resumed_run_keeps_one_point_per_step(tmp_path: Path) -> None:
    path = tmp_path / "run" / "heldout.jsonl"
    assert read_points(path) == []
    for step, value in ((10, 1.5), (20, 1.8), (10, 1.6)):
        append_point(path, point(step, value))
    with path.open("a") as file:
        file.write('{"step": 30, "posi')
    assert read_points(path) == [point(10, 1.6), point(20, 1.8)]


def test_the_plot_names_every_domain(tmp_path: Path) -> None:
    plot_curve([point(10, 1.5), point(20, 1.8)], tmp_path / "curve.svg", "specblock")
    text = (tmp_path / "curve.svg").read_text()
    assert text.lstrip().startswith("<?xml") and "<svg" in text
    assert "python" in text and "cpp" in text
