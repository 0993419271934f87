"""Starts the daemon with a listening socket, as systemd does: `python -m tests.acceptance.socket_activated`."""

import os
import socket

from daemon.__main__ import main

if __name__ == "__main__":
    listening = socket.create_server(("127.0.0.1", 0))
    os.dup2(listening.fileno(), 3)
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
    main()
