"""State shared by all connections of one gateway, and how peers are named in the log."""

import asyncio
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from daemon.core.ports import OpenClient
from daemon.gateway.deflate import Deflate
from daemon.gateway.http import Site
from daemon.gateway.limits import Limits
from daemon.logs import get_logger

log = get_logger()

NEVER: Final = float("inf")  # the deadline of a connection that was aborted already


class Peer(Protocol):
    """One accepted connection: a handshake or a websocket session."""

    def tick(self, now: float) -> None:
        """Enforce timeouts; called once per tick."""

    def drain(self, bye: Callable[[], bytes] | None, code: int, reason: str, deadline: float) -> None:
        """Shut down: send `bye()`, close, and give the peer until `deadline` to close too."""

    def abort(self, reason: str) -> None:
        """Cut the connection now and drop queued data. `reason` is logged and counted."""


@dataclass(slots=True, kw_only=True)
class GatewayState:
    """What all connections of a gateway share.

    `peers` holds every connection; `sessions` counts those that are websockets. `clock` is monotonic, in seconds.
    `deflate` is None if compression is off. `aborted` counts the connections that were cut, by reason. `empty` is
    set while there are no connections.
    """

    open_client: OpenClient
    site: Site
    limits: Limits
    clock: Callable[[], float]
    max_sessions: int
    deflate: Deflate | None
    peers: set[Peer] = field(default_factory=set)
    sessions: int = 0
    aborted: Counter[str] = field(default_factory=Counter)
    empty: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.empty.set()

    def add(self, peer: Peer) -> None:
        """Register a connection."""
        self.peers.add(peer)
        self.empty.clear()

    def discard(self, peer: Peer) -> None:
        """Forget a connection that has ended, or that another peer has replaced."""
        self.peers.discard(peer)
        if not self.peers:
            self.empty.set()


def peer_name(connection: socket.socket) -> str:
    """The peer's address, for the log."""
    try:
        match connection.getpeername():
            case (str(host), int(port), *_):
                return address_name(host, port)
    except OSError:
        pass  # the peer has disconnected
    return "unknown"


def address_name(host: str, port: int) -> str:
    """`host:port`, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
