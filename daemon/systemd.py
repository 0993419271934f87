"""The systemd protocol: readiness and status notifications, the watchdog, and passed sockets.

This module itself is the `Manager` of a process that systemd started, or that runs without a service manager.
See sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3).
"""

import os
import socket
import time
from typing import ClassVar, Protocol

from daemon.core.errors import OperatorFault


class BadSocket(OperatorFault):
    """Descriptor {fd} from systemd is not a listening stream socket ({reason}): in the unit of the socket, use \
ListenStream= and no Accept=."""

    exit_code: ClassVar[int] = 78

    def __init__(self, fd: int, reason: str) -> None:
        self.fd, self.reason = fd, reason


class Manager(Protocol):
    """The process that started and supervises this one. Its methods are like the functions of this module."""

    def notify(self, state: str) -> bool: ...  # noqa: D102
    def watchdog_interval(self) -> float | None: ...  # noqa: D102
    def listen_fds(self) -> list[socket.socket]: ...  # noqa: D102


STOP_MARGIN = 10.0  # seconds: how long a stop may take beside the drain of clients
FIRST_FD = 3  # SD_LISTEN_FDS_START: the first descriptor that systemd passes


def notify(state: str) -> bool:
    """Send a state such as "READY=1" to systemd. Returns False if there is no systemd, or it does not take it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.setblocking(False)  # a blocked notification would stop the event loop
            sender.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            return False
    return True


def watchdog_interval() -> float | None:
    """Seconds between two "WATCHDOG=1": half of what systemd allows. None if it is not watching this process."""
    allowed = os.environ.get("WATCHDOG_USEC", "")
    if not allowed.isdecimal() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(allowed) / 2_000_000 or None


def watchdog_message(status: str, interval: float, *, starting: bool) -> str:
    """The state to send every `interval` seconds. While `starting`, it also extends the start timeout."""
    extension = f"\nEXTEND_TIMEOUT_USEC={round(1e6 * max(60, 4 * interval))}" if starting else ""
    return f"WATCHDOG=1\nSTATUS={status}{extension}"


def reloading_message() -> str:
    """The state to send once a reload begins. Its end is "READY=1", for which `systemctl reload` waits."""
    return f"RELOADING=1\nMONOTONIC_USEC={monotonic_usec()}"


def monotonic_usec() -> int:
    """The clock of all processes by which systemd tells whether a reload began after it was asked for."""
    return time.monotonic_ns() // 1000


def stopping_message(within: float) -> str:
    """The state to send once a stop begins that takes at most `within` seconds: systemd waits at least that long."""
    return f"STOPPING=1\nEXTEND_TIMEOUT_USEC={round(1e6 * (within + STOP_MARGIN))}"


def listen_fds() -> list[socket.socket]:
    """The listening sockets that systemd passed to this process; a second call returns none. Raises BadSocket."""
    pid, count = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS"))
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    return [_listening(fd) for fd in range(FIRST_FD, FIRST_FD + int(count))]


def _listening(fd: int) -> socket.socket:
    """The socket with this descriptor. Raises BadSocket for anything that no client can connect to."""
    try:
        passed = socket.socket(fileno=fd)
    except OSError as error:
        raise BadSocket(fd, os.strerror(error.errno or 0)) from None
    passed.set_inheritable(False)
    if passed.family not in {socket.AF_INET, socket.AF_INET6, socket.AF_UNIX}:
        reason = "another family"
    elif passed.type != socket.SOCK_STREAM:
        reason = "another type"
    elif not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        reason = "it does not listen"
    else:
        return passed
    passed.close()
    raise BadSocket(fd, reason)
