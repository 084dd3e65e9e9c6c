"""Arguments of ``specblockd bench shift | stationary | fault``; what they ask for is imported when it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from specblock.daemon.cli_options import AsJson, ConfigFile, progress

USUAL, SMALL = {"conversations": 512, "heldout": 512}, {"conversations": 256, "heldout": 256}
STORIES = {
    "shift": "Every policy on text that changes its kind, with real drafters and real training in simulated time.",
    "stationary": "The same on text that stays as it is: what looking after a drafter costs if nothing is to be won.",
    "fault": "The same with a cache that slips: nothing may be trained, and the fault must be reported.",
}


def shift_command(story: str) -> Callable[..., int]:
    """The command that tells one story about traffic."""

    def run(
        prompts: Annotated[
            Path, typer.Option(help="Directory with DOMAIN.train.jsonl and DOMAIN.heldout.jsonl files.")
        ],
        config: ConfigFile = Path("configs/demo.yaml"),
        small: Annotated[bool, typer.Option("--small", help="Four policies, one round of phases, less text.")] = False,
        policy: Annotated[list[str] | None, typer.Option(help="Only this one; repeatable. Keep static.")] = None,
        phase: Annotated[list[str] | None, typer.Option(help="Kind of text of a phase, in order; repeatable.")] = None,
        hours: Annotated[float, typer.Option(min=0.01, max=48.0, help="Simulated hours of a phase.")] = 2.0,
        busy: Annotated[float, typer.Option(min=0.05, max=1.0, help="Share of the device that serving takes.")] = 0.65,
        seeds: Annotated[int, typer.Option(min=1, help="Runs, each with traffic of its own.")] = 1,
        conversations: Annotated[int | None, typer.Option(min=2, help="Per kind to train on; default 512.")] = None,
        heldout: Annotated[int | None, typer.Option(min=2, help="Per kind to serve and judge by; default 512.")] = None,
        tokens: Annotated[int | None, typer.Option(min=16, help="Per conversation; default 64.")] = None,
        live: Annotated[int, typer.Option(min=0, help="Conversations of every phase to serve live, too.")] = 64,
        out: Annotated[Path | None, typer.Option(help="Directory for the JSON.")] = None,
        as_json: AsJson = False,
    ) -> int:
        from specblock.daemon import bench_shift as bench
        from specblock.daemon.bench_breakeven_stage import Sizes

        sizes = Sizes(prompts=prompts).asked(**(SMALL if small else USUAL))
        sizes = sizes.asked(conversations=conversations, heldout=heldout, tokens=tokens)
        phases = tuple(phase or ()) or bench.PHASES[story]
        settings = bench.ShiftSettings(
            config=config,
            story=story,
            sizes=sizes,
            policies=tuple(policy or ()),
            phases=phases[: len(set(phases))] if small and not phase and story == "shift" else phases,
            hours=hours,
            busy=busy,
            seeds=seeds,
            live=live,
            out=out,
        )
        return bench.run(settings, small, as_json, progress(as_json))

    run.__doc__ = STORIES[story]
    return run
