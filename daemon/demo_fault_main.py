"""``specblockd`` with the broken engine of :mod:`specblock.daemon.demo_fault` behind ``serve``."""

from __future__ import annotations

import os
from functools import partial

from specblock.daemon.environment import prepare_environment


def main() -> None:
    """The ordinary command line; Ray reads its environment when it is imported, so that is prepared first."""
    prepare_environment(os.environ)
    from specblock.daemon import supervisor
    from specblock.daemon.app import app
    from specblock.daemon.demo_fault import DesynchronisedEngineActor

    supervisor.serve = partial(supervisor.serve, engine_type=DesynchronisedEngineActor)  # type: ignore[assignment]
    app()


if __name__ == "__main__":
    main()
