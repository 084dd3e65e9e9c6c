"""Options, output and exit codes that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from specblock.daemon.errors import ExitCode, SpecblockError

P = ParamSpec("P")

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="Policy file (YAML).", metavar="FILE")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override one key, as in http.port=9000; repeatable.", metavar="K=V")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]


def progress(as_json: bool) -> Callable[[str], None]:
    """Prints lines as they come; with --json everything but the object itself goes to the error stream."""
    return lambda line: typer.echo(line, err=as_json and not line.startswith("{"))


def command(function: Callable[P, int]) -> Callable[P, None]:
    """Makes a command of a function that returns an exit code and raises ``SpecblockError``."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = int(function(*args, **kwargs))
        except SpecblockError as error:
            typer.echo(str(error), err=True)
            code = int(error.exit_code)
        except BrokenPipeError:
            raise  # the reader left; click ends quietly
        except OSError as error:
            typer.echo(f"{error.filename}: {error.strerror}" if error.filename else str(error), err=True)
            code = int(ExitCode.DEPENDENCY)
        raise typer.Exit(code)

    run.__annotations__["return"] = None
    return run
