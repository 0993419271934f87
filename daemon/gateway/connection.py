"""A websocket session: connects a transport, the websockets library's protocol, and the client's handler."""

import asyncio
import fcntl
import logging
import sys
import termios
from collections.abc import Callable
from typing import Final

from ulid import ULID
from websockets.extensions import Extension
from websockets.frames import Frame, Opcode
from websockets.protocol import SEND_EOF, Protocol, Side, State

from daemon import metrics
from daemon.core.close_codes import CLOSE_CODES, Close
from daemon.core.ports import ClientHandler
from daemon.gateway.admission import Account
from daemon.gateway.limits import MIN_DRAIN_BYTES
from daemon.gateway.state import NEVER, GatewayState, log, peer_name
from daemon.gateway.transport import Transport
from daemon.logs import correlate

SLICE: Final = 1024  # bytes parsed before their frames are processed
FRAMES_PER_TURN: Final = 16  # frames processed before other connections have their turn
NOTHING: Final = memoryview(b"")
CHARGED_BYTES: Final = 1024  # a frame counts once towards the user's rate, and once more for each of these
MAX_REASON: Final = 123  # bytes, in a close frame

# The library logs every connection and, at DEBUG, every frame; only its errors are of interest here.
_library_log: Final = logging.getLogger("websockets.server")
_library_log.setLevel(logging.ERROR)


def encode(payload: bytes) -> bytes:
    """Encode `payload` as a single unmasked text frame (RFC 6455, section 5.2).

    The result can be written to any number of sessions. The library's own encoder takes four times as long.
    """
    size = len(payload)
    if size < 126:
        return b"\x81%c%b" % (size, payload)
    if size < 65_536:
        return b"\x81\x7e%b%b" % (size.to_bytes(2), payload)
    return b"\x81\x7f%b%b" % (size.to_bytes(8), payload)


