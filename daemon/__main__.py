"""``python -m specblock.daemon``."""

from specblock.daemon.app import main

main()
