"""Held-out acceptance while a drafter trains: one JSON line per evaluation, and a plot of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One evaluation: after how many optimiser steps and labelled positions, and the acceptance length per domain."""

    step: int
    positions: int
    acceptance_length: dict[str, float]


def append_point(path: Path, point: CurvePoint) -> None:
    """Adds one line; later points of a run that was resumed from an earlier step simply follow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(point)) + "\n")


def read_points(path: Path) -> list[CurvePoint]:
    """The curve, ascending in steps; of points at the same step the last; a line cut off by a crash is left out."""
    points: dict[int, CurvePoint] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            point = CurvePoint(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            continue
        points[point.step] = point
    return [points[step] for step in sorted(points)]


def plot_curve(points: list[CurvePoint], path: Path, title: str) -> None:
    """Writes the curve as an SVG, one line per domain."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for domain in sorted({d for point in points for d in point.acceptance_length}):
        known = [(p.positions, p.acceptance_length[domain]) for p in points if domain in p.acceptance_length]
        axes.plot([x for x, _ in known], [y for _, y in known], marker="o", markersize=3, label=domain)
    axes.set_xlabel("labelled positions trained on")
    axes.set_ylabel("held-out acceptance length (exact replay)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, format="svg")
    pyplot.close(figure)
