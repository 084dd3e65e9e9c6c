"""The demo's page: one HTML file with two plots, the figures and the decisions in words."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import pyplot

from specblock.bandit.explain import explain
from specblock.daemon.demo_summary import Run
from specblock.daemon.report_page import inline_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_BIN = 24
_COLOURS = {"static": "#8a8f98", "adaptive": "#1f6feb"}
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:2rem auto;padding:0 1rem;color:#1c2330}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2rem}svg{width:100%;height:auto}
table{border-collapse:collapse}td,th{padding:.25rem .9rem .25rem 0;text-align:left;border-bottom:1px solid #e4e7ec}
ol{padding-left:1.2rem}li{margin:.3rem 0}code{background:#f3f4f6;padding:0 .25rem}"""


def write_report(path: Path, static: Run, adaptive: Run, facts: dict[str, Any]) -> Path:
    """Writes the page; returns its path."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>specblockd demo</title><style>{_STYLE}</style>",
        "<h1>specblockd: adaptation on a traffic shift</h1>",
        "<p>The drafter has learned python and manual pages. The traffic is python, then C++, then JavaScript, at "
        "temperature 1.0 and top-p 0.95. Both runs are live, on the same prompts and seeds: <b>static</b> keeps the "
        "shipped drafter, <b>adaptive</b> may retrain it. Training, scoring, probing, stalls and interference are "
        "charged to adaptive, although the interference is also in its measured serving time.</p>",
        _figures(facts),
        "<h2>Acceptance length (tokens per cycle, bonus included)</h2>",
        _plot(static, adaptive, "acceptance"),
        "<h2>Net tokens per device-second, all costs charged</h2>",
        _plot(static, adaptive, "net"),
        "<h2>Decisions</h2><ol>",
        *(f"<li>{html.escape(explain(r))}</li>" for r in adaptive.records),
        "</ol><h2>Measured with</h2>",
        f"<p><code>{html.escape(json.dumps(facts['facts']))}</code></p></html>",
    ]
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _figures(facts: dict[str, Any]) -> str:
    rows = []
    for name in ("static", "adaptive"):
        one = facts[name]
        rows.append(
            f"<tr><td>{name}<td>{one['net_tokens_per_s']:.1f}<td>{one['tokens']}<td>{one['serving_s']:.0f}"
            f"<td>{one['charged_s']:.0f}</tr>"
        )
    table = (
        "<table><tr><th>run<th>net tokens/s<th>tokens<th>serving, device-s<th>adaptation, device-s</tr>"
        + "".join(rows)
        + "</table>"
    )
    lines = [
        f"<li>{domain}: {row['static_acceptance']:.2f} static, {row['adaptive_acceptance']:.2f} adaptive on "
        f"{row['requests']} fresh prompts "
        f"({row['gain']:+.1%}, 95 % interval {row['lower']:+.1%} to {row['upper']:+.1%})"
        for domain, row in facts["fresh_prompts"].items()
        if "gain" in row
    ]
    promoted = ", ".join(facts["promoted"]) or "none"
    gains = f"<ul>{''.join(lines)}</ul>" if lines else "<p>No fresh prompt was answered by an updated drafter.</p>"
    return f"<p>Updates promoted: <b>{html.escape(promoted)}</b></p>{table}<p>Live acceptance length:</p>{gains}"


def _plot(static: Run, adaptive: Run, what: str) -> str:
    figure, axes = pyplot.subplots(figsize=(9.6, 3.4))
    for run in (static, adaptive):
        x, y = _series(run, what)
        axes.plot(x, y, label=run.name, color=_COLOURS[run.name], linewidth=2)
    _landmarks(axes, adaptive)
    axes.set_xlabel("requests answered")
    axes.set_ylim(bottom=0 if what == "net" else 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return inline_svg(figure)


def _series(run: Run, what: str) -> tuple[list[int], list[float]]:
    x, y = [], []
    for start in range(0, len(run.answers) - _BIN // 2, _BIN):
        part = run.answers[start : start + _BIN]
        tokens = sum(a.tokens for a in part)
        x.append(start + len(part))
        if what == "acceptance":
            y.append(tokens / sum(a.cycles for a in part))
            continue
        before = run.answers[start - 1] if start else None
        serving = part[-1].serving_s - (before.serving_s if before else 0.0)
        charged = part[-1].charged_s - (before.charged_s if before else 0.0)
        y.append(tokens / max(1e-9, serving + charged))
    return x, y


def _landmarks(axes: Axes, run: Run) -> None:
    """Borders between kinds of text, and the first answer of every new version."""
    seen: set[str] = set()
    domain = ""
    top = axes.get_ylim()[1]
    for index, answer in enumerate(run.answers):
        if answer.question.domain != domain:
            domain = answer.question.domain
            axes.axvline(index, color="#d0d5dd", linewidth=1)
            axes.text(index + 1, top, domain, va="top", color="#667085")
        if answer.version not in seen:
            if seen:
                axes.axvline(index, color="#1a7f37", linestyle="--", linewidth=1)
                axes.text(index + 1, top * 0.9, answer.version, va="top", color="#1a7f37", fontsize=8)
            seen.add(answer.version)
