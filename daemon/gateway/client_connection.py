"""What every connection of a client has, whatever it speaks: an account, a queue that the peer must read, an end."""

import asyncio
import fcntl
import sys
import termios
import time
from collections.abc import Callable

from ulid import ULID

from daemon import metrics
from daemon.core.close_codes import CLOSE_CODES, Close
from daemon.core.ports import ClientHandler, Outlet
from daemon.gateway.admission import Account
from daemon.gateway.limits import MIN_DRAIN_BYTES
from daemon.gateway.state import NEVER, GatewayState, SessionInfo, log
from daemon.gateway.transport import Transport
from daemon.logs import correlate, is_debugging


class ClientConnection:
    """The `Socket` of one handler, and the `TransportProtocol` of its transport. A subclass speaks with the peer.

    It is open until this side, the peer or an error starts to close it. From then on no message is written or
    passed on, and the connection is cut at `_deadline` if the peer has not closed by then.
    """

    __slots__ = (
        "_abort_reason",
        "_account",
        "_deadline",
        "_drained",
        "_full",
        "_full_acked",
        "_full_since",
        "_handler",
        "_open",
        "_opened_at",
        "_sent_at_tick",
        "_state",
        "_transport",
        "_unread",
        "address",
        "session",
    )

    is_admin = False

    def __init__(self, state: GatewayState, transport: Transport, address: str) -> None:
        now = state.clock()
        self.session = str(ULID())
        self.address = address
        self._account: Account | None = None
        self._state = state
        self._transport = transport
        self._handler: ClientHandler | None = None
        self._open = True
        self._abort_reason = ""
        self._opened_at = now
        self._deadline = 0.0
        self._full = False
        self._full_since = now  # when the current `drain_timeout` began
        self._full_acked = 0  # bytes acknowledged then
        self._drained: asyncio.Event | None = None
        self._sent_at_tick = 0  # what had been written to the transport
        self._unread = 0  # of these, not acknowledged at the last tick

    def _open_handler(self) -> None:
        self._state.sessions += 1
        if is_debugging():  # to ask for the peer, and drop the line, takes 1 % of a handshake
            log.debug("client_connected", session=self.session, peer=self._transport.peer_name())
        try:
            self._handler = self._state.open_client(self)
        except Exception:  # noqa: BLE001 - see _call
            self._fail_internally()

    @property
    def is_authenticated(self) -> bool:
        """Whether the peer has a place in the account of a user."""
        return self._account is not None

    @property
    def info(self) -> SessionInfo:
        """What an operator sees of this session."""
        user = self._account.user if self._account is not None else ""
        seconds = self._state.clock() - self._opened_at
        peer, written = self._transport.peer_name(), self._transport.written
        return SessionInfo(self.session, user, peer, seconds, written, self.queued())

    # The handler's Socket.

    @property
    def outlet(self) -> Outlet:
        """See Socket."""
        return self._transport

    def write(self, frames: bytes) -> int:
        """Write whole, encoded frames in order; does nothing once closing. Returns how many bytes are queued."""
        raise NotImplementedError

    def queued(self) -> int:
        """The number of bytes queued for the peer."""
        return self._transport.queued

    async def drained(self) -> None:
        """Wait until most of the queue has been sent. Returns at once if little is queued, or once closing."""
        if not self._full or not self._open:
            return
        if self._drained is None:
            self._drained = asyncio.Event()
        await self._drained.wait()

    def authenticated(self, user: str) -> None:
        """Give the peer one of this user's places. Raises TooManyConnections or Overloaded."""
        if self._account is None:
            self._account = self._state.accounts.enter(user)
            self._state.pending.discard(self, self.address)
            # Who has a token and comes again and again is one of the strangers.
            spent = self._transport.settle(refund=self.delay() <= 0)
            self.spend(spent)
            metrics.CONNECTED.inc()

    def charge(self, frames: int) -> None:
        """Count work that is worth this many frames towards the user's rate."""
        if self._account is not None:
            self._state.accounts.charge(self._account, frames, time.monotonic())

    def spend(self, seconds: float) -> None:
        """Count CPU that was spent on the peer towards the share of its user."""
        if self._account is not None:
            self._state.accounts.charge(self._account, 0, time.monotonic(), seconds)

    def lend(self, seconds: float) -> None:
        """Count CPU that the peer takes in advance: nothing of its user waits for it, as long as there is credit."""
        if self._account is not None:
            self._state.accounts.lend(self._account, seconds, time.monotonic())

    def has_credit(self) -> bool:
        """Whether the user of the peer may take more in advance."""
        if self._account is None:
            return False
        return self._state.accounts.has_credit(self._account, time.monotonic())

    def delay(self) -> float:
        """Seconds for which what is done for the user has to wait; 0 or less if it does not."""
        if self._account is None:
            return 0.0
        return self._state.accounts.delay(self._account, time.monotonic())

    def close(self, code: int, reason: str) -> None:
        """Say why after everything written so far, and close. Only the first call has an effect."""
        raise NotImplementedError

    # The transport's protocol.

    def data_received(self, data: bytes) -> None:
        """Process bytes from the peer."""
        raise NotImplementedError

    def eof_received(self) -> None:
        """The peer sends nothing more; the transport closes the connection."""
        raise NotImplementedError

    def pause_writing(self) -> None:
        """Stop reading from a peer that does not read: its pings would fill memory with pongs."""
        self._full = True
        self._full_since = self._state.clock()
        self._full_acked = self._count_acked()
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Read from the peer again, and wake what waits in `drained`."""
        self._full = False
        self._notify_drained()
        self._continue()

    def connection_lost(self) -> None:
        """Log the end of the connection and tell the handler."""
        self._stop(NEVER)
        self._state.sessions -= 1
        self._state.discard(self)
        if self._account is not None:
            self._account.unread -= self._unread
            self._state.accounts.leave(self._account)
            metrics.DISCONNECTED.inc()
        seconds = round(self._state.clock() - self._opened_at, 3)
        close = self._close_reason()
        if close is not None:
            metrics.CLOSED.labels(code=close.code).inc()
        with correlate(self.session):
            log.debug("client_disconnected", session=self.session, code=self._end_code(), seconds=seconds)
            if self._handler is not None:
                self._call(self._handler.connection_lost, close)
                self._handler = None

    # The gateway's Peer.

    def tick(self, now: float) -> None:
        """Cut the connection if the peer is silent or too slow, and tick the handler."""
        if not self._open:
            if now >= self._deadline:
                self.abort("close_timeout")
        elif self._full and not self._keeps_pace(now):
            self.abort("too_slow")
        elif self._is_too_much_unread():
            self.abort("user_unread")
        elif self._is_alive(now) and self._handler is not None:
            self._call(self._handler.tick, now)

    def drain(self, bye: Callable[[], bytes] | None, code: int, reason: str, deadline: float) -> None:
        """Send `bye()` if given, close, and give the peer until `deadline` to close too."""
        if self._open:
            if bye is not None:
                self.write(bye())
            self.close(code, reason)
            if self._deadline != NEVER:
                self._deadline = deadline

    def abort(self, reason: str) -> None:
        """Cut the connection now and drop queued data. `reason` is logged and counted."""
        if self._deadline != NEVER:
            self._abort_reason = reason
            self._stop(NEVER)
            with correlate(self.session):
                note = log.debug if self._account is None else log.warning
                note("client_aborted", session=self.session, reason=reason)
            self._state.count_abort(reason)
            self._transport.abort(reset=self._full)

    def evict(self) -> None:
        """End the connection at once, because another needs its place; the peer is told if it reads."""
        self.close(CLOSE_CODES["overload"].code, "overload")
        self._stop(NEVER)
        self._transport.abort()

    # What a subclass says.

    def _continue(self) -> None:
        """Read what the peer sends again."""
        self._transport.resume_reading()

    def _is_alive(self, now: float) -> bool:
        """Whether the peer shows signs of life; if not, the connection has been cut."""
        return True

    def _end_code(self) -> int:
        """The close code of the connection, for the log."""
        raise NotImplementedError

    def _closed_by_us(self) -> Close | None:
        """What this side said when it closed; None if it did not."""
        raise NotImplementedError

    def _fail_internally(self) -> None:
        """Log an exception, and close."""
        raise NotImplementedError

    # What they share.

    def _call(self, callback: Callable[..., None], *arguments: object) -> None:
        """Call the handler. An exception is a bug and closes this session only."""
        try:
            callback(*arguments)
        except Exception:  # noqa: BLE001 - a bug costs this client only
            self._fail_internally()

    def _stop(self, deadline: float) -> None:
        self._open = False
        self._transport.forbid_direct()
        self._deadline = deadline
        self._notify_drained()

    def _notify_drained(self) -> None:
        """Wake what waits in `drained`."""
        if self._drained is not None:
            self._drained.set()
            self._drained = None

    def _is_too_much_unread(self) -> bool:
        """Count what the peer has not read, in our queue and our kernel's, towards what its user may have."""
        account = self._account
        if account is None:
            return False
        written = self._transport.written
        unread = written - self._count_acked() if self._unread or written != self._sent_at_tick else 0
        self._sent_at_tick = written
        account.unread += unread - self._unread
        self._unread = unread
        if not self._state.accounts.is_too_much(account, unread):
            return False
        account.unread -= unread  # this connection is cut, so that others need not be
        self._unread = 0
        return True

    def _keeps_pace(self, now: float) -> bool:
        """Whether a peer with a full transport has acknowledged MIN_DRAIN_BYTES in each `drain_timeout`."""
        if now >= self._full_since + self._state.limits.drain_timeout:
            acked = self._count_acked()
            if acked < self._full_acked + MIN_DRAIN_BYTES:
                return False
            self._full_since, self._full_acked = now, acked
        return True

    def _close_reason(self) -> Close | None:
        """Why this side ended the connection; None if the peer did."""
        reason = "too_slow" if self._abort_reason == "user_unread" else self._abort_reason
        if reason in CLOSE_CODES:
            return Close(CLOSE_CODES[reason].code, reason)
        return self._closed_by_us()

    def _count_acked(self) -> int:
        """The number of bytes that the peer's kernel has acknowledged; our own kernel can buffer megabytes more."""
        try:
            unacked = fcntl.ioctl(self._transport.connection, termios.TIOCOUTQ, bytes(4))
        except OSError:  # not on this system
            unacked = bytes(4)
        return self._transport.written - self.queued() - int.from_bytes(unacked, sys.byteorder)
