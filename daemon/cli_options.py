"""Options and output that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="Policy file (YAML).", metavar="FILE")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override one key, as in http.port=9000; repeatable.", metavar="K=V")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]


def progress(as_json: bool) -> Callable[[str], None]:
    """Prints lines as they come; with --json everything but the object itself goes to the error stream."""
    return lambda line: typer.echo(line, err=as_json and not line.startswith("{"))
