"""``specblockd bench``: arguments of the measurements; each is imported when it runs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from specblock.daemon.breakeven_command import breakeven
from specblock.daemon.cli_options import AsJson, ConfigFile, command, progress
from specblock.daemon.shift_command import STORIES, shift_command

bench_app = typer.Typer(help="Measurements.", no_args_is_help=True)


@bench_app.command("speed")
@command
def bench_speed(
    small: Annotated[
        bool, typer.Option("--small", help="Three short answers per kind of text, one temperature.")
    ] = False,
    prompts: Annotated[int, typer.Option(min=2, help="Held-out prompts per kind of text (--small: 3).")] = 40,
    temperature: Annotated[list[float] | None, typer.Option(help="One table each; default 1.0, 0.8 and 0.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads, for all ways alike.")] = 1,
    drafter: Annotated[
        list[str] | None, typer.Option(help="Only this drafter's rows, repeatable; plain and transformers stay.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for speed.json and the page speed.html.")] = None,
    as_json: AsJson = False,
) -> int:
    """Compare transformers, plain decoding and every drafter side by side."""
    from specblock.daemon import bench_speed as speed

    base = speed.SMALL if small else speed.SpeedSettings(per_domain=prompts)
    settings = replace(
        base,
        temperatures=tuple(temperature or base.temperatures),
        dtype=dtype,
        threads=threads,
        drafters=tuple(drafter or ()),
        out=out,
    )
    return speed.run(settings, as_json, progress(as_json))


@bench_app.command("tune")
@command
def bench_tune(
    prompts: Annotated[Path, typer.Option(help="Directory with DOMAIN.train.jsonl files.")],
    per_domain: Annotated[int, typer.Option(min=1, help="Training prompts per kind of text.")] = 3,
    kind: Annotated[list[str] | None, typer.Option(help="Drafter kind, repeatable; default: all there are.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
) -> int:
    """Search each drafter's best fixed tree on this machine, for bench speed."""
    from specblock.daemon import bench_tune as tune

    settings = tune.TuneSettings(prompts=prompts, per_domain=per_domain, dtype=dtype, kinds=tuple(kind or ()))
    return tune.run(settings, progress(False))


@bench_app.command("load")
@command
def bench_load(
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests at once, repeatable; default 1, 2, 4, 8 and 16.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of prompts, both ways each.")] = 6,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads, for both ways alike.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Directory for load.json.")] = None,
    as_json: AsJson = False,
) -> int:
    """Compare drafting with plain decoding as more requests run at once."""
    from specblock.daemon import bench_load as load

    base = load.LoadSettings(rounds=rounds, temperature=temperature, dtype=dtype, threads=threads, out=out)
    settings = replace(base, concurrency=tuple(concurrency or base.concurrency))
    return load.run(settings, as_json, progress(as_json))


@bench_app.command("roofline")
@command
def bench_roofline(
    target: Annotated[str, typer.Option(help="Model directory or hub id.")] = "models/demo-target",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Directory for roofline.json.")] = None,
    as_json: AsJson = False,
) -> int:
    """Say what a cycle's forwards must read and compute, and how far they are from it."""
    from specblock.daemon import bench_roofline as roofline

    return roofline.run(target, dtype, out, as_json, progress(as_json))


@bench_app.command("swap")
@command
def bench_swap(
    swaps: Annotated[int, typer.Option(min=10, help="Swaps to other weights.")] = 500,
    clients: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 4,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Directory for swap.json and its page.")] = None,
    as_json: AsJson = False,
) -> int:
    """Swap drafter weights again and again while requests run: how long decoding stands still, and memory."""
    from specblock.daemon import bench_swap as swap

    settings = swap.SwapSettings(swaps=swaps, clients=clients, dtype=dtype, out=out)
    return swap.run(settings, as_json, progress(as_json))


@bench_app.command("kernels")
@command
def bench_kernels(
    target: Annotated[str, typer.Option(help="Model directory or hub id.")] = "models/demo-target",
    as_json: AsJson = False,
) -> int:
    """Time native operations against the references they replace."""
    from specblock.daemon import bench_kernels as kernels

    return kernels.run(target, as_json, progress(as_json))


@bench_app.command("ablation")
@command
def bench_ablation(
    prompts: Annotated[int, typer.Option(min=2, help="Held-out prompts per kind of text.")] = 6,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Directory for ablation.json.")] = None,
    as_json: AsJson = False,
) -> int:
    """Compare SpecBlock with itself, one thing changed at a time."""
    from specblock.daemon import bench_ablation as ablation

    settings = ablation.AblationSettings(per_domain=prompts, temperature=temperature, dtype=dtype, out=out)
    return ablation.run(settings, as_json, progress(as_json))


@bench_app.command("simulate")
@command
def bench_simulate(
    config: ConfigFile = Path("configs/demo.yaml"),
    scenario: Annotated[list[str] | None, typer.Option(help="Only this one; repeatable.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every scenario.")] = 1,
    hours: Annotated[float, typer.Option(min=0.1, max=48.0, help="Simulated hours of a run.")] = 2.0,
    curves: Annotated[Path | None, typer.Option(help="JSON with fitted numbers; default: the demo models'.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the runs.")] = len(os.sched_getaffinity(0)),
    as_json: AsJson = False,
) -> int:
    """Compare the decision rule with simpler ones and an oracle on modelled drifting traffic."""
    from specblock.daemon import bench_simulate as simulation

    settings = simulation.SimulateSettings(
        config=config, scenarios=tuple(scenario or ()), seeds=seeds, hours=hours, curves=curves, jobs=jobs
    )
    return simulation.run(settings, as_json, progress(as_json))


bench_app.command("breakeven")(command(breakeven))
for _story in STORIES:
    bench_app.command(_story)(command(shift_command(_story)))
