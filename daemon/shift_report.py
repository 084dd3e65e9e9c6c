"""The page of ``bench shift``: acceptance and balance over time, and the table, in one self-contained file."""

from __future__ import annotations

import html
import json
from bisect import bisect_left
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from specblock.daemon.report_page import STYLE, inline_svg

_COLOURS = ("#8a8f98", "#c2410c", "#7c3aed", "#1d6fb8", "#0f9d58", "#b45309", "#be123c", "#334155")
_COLUMNS = (
    ("net_tokens_per_s", "net tokens/s", "{:.1f}"),
    ("gross_tokens_per_s", "gross", "{:.1f}"),
    ("ratio_to_static", "x static", "{:.3f}"),
    ("acceptance_length", "acceptance", "{:.2f}"),
    ("updates", "updates", "{:.1f}"),
    ("trainings", "trainings", "{:.1f}"),
    ("rollbacks", "taken back", "{:.1f}"),
    ("cost_device_s", "cost, device-s", "{:.0f}"),
    ("recovered", "recovered phases", "{:.0%}"),
    ("recovery_requests", "after requests", "{:.0f}"),
    ("faults", "faults seen", "{:.0f}"),
)


def write_shift_report(path: Path, result: dict[str, Any]) -> Path:
    """Writes the page from what the command prints with ``--json``; returns its path."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>specblockd bench shift</title>",
        f"<style>{STYLE}</style><h1>Every policy on the same traffic</h1>",
        "<p>Text, drafters, training, scoring and swaps are real; time is simulated, and a cycle takes what the cost "
        "curve measured. Intervals are 95 %, over recorded conversations. Triangles: a version goes live.</p>",
        _plot(result),
        _table(result["rows"]),
        *_live(result.get("live", [])),
        f"<h2>Measured with</h2><p><code>{html.escape(json.dumps(result['facts']))}</code></p></html>",
    ]
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _plot(result: dict[str, Any]) -> str:
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(11, 7), sharex=True)
    for curve, colour in zip(result["curves"], _COLOURS * 2, strict=False):
        hours = curve["hours"]
        accepted = [float("nan") if one is None else one for one in curve["acceptance"]]
        above.plot(hours, accepted, color=colour, label=curve["policy"], linewidth=1.2)
        below.plot(hours, curve["balance_s"], color=colour, linewidth=1.2)
        spots = [min(bisect_left(hours, at), len(hours) - 1) for at in curve["promoted_hours"]]
        below.plot([hours[i] for i in spots], [curve["balance_s"][i] for i in spots], "^", color=colour, markersize=6)
    for number, domain in enumerate(result["phases"]):
        start = number * result["phase_hours"]
        for axes in (above, below):
            axes.axvline(start, color="#d5d9e0", linewidth=0.8, zorder=0)
        above.annotate(domain, (start, 1.01), xycoords=("data", "axes fraction"), fontsize=8)
    above.set_ylabel("acceptance length")
    above.legend(fontsize=8, frameon=False, ncols=4)
    below.set_ylabel("device-seconds saved, all costs charged")
    below.axhline(0.0, color="#1c2330", linewidth=0.8)
    below.set_xlabel("simulated hours")
    return inline_svg(figure)


def _live(rows: list[dict[str, Any]]) -> list[str]:
    """What a real engine made of the end of every phase, beside the replay; nothing where it was not asked."""
    if not rows:
        return []
    lines = [
        "<h2>Served again by a real engine</h2><p>Some conversations of every phase, by the version that served at its "
        "end; net tokens per device-second over those of doing nothing, every cost charged.</p>",
        "<table><tr><th>policy<th>seed<th>live<th>by replay<th>apart<th>conversations<th>accepted other drafts</tr>",
    ]
    for row in rows:
        apart = row["ratio"] / row["replayed_ratio"] - 1
        lines.append(
            f"<tr><td>{html.escape(row['policy'])}<td>{row['seed']}<td>{row['ratio']:.3f}<td>{row['replayed_ratio']:.3f}"
            f"<td>{apart:+.1%}<td>{row['conversations']}<td>{row['differ']}</tr>"
        )
    return [*lines, "</table>"]


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["<table><tr><th>policy" + "".join(f"<th>{title}" for _, title, _ in _COLUMNS) + "<th>x static, 95 %</tr>"]
    for row in rows:
        cells = ["-" if row[name] is None else form.format(row[name]) for name, _, form in _COLUMNS]
        low, high = row["ratio_interval"]
        lines.append(
            f"<tr><td>{html.escape(row['policy'])}"
            + "".join(f"<td>{cell}" for cell in cells)
            + f"<td>{low:.3f} to {high:.3f}</tr>"
        )
    return "\n".join([*lines, "</table>"])
