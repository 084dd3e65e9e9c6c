"""Arguments of ``specblockd bench breakeven``; what they ask for is imported when it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from specblock.daemon.cli_options import AsJson, ConfigFile, progress


def breakeven(
    prompts: Annotated[Path, typer.Option(help="Directory with DOMAIN.train.jsonl and DOMAIN.heldout.jsonl files.")],
    config: ConfigFile = Path("configs/demo.yaml"),
    small: Annotated[bool, typer.Option("--small", help="32 conversations and 16 held out, 32 tokens.")] = False,
    conversations: Annotated[int | None, typer.Option(min=2, help="To train on, per kind; default 128.")] = None,
    heldout: Annotated[int | None, typer.Option(min=2, help="Held out, per kind; default 56.")] = None,
    tokens: Annotated[int | None, typer.Option(min=8, help="Generated per conversation; default 64.")] = None,
    domain: Annotated[list[str] | None, typer.Option(help="Kind of text, repeatable; default: all four.")] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts' choice, the text and the bootstrap.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Directory for breakeven.json and the page breakeven.html.")] = None,
    as_json: AsJson = False,
) -> int:
    """Measure for how long a kind of text must stay until an update of the drafter pays."""
    from specblock.daemon import bench_breakeven as bench
    from specblock.daemon.bench_breakeven_stage import Sizes

    sizes = Sizes(prompts=prompts, seed=seed).asked(**(bench.SMALL if small else {}))
    sizes = sizes.asked(conversations=conversations, heldout=heldout, tokens=tokens)
    if domain:
        sizes = replace(sizes, domains=tuple(domain))
    settings = bench.BreakEvenSettings(config=config, sizes=sizes, out=out)
    return bench.run(settings, as_json, progress(as_json))
