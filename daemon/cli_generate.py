"""``specblockd generate``: one completion in this process, streamed to the terminal."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict, dataclass

import typer

from specblock.cuda_ext.sampling import SamplingParams
from specblock.daemon.config import DaemonConfig
from specblock.daemon.errors import ConfigError, ExitCode
from specblock.daemon.models import format_of, load_target, serving_drafter, settle_dtype
from specblock.daemon.oneshot import complete
from specblock.daemon.threads import use_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line asked for; ``seed`` None draws one."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    speculation: bool


def generate(config: DaemonConfig, prompt: str, settings: Settings, as_json: bool) -> int:
    """Prints the completion as it comes, then a line of statistics on standard error; or one JSON object.

    Raises:
        ConfigError: a sampling parameter is out of range, or the prompt is empty or too long.
        IncompatibleError: target and drafter are missing or do not fit.
    """
    config = settle_dtype(config)
    seed = secrets.randbits(63) if settings.seed is None else settings.seed
    try:
        sampling = SamplingParams(temperature=settings.temperature, top_p=settings.top_p, seed=seed)
        target = load_target(config.target.source, format_of(config), config.target.device, config.target.revision)
        use_threads(config, target, time.perf_counter)
        drafter = serving_drafter(config, target, config.drafter.path) if settings.speculation else None
        show = (lambda text: None) if as_json else (lambda text: typer.echo(text, nl=False))
        answer = complete(target, drafter, prompt, sampling, settings.max_tokens, show)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if as_json:
        typer.echo(
            json.dumps(
                {
                    **asdict(answer),
                    "seed": seed,
                    "dtype": config.target.dtype,
                    "acceptance_length": answer.acceptance_length,
                },
                indent=2,
            )
        )
        return ExitCode.OK
    typer.echo()
    typer.echo(
        f"{len(answer.tokens)} tokens in {answer.seconds:.2f} s, {answer.acceptance_length:.2f} tokens per cycle, "
        f"ended by {answer.finish_reason}, seed {seed}, {config.target.dtype}",
        err=True,
    )
    return ExitCode.OK
