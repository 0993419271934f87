"""What the connections of one gateway share."""

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

NEVER: Final = float("inf")  # the deadline of a connection that has been cut, and is not cut again


class Peer(Protocol):
    """One accepted connection, whatever it has become."""

    def tick(self, now: float) -> None:
        """Do what time demands; called once a tick."""

    def drain(self, bye: Callable[[], bytes] | None, code: int, reason: str, deadline: float) -> None:
        """The server goes: say so, close, and wait for the peer until `deadline`."""

    def abort(self, reason: str) -> None:
        """Cut the connection now, whatever waits to be sent."""


@dataclass(slots=True, kw_only=True)
class GatewayState:
    """`peers` are all connections; `sessions` says how many of them are websockets.

    `clock` is monotonic, in seconds. `deflate` is None if nothing is compressed. `aborted` counts the connections
    that were cut, by reason.
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
        """A connection is here."""
        self.peers.add(peer)
        self.empty.clear()

    def discard(self, peer: Peer) -> None:
        """A connection has gone, or become another kind of peer."""
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
        pass  # it has gone
    return "unknown"


def address_name(host: str, port: int) -> str:
    """An address as people write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
