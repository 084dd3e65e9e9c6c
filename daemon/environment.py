"""Environment variables that libraries read when they are first imported."""

from __future__ import annotations

from collections.abc import MutableMapping

_DEFAULTS = {
    "RAY_AUTH_MODE": "token",  # set after `import ray`, a local cluster fails to start
    "RAY_EXPORT_COUNTER_AS_GAUGE": "0",  # one name per counter, with the _total suffix
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray starts workers at niceness 15: any other busy process would starve the decode loop. Training lowers its own.
    "RAY_worker_niceness": "0",
    "OMP_WAIT_POLICY": "PASSIVE",  # idle OpenMP threads must not spin while engine and trainer share cores
    "TOKENIZERS_PARALLELISM": "false",  # forked workers would warn and fall back
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def prepare_environment(environ: MutableMapping[str, str]) -> None:
    """Fills in what the operator has not set; call it before anything heavy is imported."""
    for name, value in _DEFAULTS.items():
        environ.setdefault(name, value)
