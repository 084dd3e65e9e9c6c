"""Logging to standard error, as text or as one JSON object per line."""

from __future__ import annotations

import json
import logging
import sys
import time

from specblock.daemon.config import LoggingConfig


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time (UTC), level, logger, message and, if there is one, the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        data = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            data["exception"] = self.formatException(record.exc_info)
        return json.dumps(data, ensure_ascii=False)


def configure_logging(config: LoggingConfig) -> None:
    """Sends every logger of the process to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if config.json_lines else text)
    logging.basicConfig(level=config.level.upper(), handlers=[handler], force=True)