class WebSocketConnection:
    """The `Socket` of one handler, and the `TransportProtocol` of its transport, from the 101 response on.

    It is open until this side, the peer or an error starts to close it. From then on no message is written or
    passed on, and the connection is cut at `_deadline` if the peer has not closed by then.

    What the peer sent is processed in turns of FRAMES_PER_TURN frames, one in each iteration of the event loop. Until
    everything is processed nothing more is read, so a peer that sends too much is held up by TCP, and only that peer.
    A turn also waits while the user has used up its rate.
    """

    __slots__ = (
        "_abort_reason",
        "_account",
        "_acked",
        "_deadline",
        "_deflate",
        "_drained",
        "_fragments",
        "_frame_count",
        "_frames",
        "_full",
        "_full_acked",
        "_full_since",
        "_handler",
        "_input",
        "_next_ping",
        "_next_turn",
        "_open",
        "_opened_at",
        "_ping_end",
        "_pinged_at",
        "_protocol",
        "_sent",
        "_state",
        "_transport",
        "address",
        "session",
    )

    is_admin = False

    def __init__(self, state: GatewayState, transport: Transport, extensions: list[Extension], address: str) -> None:
        now = state.clock()
        self.session = str(ULID())
        self.address = address
        self._account: Account | None = None
        self._state = state
        self._transport = transport
        self._protocol = Protocol(Side.SERVER, max_size=state.limits.message_bytes, logger=_library_log)
        self._protocol.extensions = extensions
        self._handler: ClientHandler | None = None
        self._open = True
        self._abort_reason = ""
        self._opened_at = now
        self._deadline = 0.0
        # Inbound.
        self._input = NOTHING  # not parsed yet
        self._frames: list[Frame] = []  # parsed, but not processed yet
        self._fragments: list[bytes] = []  # of the current message
        self._frame_count = 0  # since the last tick; until the peer is authenticated, since the beginning
        self._next_turn: asyncio.Handle | None = None  # scheduled because there is more to process
        # Outbound.
        self._deflate = state.deflate if extensions else None
        self._full = False
        self._full_since = now  # when the current `drain_timeout` began
        self._full_acked = 0  # bytes acknowledged then
        self._drained: asyncio.Event | None = None
        self._sent = 0  # bytes written to the transport
        # Keepalive.
        self._next_ping = now + state.limits.ping_every
        self._pinged_at: float | None = None  # when the unanswered ping was sent
        self._ping_end = 0  # `_sent` after the ping
        self._acked = 0  # bytes acknowledged at the last tick with an unanswered ping

    def begin(self, response: bytes, early: bytes) -> None:
        """Send the 101 response and open the handler. `early` is what the peer sent after its request."""
        self._state.sessions += 1
        self._sent += len(response)
        self._transport.write(response)
        with correlate(self.session):
            log.debug("client_connected", session=self.session, peer=peer_name(self._transport.connection))
            try:
                self._handler = self._state.open_client(self)
            except Exception:  # noqa: BLE001 - see _call
                self._fail_internally()
        if early:
            self.data_received(early)

    # The handler's Socket.

    def write(self, frames: bytes) -> int:
        """Write whole, encoded frames in order; does nothing once closing. Returns how many bytes are queued."""
        if not self._open:
            return 0
        if self._deflate is not None:
            frames = self._deflate(frames)
        self._sent += len(frames)
        return self._transport.write(frames)

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
            metrics.CONNECTED.inc()

    def charge(self, frames: int) -> None:
        """Count work that is worth this many frames towards the user's rate."""
        if self._account is not None:
            self._state.accounts.charge(self._account, frames, asyncio.get_running_loop().time())

    def close(self, code: int, reason: str) -> None:
        """Send a close frame after everything written so far, and close. Only the first call has an effect."""
        if self._open and self._protocol.state is State.OPEN:
            self._protocol.send_close(code, reason.encode()[:MAX_REASON].decode(errors="ignore"))
            self._flush()

    # The transport's protocol.

    def data_received(self, data: bytes) -> None:
        """Process bytes from the peer; any byte shows that it is alive."""
        self._pinged_at = None
        self._input = memoryview(data)
        self._take_turn()

    def eof_received(self) -> None:
        """The peer sends nothing more; the transport closes the connection."""
        self._protocol.receive_eof()
        self._flush()

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
        if self._next_turn is not None:
            self._next_turn.cancel()
            self._next_turn = None
        self._state.sessions -= 1
        self._state.discard(self)
        if self._account is not None:
            self._state.accounts.leave(self._account)
            metrics.DISCONNECTED.inc()
        close = self._protocol.close_sent or self._protocol.close_rcvd or Close(1006, "")
        seconds = round(self._state.clock() - self._opened_at, 3)
        with correlate(self.session):
            log.debug("client_disconnected", session=self.session, code=int(close.code), seconds=seconds)
            if self._handler is not None:
                self._call(self._handler.connection_lost, self._close_reason())
                self._handler = None
        # Both are in reference cycles with the protocol, which would keep it until the garbage collector runs.
        self._protocol.parser.close()
        self._protocol.parser_exc = None

    # The gateway's Peer.

    def tick(self, now: float) -> None:
        """Send a ping when due, cut the connection if the peer is silent or too slow, and tick the handler."""
        if not self._open:
            if now >= self._deadline:
                self.abort("close_timeout")
            return
        if self._account is not None:
            self._frame_count = 0
        if self._full and not self._keeps_pace(now):
            self.abort("too_slow")
            return
        if self._pinged_at is not None:
            if self._next_turn is not None or self._is_ping_in_flight():  # its answer may not have been read yet
                self._pinged_at = now
            elif now >= self._pinged_at + self._state.limits.ping_timeout:
                self.abort("silent")
                return
        elif now >= self._next_ping:
            self._ping(now)
        if self._handler is not None:
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
            self._transport.abort()

    def evict(self) -> None:
        """End the connection at once, because another needs its place; the peer is told if it reads."""
        self.close(CLOSE_CODES["overload"].code, "overload")
        self._stop(NEVER)
        self._transport.abort()

    # Inbound.

    def _take_turn(self) -> None:
        """Process some of what the peer sent, and arrange for the rest."""
        self._next_turn = None
        if self._is_throttled():
            return
        work = 0
        left = FRAMES_PER_TURN
        with correlate(self.session):
            while left > 0 and not self._full and (self._frames or self._input):
                if not self._frames:
                    self._parse()
                while left > 0 and self._frames:
                    frame = self._frames.pop(0)
                    left -= 1
                    work += 1 + len(frame.data) // CHARGED_BYTES
                    self._receive_frame(frame)
                if not self._frames:
                    self._flush()
        if work:
            self.charge(work)
        self._continue()

    def _is_throttled(self) -> bool:
        """Whether this turn has to wait for the user's rate; then it is scheduled again."""
        if self._account is None or not self._open:
            return False
        loop = asyncio.get_running_loop()
        delay = self._state.accounts.delay(self._account, loop.time())
        if delay <= 0:
            return False
        metrics.THROTTLED.inc()
        self._transport.pause_reading()
        self._next_turn = loop.call_later(delay, self._take_turn)
        return True

    def _continue(self) -> None:
        """Read on if everything is processed, else schedule another turn. Not while the peer itself does not read."""
        if self._full or self._next_turn is not None:
            return
        if self._frames or self._input:
            self._transport.pause_reading()
            self._next_turn = asyncio.get_running_loop().call_soon(self._take_turn)
        else:
            self._transport.resume_reading()

    def _parse(self) -> None:
        """Parse the next bytes, which answers pings and close frames and checks the order of frames."""
        self._protocol.receive_data(bytes(self._input[:SLICE]))
        self._input = self._input[SLICE:] or NOTHING  # an empty slice would keep the whole buffer
        self._frames.extend(event for event in self._protocol.events_received() if isinstance(event, Frame))
        if self._protocol.state is State.OPEN:
            self._flush()  # a pong goes out before the replies to these frames, a close after them

    def _receive_frame(self, frame: Frame) -> None:
        """Count the frame, and assemble messages."""
        limits = self._state.limits
        self._frame_count += 1
        if not self._open:
            return
        if self._frame_count > (limits.pending_frames if self._account is None else limits.frames):
            self._fail("rate")
        elif frame.opcode is Opcode.BINARY:
            self._fail("not_text")
        elif frame.opcode is Opcode.TEXT or frame.opcode is Opcode.CONT:
            self._fragments.append(bytes(frame.data))
            if len(self._fragments) > limits.fragments:
                self._fail("too_big")
            elif frame.fin:
                self._receive_message(b"".join(self._fragments))
                self._fragments.clear()

    def _receive_message(self, text: bytes) -> None:
        try:
            text.decode()
        except UnicodeDecodeError:
            self._fail("not_utf8")
            return
        if self._handler is not None:
            self._call(self._handler.message_received, text)

    def _call(self, callback: Callable[..., None], *arguments: object) -> None:
        """Call the handler. An exception is a bug and closes this session only."""
        try:
            callback(*arguments)
        except Exception:  # noqa: BLE001 - a bug costs this client only
            self._fail_internally()

    # Outbound.

    def _flush(self) -> None:
        """Send the output of the protocol, and start closing when it has left the open state."""
        writes = self._protocol.data_to_send()
        if data := b"".join(writes):
            self._sent += len(data)
            self._transport.write(data)
        if writes and writes[-1] == SEND_EOF:
            self._transport.write_eof()
        if self._open and self._protocol.state is not State.OPEN:
            self._stop(self._state.clock() + self._state.limits.close_timeout)

    def _stop(self, deadline: float) -> None:
        self._open = False
        self._deadline = deadline
        self._notify_drained()

    def _notify_drained(self) -> None:
        """Wake what waits in `drained`."""
        if self._drained is not None:
            self._drained.set()
            self._drained = None

    def _fail(self, name: str) -> None:
        """Close with the code `name` of CLOSE_CODES and discard further input."""
        if not self._protocol.eof_sent:
            self._protocol.fail(CLOSE_CODES[name].code, name)
            self._flush()

    def _fail_internally(self) -> None:
        log.exception("internal_error", session=self.session)
        self._fail("internal")

    def _ping(self, now: float) -> None:
        self._next_ping = now + self._state.limits.ping_every
        self._pinged_at = now
        self._protocol.send_ping(b"")
        self._flush()
        self._ping_end = self._sent
        self._acked = self._count_acked()

    def _is_ping_in_flight(self) -> bool:
        """Whether the ping may still be on its way to the peer.

        Much data can be queued before the ping, on a slow line. Until the peer has acknowledged the ping, it is
        enough that it acknowledges something, or that the transport is full: `drain_timeout` applies then.
        """
        before, self._acked = self._acked, self._count_acked()
        return self._acked < self._ping_end and (self._acked > before or self._full)

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
        if self._abort_reason in CLOSE_CODES:
            return Close(CLOSE_CODES[self._abort_reason].code, self._abort_reason)
        sent = self._protocol.close_sent
        return Close(int(sent.code), sent.reason) if sent and not self._protocol.close_rcvd_then_sent else None

    def _count_acked(self) -> int:
        """The number of bytes that the peer's kernel has acknowledged; our own kernel can buffer megabytes more."""
        try:
            unacked = fcntl.ioctl(self._transport.connection, termios.TIOCOUTQ, bytes(4))
        except OSError:  # not on this system
            return self._sent - self.queued()
        return self._sent - self.queued() - int.from_bytes(unacked, sys.byteorder)
