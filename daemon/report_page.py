"""What the self-contained pages have in common: the look of the measurements' pages, and figures as inline SVG."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1c2330}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2rem}svg{width:100%;height:auto}
table{border-collapse:collapse;font-size:13px}td,th{padding:.2rem .7rem .2rem 0;text-align:right;
border-bottom:1px solid #e4e7ec}td:first-child,th:first-child{text-align:left}code{background:#f3f4f6}
"""


def inline_svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element, without the XML prologue; the figure is closed."""
    buffer = io.StringIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg")
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
