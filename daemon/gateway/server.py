"""The gateway: accepts connections, ticks them all from one timer, and drains them at shutdown."""

import asyncio
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from heapq import nsmallest
from itertools import islice
from types import TracebackType
from typing import Self

from daemon.core.ports import OpenClient
from daemon.gateway.acceptor import Acceptor, ListenFailed, bind, turn_away
from daemon.gateway.admission import ANONYMOUS, address_group
from daemon.gateway.client_connection import ClientConnection
from daemon.gateway.deflate import Deflate
from daemon.gateway.door import Door
from daemon.gateway.framing import encode
from daemon.gateway.handshake import CROWDED_ADDRESS, Handshake
from daemon.gateway.http import Site
from daemon.gateway.limits import Limits
from daemon.gateway.state import ENTRY, GatewayState, Peer, SessionInfo
from daemon.gateway.tls import Tls
from daemon.gateway.transport import Transport

TICK_BATCH = 64  # connections ticked, or closed by a drain, in one iteration of the event loop: about 0.3 ms

__all__ = ["Gateway", "Limits", "ListenFailed", "bind", "encode"]


class Gateway:
    """Serves `rowcast.v1` at /v1, and the pages of `site` beside it; those of `admin_site` to `admin` sockets.

    `open_client` makes the handler of each websocket session; `door` says whom it may be for. Clients speak TLS if
    `tls` has a certificate, except those of a Unix socket. `clock` is monotonic, in seconds. As a context manager,
    the gateway drains when its block ends.
    """

    def __init__(
        self,
        open_client: OpenClient,
        site: Site,
        *,
        admin_site: Site | None = None,
        limits: Limits | None = None,
        door: Door | None = None,
        tls: Tls | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limits = limits or Limits()
        self._state = GatewayState(
            open_client=open_client,
            site=site,
            admin_site=admin_site or site,
            limits=limits,
            door=door or Door(),
            clock=clock,
            deflate=Deflate(limits.deflate_bytes) if limits.deflate_bytes else None,
        )
        self._state.on_room = self._accept_again
        self._tls = tls or Tls()
        self._acceptors: list[Acceptor] = []
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.drain(None, within=self._state.limits.close_timeout)

    @property
    def connections(self) -> int:
        """The number of open websocket sessions."""
        return self._state.sessions

    @property
    def clients(self) -> int:
        """The number of authenticated websocket sessions."""
        return self._state.accounts.connections

    @property
    def door(self) -> Door:
        """Whom requests are answered for."""
        return self._state.door

    def use(self, open_client: OpenClient, limits: Limits, door: Door) -> None:
        """Let new requests and connections have these. Whoever is connected stays, also beyond a limit."""
        self._state.use(open_client, limits, door)

    def sessions(self, limit: int) -> list[SessionInfo]:
        """The authenticated sessions, at most `limit`: first those with most queued for them, then the oldest."""
        found = [peer for peer in self._state.peers if isinstance(peer, ClientConnection) and peer.is_authenticated]
        chosen = nsmallest(limit, found, key=lambda peer: (-peer.queued(), peer.session))
        return [peer.info for peer in chosen]

    @property
    def pending(self) -> int:
        """The number of connections for clients that are not authenticated."""
        return len(self._state.pending)

    @property
    def sockets(self) -> int:
        """The number of accepted connections, including websocket sessions."""
        return len(self._state.peers)

    @property
    def aborted(self) -> Counter[str]:
        """The number of connections that were cut, by reason."""
        return self._state.aborted

    async def start(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        sockets: Sequence[socket.socket] = (),
        admin: Sequence[socket.socket] = (),
        should_accept: Callable[[int], bool] = lambda _: True,
    ) -> tuple[str, int]:
        """Listen on `host` and `port` (0: any free port), or on `sockets`. Returns the first socket's host and port.

        Connections from `admin` sockets have places of their own, which clients cannot take. `should_accept` gets the
        number of connections and decides whether to accept the next one now, or to leave it for a moment to other
        processes that listen on the same sockets. Raises ListenFailed.
        """
        sockets = sockets or await bind(host, port)
        address = sockets[0].getsockname()
        self._acceptors = [
            Acceptor(
                listening,
                partial(self._admit, is_admin=listening in admin),
                lambda: should_accept(len(self._state.peers)),
                partial(self._state.delay, is_admin=listening in admin),
            )
            for listening in [*sockets, *admin]
        ]
        self._tick()
        if sockets[0].family == socket.AF_UNIX:
            return f"unix:{os.fsdecode(address)}", 0
        return str(address[0]), int(address[1])

    def housekeep(self) -> None:
        """Tick every connection. The gateway calls this once per tick; no connection has a timer of its own."""
        for acceptor in self._acceptors:
            acceptor.resume()
        self._state.accounts.forget(time.monotonic())
        peers = list(self._state.peers)
        self._tick_peers(iter(peers), self._state.limits.tick_every / (len(peers) // TICK_BATCH + 1))

    def _tick_peers(self, peers: Iterator[Peer], pause: float) -> None:
        """Tick one batch, and the rest with so many seconds between two batches.

        Ten thousand at once, or in one iteration after the other, would delay live traffic.
        """
        now, batch = self._state.clock(), list(islice(peers, TICK_BATCH))
        for peer in batch:
            if peer in self._state.peers:
                peer.tick(now)
        if len(batch) == TICK_BATCH:
            asyncio.get_running_loop().call_later(pause, self._tick_peers, peers, pause)

    async def drain(
        self,
        bye: Callable[[], bytes] | None,
        *,
        code: int = 1012,
        reason: str = "restart",
        within: float = 5.0,
    ) -> None:
        """Stop accepting, send a bye to every session, close it with `code`, and wait for the peers.

        `bye` returns the encoded frame for one session. Sessions are closed a slice at a time, and the others go on
        meanwhile. Connections that are still open after `within` seconds are cut. Calling `drain` again is harmless.
        """
        state = self._state
        for acceptor in self._acceptors:
            acceptor.close()
        deadline = state.clock() + within
        sessions: list[Peer] = []
        for peer in tuple(state.peers):
            if isinstance(peer, Handshake):
                peer.drain(bye, code, reason, deadline)  # first, so that none of them becomes a session meanwhile
            else:
                sessions.append(peer)
        for first in range(0, len(sessions), TICK_BATCH):
            for peer in sessions[first : first + TICK_BATCH]:
                if peer in state.peers:
                    peer.drain(bye, code, reason, deadline)
            await asyncio.sleep(0)  # the others get their changes, and the watchdog its message
        await self._wait_until_empty(max(0.0, deadline - state.clock()))
        for peer in tuple(state.peers):
            peer.abort("drain_timeout")
        await self._wait_until_empty(1.0)  # an aborted connection ends in the next iteration
        if self._timer is not None:
            self._timer.cancel()

    async def _wait_until_empty(self, within: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._state.empty.wait()

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._state.limits.tick_every, self._tick)
        self.housekeep()

    def _accept_again(self) -> None:
        for acceptor in self._acceptors:
            acceptor.accept_again()

    def _admit(self, connection: socket.socket, host: str, *, is_admin: bool) -> None:
        is_proxy = self._state.door.trusts(host)
        address = ANONYMOUS if is_proxy or not host else address_group(host)
        if not is_admin and not self._state.addresses.has_room(address):
            turn_away(connection, CROWDED_ADDRESS, "address")
            return
        if host and not is_admin:
            try:
                connection = self._tls.wrap(connection)
            except OSError:
                return  # the peer has disconnected
        transport = Transport(connection)
        if not is_admin:
            transport.spend(self._state.charge, ENTRY)
        transport.protocol = Handshake(self._state, transport, address, is_admin=is_admin, is_proxy=is_proxy)
        self._state.add(transport.protocol)
        transport.resume_reading()
