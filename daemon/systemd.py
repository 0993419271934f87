"""The three things that systemd and a service say to each other, in what the environment names for it.

This module is the `Manager` of a service that systemd, or nobody, has started.
See sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3).
"""

import os
import socket
from typing import Protocol


class Manager(Protocol):
    """Who has started this process and minds it; each member as the function of this module has it."""

    def notify(self, state: str) -> bool: ...  # noqa: D102
    def watchdog_interval(self) -> float | None: ...  # noqa: D102
    def listen_fds(self) -> list[socket.socket]: ...  # noqa: D102


FIRST_FD = 3  # systemd hands sockets over from this descriptor on


def notify(state: str) -> bool:
    """Tell systemd, e.g. "READY=1". False if there is nobody to tell, or it cannot be told."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as outlet:
        try:
            outlet.setblocking(False)  # whoever feeds a watchdog must not wait for it
            outlet.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            return False
    return True


def watchdog_interval() -> float | None:
    """Seconds between two "WATCHDOG=1": half of what systemd allows. None if it does not watch this process."""
    allowed = os.environ.get("WATCHDOG_USEC", "")
    if not allowed.isdecimal() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(allowed) / 2_000_000 or None


def alive(status: str, interval: float, *, starts: bool) -> str:
    """The sign of life to give every `interval` seconds. One that `starts` may take as long as it needs for that."""
    extension = f"\nEXTEND_TIMEOUT_USEC={round(1e6 * max(60, 4 * interval))}" if starts else ""
    return f"WATCHDOG=1\nSTATUS={status}{extension}"


def listen_fds() -> list[socket.socket]:
    """The sockets that systemd listens on for this process. The second call finds none, and no child inherits any."""
    pid, count = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS"))
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    sockets = [socket.socket(fileno=fd) for fd in range(FIRST_FD, FIRST_FD + int(count))]
    for handed in sockets:
        handed.set_inheritable(False)
    return sockets
