"""The page of ``bench speed``: tables and plots in one self-contained HTML file."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from specblock.daemon.report_page import STYLE, inline_svg

_STYLE = STYLE + "tr.weak td{color:#8a8f98}"
_COLUMNS = (
    ("acceptance_length", "accept", "{:.2f}"),
    ("acceptance_length_before_repeat", "before repeat", "{:.2f}"),
    ("repeated_4grams", "rep. 4-grams", "{:.2f}"),
    ("forwards_per_cycle", "forwards", "{:.1f}"),
    ("weight_bytes_per_cycle", "weights MB", "{:.1f}"),
    ("drafting_ms_per_cycle", "draft ms", "{:.2f}"),
    ("verify_ms_per_cycle", "verify ms", "{:.2f}"),
    ("tokens_per_s", "tokens/s", "{:.1f}"),
    ("ratio_to_plain", "x plain", "{:.2f}"),
    ("ratio_to_transformers", "x transformers", "{:.2f}"),
    ("ratio_to_eagle3_tuned", "x eagle3_tuned", "{:.2f}"),
)
_REPEATED_LIMIT = 0.2


def write_speed_report(path: Path, result: dict[str, Any]) -> Path:
    """Writes the page from what ``bench speed --json`` prints; returns its path."""
    rows: list[dict[str, Any]] = result["rows"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>specblockd bench speed</title>",
        f"<style>{_STYLE}</style>",
        "<h1>Drafters side by side</h1>",
        "<p>Same target, prompts, sampling and runtime; one request at a time, interleaved prompt by prompt. "
        "Acceptance length is committed tokens per cycle, pooled over cycles, bonus token included. Intervals are "
        "95 %, bootstrapped over prompts. Grey rows repeat themselves too much (more than a fifth of their 4-grams) to "
        "support a claim.</p>",
    ]
    for temperature in dict.fromkeys(row["temperature"] for row in rows):
        own = [row for row in rows if row["temperature"] == temperature]
        parts.append(f"<h2>Temperature {temperature}: tokens per second over plain decoding</h2>{_plot(own)}")
        for domain in dict.fromkeys(row["domain"] for row in own):
            parts.append(f"<h2>Temperature {temperature}, {html.escape(domain)}</h2>")
            parts.append(_table([row for row in own if row["domain"] == domain]))
    parts.append("<h2>Drafters</h2>")
    parts.append(f"<pre>{html.escape(json.dumps(result['drafters'], indent=1))}</pre>")
    parts.append(f"<h2>Measured with</h2><p><code>{html.escape(json.dumps(result['facts']))}</code></p></html>")
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _name(row: dict[str, Any]) -> str:
    noise = {None: "", True: ", shared noise", False: ""}[row["shared_noise"]]
    tree = ", cost-chosen" if row["tree"] == "cost_chosen" else ""
    return f"{row['drafter']}{noise}{tree}"


def _table(rows: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{title}" for _, title, _ in _COLUMNS)
    lines = [f"<table><tr><th>drafter{head}</tr>"]
    for row in rows:
        cells = "".join(f"<td>{_cell(row, key, form)}" for key, _, form in _COLUMNS)
        weak = " class=weak" if row["repeated_4grams"] > _REPEATED_LIMIT else ""
        lines.append(f"<tr{weak}><td>{html.escape(_name(row))}{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def _cell(row: dict[str, Any], key: str, form: str) -> str:
    value = row[key]
    if value is None:
        return "-"
    text = form.format(value / 1e6 if key == "weight_bytes_per_cycle" else value)
    interval = row.get(f"{key}_interval")
    return text if interval is None else f"{text} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _plot(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(_name(row) for row in rows))
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(10, 0.34 * len(names) + 1.2))
    height = 0.8 / len(domains)
    for place, domain in enumerate(domains):
        own = {_name(row): row for row in rows if row["domain"] == domain}
        at = [names.index(name) + (place - len(domains) / 2) * height for name in own]
        values = [row["ratio_to_plain"] for row in own.values()]
        low = [v - row["ratio_to_plain_interval"][0] for v, row in zip(values, own.values(), strict=True)]
        high = [row["ratio_to_plain_interval"][1] - v for v, row in zip(values, own.values(), strict=True)]
        axes.errorbar(values, at, xerr=[low, high], fmt="o", markersize=4, linewidth=1, label=domain)
    axes.axvline(1.0, color="#8a8f98", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second over plain decoding (95 % interval)")
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(axis="x", alpha=0.3)
    return inline_svg(figure)
