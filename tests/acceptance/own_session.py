"""Starts the daemon without a terminal, like a service: `python -m tests.acceptance.own_session`."""

import os

from daemon.__main__ import main

if __name__ == "__main__":
    os.setsid()
    main()
