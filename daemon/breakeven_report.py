"""The page of ``bench breakeven``: maps of net value over phase length, and tables, in one self-contained HTML file."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import pyplot

from specblock.daemon.breakeven import net_s
from specblock.daemon.breakeven_words import TRAIN, count, span, verb
from specblock.daemon.report_page import STYLE, inline_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE = STYLE + "tr.never td{color:#8a8f98}td.train{color:#1a7f37}"
_COLOURS = ("#1f6feb", "#bc4c00", "#1a7f37", "#8250df")
_PHASES_S = np.geomspace(60.0, 172_800.0, 200)
_TICKS_S = (60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0)
_LINEAR_S = 100.0  # net values within this of 0 are drawn to scale, the others logarithmically


def write_page(path: Path, result: dict[str, Any]) -> Path:
    """Writes the page from what ``bench breakeven --json`` prints; returns its path."""
    served = result["served"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>specblockd bench breakeven</title>",
        f"<style>{_STYLE}</style>",
        "<h1>When does an update of the drafter pay?</h1>",
        "<p>An update costs device-seconds once and saves a share of the serving device-seconds as long as its kind of "
        "text stays. Each line is one arm on one kind of text: net device-seconds won by a phase that goes on for so "
        "long after the swap, one device busy. Bands are 95 % intervals, bootstrapped over held-out conversations. "
        "Dots mark where an arm breaks even, triangles from where on the daemon's rule, told what was measured, "
        "trains.</p>",
        _maps(result["rows"]),
        f"<h2>Measured</h2>{_rows(result['rows'])}",
        "<h2>What the rule decides</h2><p>By expected time until traffic changes, with predicted net value in "
        "device-seconds; <i>trial only</i> would train and then be abandoned after its trial. <i>choice</i> is between "
        "all arms; <i>guess</i> is the same with the policy's first guesses of gain and cost instead of the "
        f"measurement.</p>{_ladder(result)}",
        f"<h2>Serving</h2><p>One request's cycle takes {1e3 * served['cycle_s']:.2f} ms by the cost curve and "
        f"{1e3 * served['live_cycle_s']:.2f} ms as accounted live. Replay against live: "
        f"{html.escape(served['parity']['verdict'])}, {served['parity']['difference']:+.2%} on "
        f"{served['parity']['conversations']} conversations.</p>",
        f"<h2>Measured with</h2><p><code>{html.escape(json.dumps(result['facts']))}</code></p></html>",
    ]
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _maps(rows: list[dict[str, Any]]) -> str:
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    height = -(-len(domains) // 2)
    figure, grid = pyplot.subplots(height, 2, figsize=(11, 3.6 * height), sharex=True, sharey=True, squeeze=False)
    for axes, domain in zip(grid.flat, domains, strict=False):
        own = [row for row in rows if row["domain"] == domain]
        for place, (row, colour) in enumerate(zip(own, _COLOURS, strict=False)):
            _draw(axes, row, colour, place)
        axes.axhline(0.0, color="#1c2330", linewidth=0.8)
        axes.set_title(domain, fontsize=10)
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=_LINEAR_S)
        axes.set_xticks(_TICKS_S, [span(s) for s in _TICKS_S])
        axes.tick_params(labelbottom=True)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper left", frameon=False)
        axes.set_xlabel("phase after the swap, serving device time", fontsize=8)
        axes.set_ylabel("net device-seconds", fontsize=8)
    for axes in list(grid.flat)[len(domains) :]:
        axes.set_visible(False)
    return inline_svg(figure)


def _draw(axes: Axes, row: dict[str, Any], colour: str, place: int) -> None:
    cost_s, (low, high) = row["cost_s"], row["saving_interval"]
    axes.plot(_PHASES_S, [net_s(row["saving"], cost_s, t) for t in _PHASES_S], color=colour, label=row["arm"])
    below, above = ([net_s(gain, cost_s, t) for t in _PHASES_S] for gain in (low, high))
    axes.fill_between(_PHASES_S, below, above, color=colour, alpha=0.12, linewidth=0)
    at = row["break_even_s"]
    if at is not None and at <= _PHASES_S[-1]:
        axes.plot([at], [0.0], "o", color=colour, markersize=6)
        shift = (8, -12 - 11 * place)  # lines may cross: their labels must not
        axes.annotate(span(at), (at, 0.0), xytext=shift, textcoords="offset points", fontsize=8, color=colour)
    starts = row["rule_trains_from_s"]
    if starts is not None and starts <= _PHASES_S[-1]:
        axes.plot([starts], [net_s(row["saving"], cost_s, starts)], "^", color=colour, markersize=7)


def _rows(rows: list[dict[str, Any]]) -> str:
    head = (
        "kind of text", "arm", "acceptance", "saves (95 %)", "after the trial", "others", "train s", "one scoring s",
        "swap ms", "cost, device-s", "pays after (95 %)", "requests (95 %)", "tokens", "rule trains from", "gate",
    )  # fmt: skip
    lines = ["<table><tr>" + "".join(f"<th>{title}" for title in head) + "</tr>"]
    for row in rows:
        low, high = row["saving_interval"]
        first, last = (span(s) for s in row["break_even_interval_s"])
        few, many = (count(n) for n in row["requests_interval"])
        cells = (
            row["domain"], row["arm"], f"{row['acceptance_old']:.2f} to {row['acceptance_new']:.2f}",
            f"{row['saving']:+.1%} [{low:+.1%}, {high:+.1%}]", f"{row['trial_saving']:+.1%}",
            ", ".join(f"{name} {saving:+.1%}" for name, saving in row["others"].items()), f"{row['train_s']:.1f}",
            f"{row['score_s']:.1f}", f"{1e3 * row['stall_s']:.1f}", f"{row['cost_s']:.0f}",
            f"{span(row['break_even_s'])} [{first}, {last}]", f"{count(row['requests'])} [{few}, {many}]",
            count(row["tokens"]), span(row["rule_trains_from_s"]), f"{row['gate']}: {row['gate_reason']}",
        )  # fmt: skip
        never = " class=never" if row["break_even_s"] is None else ""
        lines.append(f"<tr{never}>" + "".join(f"<td>{html.escape(str(cell))}" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _ladder(result: dict[str, Any]) -> str:
    regimes = list(dict.fromkeys(one["regime_s"] for one in result["rungs"]))
    lines = ["<table><tr><th>kind of text<th>arm" + "".join(f"<th>{span(s)}" for s in regimes) + "</tr>"]
    for domain in dict.fromkeys(one["domain"] for one in result["rungs"]):
        own = [one for one in result["arm_rungs"] if one["domain"] == domain]
        for arm in dict.fromkeys(one["arm"] for one in own):
            cells = [(verb(one), f"{one['net_s']:+.0f} s") for one in own if one["arm"] == arm]
            lines.append(_ladder_line(domain, arm, cells))
        both = [one for one in result["rungs"] if one["domain"] == domain]
        lines.append(_ladder_line(domain, "choice", [(verb(one), one["arm"]) for one in both]))
        guesses = [(verb({"action": one["guessed_action"]}), one["guessed_arm"]) for one in both]
        lines.append(_ladder_line(domain, "guess", guesses))
    return "\n".join([*lines, "</table>"])


def _ladder_line(domain: str, name: str, cells: list[tuple[str, str]]) -> str:
    made = "".join(
        f"<td{' class=train' if word == TRAIN else ''}>{html.escape(word)} {html.escape(text)}" for word, text in cells
    )
    return f"<tr><td>{html.escape(domain)}<td>{html.escape(name)}{made}</tr>"
