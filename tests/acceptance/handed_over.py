"""Starts the daemon with a listening socket where systemd puts it: `python -m tests.acceptance.handed_over`."""

import os
import socket

from daemon.__main__ import main

if __name__ == "__main__":
    listening = socket.create_server(("127.0.0.1", 0))
    os.dup2(listening.fileno(), 3)
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
    main()
