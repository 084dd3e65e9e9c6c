"""The ``specblockd`` command line: arguments and exit codes; the work is done elsewhere and imported when needed."""

from __future__ import annotations

import json
import logging
import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any

import typer

from specblock.daemon import cli_read
from specblock.daemon.cli_bench import bench_app
from specblock.daemon.cli_options import AsJson, ConfigFile, Overrides, command
from specblock.daemon.config_loader import load_config
from specblock.daemon.environment import prepare_environment
from specblock.daemon.errors import ExitCode
from specblock.daemon.logs import configure_logging

DEFAULT_CONFIG = Path("configs/local.yaml")

app = typer.Typer(
    name="specblockd",
    help="Serve a language model with SpecBlock speculative decoding and keep the drafter good while traffic changes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
drafter_app = typer.Typer(help="Stored versions of the drafter.", no_args_is_help=True)
app.add_typer(drafter_app, name="drafter")
app.add_typer(bench_app, name="bench")


def emit(data: Any) -> int:
    """Prints JSON on standard output."""
    typer.echo(json.dumps(data, indent=2))
    return ExitCode.OK


@app.command()
@command
def serve(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None) -> int:
    """Start the daemon; Ctrl-C or SIGTERM drains and stops it."""
    loaded = load_config(config, overrides or ())
    configure_logging(loaded.logging)
    os.umask(0o077)  # tokens, windows and drafters are nobody else's business; Ray would write its token 0644
    logging.getLogger(__name__).info("configuration: %s", json.dumps(loaded.resolved()))
    from specblock.daemon import supervisor

    return supervisor.serve(loaded)


@app.command()
@command
def check(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None, as_json: AsJson = False) -> int:
    """Check configuration, files, compatibility, memory, Redis and ports before anything is loaded."""
    from specblock.daemon.check import run_checks

    report = run_checks(load_config(config, overrides or ()))
    if as_json:
        emit(report.to_json())
    else:
        for finding in report.findings:
            typer.echo(f"{finding.level:<8}{finding.name:<10}{finding.message}")
    return report.exit_code


@app.command()
@command
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    config: ConfigFile = DEFAULT_CONFIG,
    overrides: Overrides = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to produce at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most probable token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus mass, in (0, 1].")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed; drawn when absent.")] = None,
    speculation: Annotated[bool, typer.Option("--speculation/--no-speculation")] = True,
    as_json: AsJson = False,
) -> int:
    """Complete one prompt in this process, without Ray, Redis or a running daemon."""
    loaded = load_config(config, overrides or ())
    text = sys.stdin.read() if prompt == "-" else prompt
    from specblock.daemon import cli_generate

    settings = cli_generate.Settings(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, speculation=speculation
    )
    return cli_generate.generate(loaded, text, settings, as_json)


@app.command()
@command
def status(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None, as_json: AsJson = False) -> int:
    """Show what the running daemon does."""
    found = cli_read.fetch_status(load_config(config, overrides or ()))
    return emit(found) if as_json else _lines(cli_read.status_lines(found))


@app.command()
@command
def explain(
    count: Annotated[int, typer.Argument(min=1, help="How many of the latest decisions.")] = 10,
    config: ConfigFile = DEFAULT_CONFIG,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> int:
    """Say in words what was decided last, and why; skipped updates too."""
    lines = cli_read.explanations(load_config(config, overrides or ()), count)
    return emit(lines) if as_json else _lines(lines)


@app.command()
@command
def ledger(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None, as_json: AsJson = False) -> int:
    """Show what adaptation has cost and brought so far, in device-seconds."""
    balance = cli_read.balance(load_config(config, overrides or ()))
    return emit(balance) if as_json else _lines(f"{name:<14}{value:>12g}" for name, value in balance.items())


@app.command()
@command
def replay(
    recorded: Annotated[Path, typer.Argument(metavar="LEDGER", help="A daemon's STATE_DIR/bandit/ledger.jsonl.")],
    config: ConfigFile = DEFAULT_CONFIG,
    policy: Annotated[Path | None, typer.Option(help="Decide the same with this policy's numbers instead.")] = None,
    as_json: AsJson = False,
) -> int:
    """Take every recorded decision again: bit for bit with its own policy, or what if with another one."""
    from specblock.daemon import cli_replay

    return cli_replay.run(recorded, config, policy, as_json, typer.echo)


@drafter_app.command("list")
@command
def drafter_list(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None, as_json: AsJson = False) -> int:
    """List the stored versions; * marks the serving one."""
    versions = cli_read.drafter_versions(load_config(config, overrides or ()))
    return emit(versions) if as_json else _lines(cli_read.drafter_lines(versions))


@drafter_app.command("show")
@command
def drafter_show(
    name: Annotated[str, typer.Argument(help="Version, as in drafter list.")],
    config: ConfigFile = DEFAULT_CONFIG,
    overrides: Overrides = None,
) -> int:
    """Show a version's manifest after verifying its files (JSON)."""
    return emit(cli_read.drafter_manifest(load_config(config, overrides or ()), name))


@drafter_app.command("rollback")
@command
def drafter_rollback(config: ConfigFile = DEFAULT_CONFIG, overrides: Overrides = None) -> int:
    """Make the previous version the serving one, from the daemon's next start on."""
    return _lines(cli_read.rollback(load_config(config, overrides or ())))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
@command
def train(context: typer.Context) -> int:
    """Train a drafter offline; all arguments go to the trainer (see train --help)."""
    from specblock.daemon import train_command as trainer

    return trainer.main(context.args)


@app.command()
@command
def demo(
    config: Annotated[Path, typer.Option("--config", "-c", help="Policy file (YAML).")] = Path("configs/demo.yaml"),
    out: Annotated[Path, typer.Option(help="Directory for the page and the figures.")] = Path("build/demo"),
    traffic: Annotated[int, typer.Option(min=8, help="Requests per kind of text, at least.")] = 40,
    most: Annotated[int, typer.Option(min=8, help="Requests of cpp while no update was promoted.")] = 480,
    fresh: Annotated[int, typer.Option(min=2, max=50, help="Closing requests on prompts seen only once.")] = 20,
    fault: Annotated[bool, typer.Option("--fault", help="Plant a cache fault instead; it must be reported.")] = False,
) -> int:
    """Watch adaptation on a real shift of traffic, against the same prompts without it."""
    from specblock.daemon import demo as shown

    settings = shown.DemoSettings(
        config=config, out=out, traffic=traffic, most=max(most, traffic), fresh=fresh, fault=fault
    )
    return shown.run(settings, lambda line: print(line, flush=True))


@app.command()
@command
def version(as_json: AsJson = False) -> int:
    """Print the version."""
    found = installed_version("specblock")
    return emit({"version": found}) if as_json else _lines([found])


def _lines(lines: Any) -> int:
    for line in lines:
        typer.echo(line)
    return ExitCode.OK


def main() -> None:
    """Entry point of ``specblockd``; exits with one of ``ExitCode``."""
    prepare_environment(os.environ)
    app()
