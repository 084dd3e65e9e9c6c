"""The page of ``bench swap``: memory and stalls, swap by swap, in one self-contained file."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from specblock.daemon.report_page import STYLE, inline_svg


def write_swap_report(path: Path, result: dict[str, Any]) -> Path:
    """Writes the page from what the command prints with ``--json``; returns its path."""
    [row] = result["rows"]
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(11, 6), sharex=True)
    numbers = range(1, len(result["stall_ms"]) + 1)
    above.plot(numbers, result["resident_mib"], color="#1d6fb8", linewidth=1.0)
    above.set_ylim(0, 1.2 * max(result["resident_mib"]))
    above.set_ylabel("resident memory, MiB")
    below.plot(numbers, result["stall_ms"], color="#c2410c", linewidth=0.8, label="stall")
    below.axhline(row["cycle_ms"], color="#1c2330", linewidth=0.8, label="a cycle")
    below.set_ylim(bottom=0)
    below.set_ylabel("ms")
    below.set_xlabel("swap")
    below.legend(fontsize=8, frameon=False)
    cells = "".join(f"<tr><td>{html.escape(name)}<td>{value:.6g}</tr>" for name, value in row.items())
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>specblockd bench swap</title>",
        f"<style>{STYLE}</style><h1>Other drafter weights while requests run</h1>",
        inline_svg(figure),
        f"<table>{cells}</table>",
        f"<h2>Measured with</h2><p><code>{html.escape(json.dumps(result['facts']))}</code></p></html>",
    ]
    path.write_text("\n".join(parts), encoding="utf-8")
    return path
