"""The gateway: lets peers in, keeps the time of all of them, and lets them go in order."""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from daemon.core.ports import OpenClient
from daemon.gateway.acceptor import Acceptor, ListenFailed, bind, refuse
from daemon.gateway.connection import encode
from daemon.gateway.deflate import Deflate
from daemon.gateway.handshake import FULL, Handshake
from daemon.gateway.http import Site
from daemon.gateway.limits import SPARE, Limits
from daemon.gateway.state import GatewayState, Peer
from daemon.gateway.transport import Transport

SOME = 256  # connections that are told the time in one turn of the loop

__all__ = ["Gateway", "Limits", "ListenFailed", "bind", "encode"]


class Gateway:
    """Serves `rowcast.v1` at /v1, and the pages of `site` beside it.

    Every websocket gets an attendant from `attend`. `clock` is monotonic, in seconds.
    """

    def __init__(
        self,
        open_client: OpenClient,
        site: Site,
        *,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limits = limits or Limits()
        self._state = GatewayState(
            open_client=open_client,
            site=site,
            limits=limits,
            clock=clock,
            max_sessions=limits.max_connections(),
            deflate=Deflate(limits.deflate_bytes) if limits.deflate_bytes else None,
        )
        self._acceptors: list[Acceptor] = []
        self._ticking: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.drain(None, within=self._state.limits.close_timeout)

    @property
    def connections(self) -> int:
        """How many websocket sessions there are."""
        return self._state.sessions

    @property
    def sockets(self) -> int:
        """How many connections are accepted, websocket sessions among them."""
        return len(self._state.peers)

    @property
    def aborted(self) -> Counter[str]:
        """How many connections were cut, by reason."""
        return self._state.aborted

    async def start(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        sockets: Sequence[socket.socket] = (),
        should_accept: Callable[[int], bool] = lambda _: True,
    ) -> tuple[str, int]:
        """Listen on `host` and `port` (0: any that is free), or on `sockets`; returns host and port of the first.

        `my_turn` gets the number of connections, and says whether the next is for us or, since other processes
        accept from the same sockets, is left to them for a moment. Raises ListenFailed.
        """
        sockets = sockets or await bind(host, port)
        address = sockets[0].getsockname()
        self._acceptors = [
            Acceptor(listening, self._admit, lambda: should_accept(len(self._state.peers))) for listening in sockets
        ]
        self._tick()
        return str(address[0]), int(address[1])

    def housekeep(self) -> None:
        """Tell every connection the time. The gateway calls this once a tick; nothing else in it has a timer."""
        for acceptor in self._acceptors:
            acceptor.resume()
        self._tick_peers(list(self._state.peers))

    def _tick_peers(self, peers: list[Peer]) -> None:
        """Tell some, and the rest when everybody else has had a turn: ten thousand would hold up what is live."""
        now = self._state.clock()
        some, rest = peers[:SOME], peers[SOME:]
        for peer in some:
            if peer in self._state.peers:
                peer.tick(now)
        if rest:
            asyncio.get_running_loop().call_soon(self._tick_peers, rest)

    async def drain(
        self,
        bye: Callable[[], bytes] | None,
        *,
        code: int = 1012,
        reason: str = "restart",
        within: float = 5.0,
    ) -> None:
        """Stop accepting, write a bye to every session, close them with `code`, and wait for the peers.

        `bye` is asked for the encoded frame of each session. Whoever is still there after `within` seconds is
        cut. Calling it again does no harm.
        """
        state = self._state
        for acceptor in self._acceptors:
            acceptor.close()
        for peer in tuple(state.peers):
            peer.drain(bye, code, reason, state.clock() + within)
        await self._emptied(within)
        for peer in tuple(state.peers):
            peer.abort("drain_timeout")
        await self._emptied(1.0)  # each tells of its end in the next turn
        if self._ticking is not None:
            self._ticking.cancel()

    async def _emptied(self, within: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._state.empty.wait()

    def _tick(self) -> None:
        self._ticking = asyncio.get_running_loop().call_later(self._state.limits.tick_every, self._tick)
        self.housekeep()

    def _admit(self, connection: socket.socket) -> None:
        if len(self._state.peers) >= self._state.max_sessions + SPARE // 2:
            refuse(connection, FULL)
        else:
            transport = Transport(connection)
            transport.protocol = Handshake(self._state, transport)
            self._state.add(transport.protocol)
            transport.resume_reading()
