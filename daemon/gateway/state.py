"""State shared by all connections of one gateway, and how peers are named in the log."""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from daemon import metrics
from daemon.core.ports import OpenClient
from daemon.gateway.admission import Accounts, AddressCounts, Crowd, Strangers
from daemon.gateway.deflate import Deflate
from daemon.gateway.door import Door
from daemon.gateway.http import Site
from daemon.gateway.limits import ADMIN_CONNECTIONS, Limits
from daemon.gateway.live_events import LiveEvents
from daemon.logs import get_logger

log = get_logger()

ENTRY: Final = 0.000_25  # seconds of CPU that a connection takes beside what is read: its beginning, and its end
NEVER: Final = float("inf")  # the deadline of a connection that was aborted already


class SessionInfo(NamedTuple):
    """What an operator sees of an authenticated session. Sizes are in bytes; it has been open for `seconds`."""

    session: str
    user: str
    peer: str
    seconds: float
    sent: int
    queued: int


class Peer(Protocol):
    """One accepted connection: a handshake, a websocket session or an event stream.

    `address` is the peer's, as `address_group` makes it. `is_admin`: it came in through the listener for metrics.
    """

    @property
    def address(self) -> str: ...  # noqa: D102

    @property
    def is_admin(self) -> bool: ...  # noqa: D102

    def tick(self, now: float) -> None:
        """Enforce timeouts; called once per tick."""

    def drain(self, bye: Callable[[], bytes] | None, code: int, reason: str, deadline: float) -> None:
        """Shut down: send `bye()`, close, and give the peer until `deadline` to close too."""

    def abort(self, reason: str) -> None:
        """Cut the connection now and drop queued data. `reason` is logged and counted."""

    def evict(self) -> None:
        """End the connection at once, because another needs its place; the peer is told if it reads."""


@dataclass(slots=True, kw_only=True)
class GatewayState:
    """What all connections of a gateway share.

    `peers` holds every connection; `sessions` counts those of clients. `clock` is monotonic, in seconds.
    `deflate` is None if compression is off. `aborted` counts the connections that were cut, by reason. `empty` is
    set while there are no connections. `pending` and `admin` hold the connections that are not authenticated, from
    the listener for clients and from that for metrics, and `strangers` what the former take of the processor;
    `accounts` counts those that are. `on_room` is called when strangers have been given back some of it, and
    newcomers can be let in.
    """

    open_client: OpenClient
    site: Site
    admin_site: Site
    limits: Limits
    clock: Callable[[], float]
    deflate: Deflate | None
    door: Door = field(default_factory=Door)
    peers: set[Peer] = field(default_factory=set)
    pending: Crowd[Peer] = field(init=False)
    admin: Crowd[Peer] = field(init=False)
    strangers: Strangers = field(init=False)
    accounts: Accounts = field(init=False)
    addresses: AddressCounts = field(init=False)
    live_events: LiveEvents = field(default_factory=LiveEvents)
    on_room: Callable[[], object] = lambda: None
    sessions: int = 0
    aborted: Counter[str] = field(default_factory=Counter)
    empty: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.empty.set()
        self.pending = Crowd(self.limits.max_pending(), self.limits.grace)
        self.admin = Crowd(ADMIN_CONNECTIONS, self.limits.grace)
        self.strangers = Strangers(self.limits)
        self.accounts = Accounts(self.limits)
        self.addresses = AddressCounts(self.limits.per_address)

    def use(self, open_client: OpenClient, limits: Limits, door: Door) -> None:
        """Let new requests and connections have these."""
        self.open_client, self.limits, self.door = open_client, limits, door
        self.pending.limit = limits.max_pending()
        self.strangers.use(limits)
        self.accounts.use(limits)
        self.addresses.limit = limits.per_address

    def add(self, peer: Peer) -> None:
        """Register a connection that is not authenticated. If there are too many of them, another is evicted."""
        self.peers.add(peer)
        self.empty.clear()
        self.addresses.add(peer.address)
        self._enter(peer)

    def replace(self, peer: Peer, successor: Peer) -> None:
        """Register the peer that takes over a connection."""
        self._crowd(peer).discard(peer, peer.address)
        self.peers.discard(peer)
        self.peers.add(successor)
        self._enter(successor)

    def leave(self, peer: Peer) -> None:
        """Forget a connection whose address was not known, before `add` counts it under the one that is."""
        self._crowd(peer).discard(peer, peer.address)
        self.addresses.remove(peer.address)

    def discard(self, peer: Peer) -> None:
        """Forget a connection that has ended."""
        self.leave(peer)
        self.peers.discard(peer)
        if not self.peers:
            self.empty.set()

    def count_abort(self, reason: str) -> None:
        """Count a connection that was cut."""
        self.aborted[reason] += 1
        metrics.ABORTED.labels(reason=reason).inc()

    def delay(self, *, is_admin: bool) -> float:
        """Seconds for which no connection can be let in; 0 or less if one can."""
        if is_admin:
            return self.admin.delay(self.clock())
        delay = self.strangers.delay(time.monotonic())
        if delay > 0:
            metrics.HELD_UP.inc()
        return max(delay, self.pending.delay(self.clock()))

    def charge(self, seconds: float) -> None:
        """Count CPU that a connection has taken that is not authenticated; less than 0 gives back."""
        now = time.monotonic()
        self.strangers.charge(seconds, now)
        if seconds < 0 and self.strangers.delay(now) <= 0:
            self.on_room()

    def _crowd(self, peer: Peer) -> Crowd[Peer]:
        return self.admin if peer.is_admin else self.pending

    def _enter(self, peer: Peer) -> None:
        evicted = self._crowd(peer).add(peer, peer.address, self.clock())
        if evicted is not None:
            refuse("crowded", peer=evicted.address)
            evicted.evict()


def refuse(reason: str, **more: object) -> None:
    """Count and log a connection that gets no place, or no answer to its request."""
    metrics.REFUSED.labels(reason=reason).inc()
    log.debug("client_refused", reason=reason, **more)


def peer_name(connection: socket.socket) -> str:
    """The peer's address, for the log."""
    try:
        match connection.getpeername():
            case (str(host), int(port), *_):
                return address_name(host, port)
            case str() | bytes():
                return "unix"
    except OSError:
        pass  # the peer has disconnected
    return "unknown"


def address_name(host: str, port: int) -> str:
    """`host:port`, with an IPv6 address in brackets; a Unix socket as it is."""
    if host.startswith("unix:"):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
