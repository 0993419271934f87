"""A websocket session: connects a transport, the websockets library's protocol, and the client's handler."""

import asyncio
import logging
import time
from collections.abc import Generator
from functools import partial
from typing import Final

from websockets.extensions import Extension
from websockets.frames import Frame, Opcode
from websockets.protocol import SEND_EOF, Protocol, Side, State
from websockets.streams import StreamReader

from daemon import metrics
from daemon.core.close_codes import CLOSE_CODES, Close
from daemon.gateway.admission import Turn
from daemon.gateway.client_connection import ClientConnection
from daemon.gateway.state import GatewayState, log
from daemon.gateway.transport import Transport
from daemon.logs import correlate

SLICE: Final = 256  # bytes parsed before their frames are processed, or the rest of one frame: 42 pings at most
FRAMES_PER_TURN: Final = 16  # frames processed before other connections have their turn
TURN: Final = 0.000_25  # seconds after which a turn ends before that: a live change may be due in the next one
NOTHING: Final = memoryview(b"")
CHARGED_BYTES: Final = 1024  # a frame counts once towards the user's rate, and once more for each of these
MAX_REASON: Final = 123  # bytes, in a close frame

# The library logs every connection and, at DEBUG, every frame; only its errors are of interest here.
_library_log: Final = logging.getLogger("websockets.server")
_library_log.setLevel(logging.ERROR)


class _Reader(StreamReader):
    """Knows how many bytes the frame that has begun still lacks, as far as its length has arrived."""

    def __init__(self) -> None:
        super().__init__()
        self._wanted = 0

    @property
    def missing(self) -> int:
        return self._wanted - len(self.buffer)

    def at_eof(self) -> Generator[None, None, bool]:
        self._wanted = 0  # the library asks this between two frames
        return super().at_eof()

    def read_exact(self, n: int) -> Generator[None, None, bytearray]:
        self._wanted = n
        return super().read_exact(n)


class _Protocol(Protocol):
    """Lets a peer close in the middle of a message, as RFC 6455 does; the library calls that an error."""

    reader: _Reader

    def __init__(self, max_size: int) -> None:
        super().__init__(Side.SERVER, max_size=max_size, logger=_library_log)
        del self.id  # for logs that are not written; it takes 92 bytes

    def parse(self) -> Generator[None, None, None]:
        self.reader = _Reader()  # the library makes its parser last
        return super().parse()

    def recv_frame(self, frame: Frame) -> None:
        if frame.opcode is Opcode.CLOSE:
            self.current_size = None  # the message will not be completed
        super().recv_frame(frame)


class WebSocketConnection(ClientConnection):
    """A client's connection from the 101 response on.

    What the peer sent is processed in turns of TURN seconds and at most FRAMES_PER_TURN frames, one in each iteration
    of the event loop. Until everything is processed nothing more is read, so a peer that sends too much is held up by
    TCP, and only that peer. A turn also waits while the user has used up its rate, or its share of the processor:
    what follows the `hello` of such a user waits, too.
    """

    __slots__ = (
        "_acked",
        "_deflate",
        "_fragments",
        "_frame_count",
        "_frames",
        "_input",
        "_next_ping",
        "_next_turn",
        "_ping_end",
        "_pinged_at",
        "_protocol",
    )

    def __init__(self, state: GatewayState, transport: Transport, extensions: list[Extension], address: str) -> None:
        super().__init__(state, transport, address)
        self._protocol = _Protocol(state.limits.message_bytes)
        self._protocol.extensions = extensions
        # Inbound.
        self._input = NOTHING  # not parsed yet
        # Tuples, since an empty one takes no memory.
        self._frames: tuple[Frame, ...] = ()  # parsed, but not processed yet
        self._fragments: tuple[bytes, ...] = ()  # of the current message
        self._frame_count = 0  # since the last tick; until the peer is authenticated, since the beginning
        self._next_turn: asyncio.Handle | Turn | None = None  # scheduled because there is more to process
        # Outbound.
        self._deflate = state.deflate if extensions else None
        # Keepalive.
        self._next_ping = self._opened_at + state.limits.ping_every
        self._pinged_at: float | None = None  # when the unanswered ping was sent
        self._ping_end = 0  # bytes written until after the ping
        self._acked = 0  # bytes acknowledged at the last tick with an unanswered ping

    def begin(self, response: bytes, early: bytes) -> None:
        """Send the 101 response and open the handler. `early` is what the peer sent after its request."""
        self._transport.write(response)
        if self._deflate is None:
            self._transport.allow_direct()
        with correlate(self.session):
            self._open_handler()
        if early:
            self.data_received(early)

    # The handler's Socket.

    def write(self, frames: bytes) -> int:
        """Write whole, encoded frames in order; does nothing once closing. Returns how many bytes are queued."""
        if not self._open:
            return 0
        if self._deflate is not None:
            frames = self._deflate(frames)
        return self._transport.write(frames)

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

    def connection_lost(self) -> None:
        """Log the end of the connection and tell the handler."""
        if self._next_turn is not None:
            self._next_turn.cancel()
            self._next_turn = None
        super().connection_lost()
        # Both are in reference cycles with the protocol, which would keep it until the garbage collector runs.
        self._protocol.parser.close()
        self._protocol.parser_exc = None

    # The gateway's Peer.

    def tick(self, now: float) -> None:
        """Send a ping when due, cut the connection if the peer is silent or too slow, and tick the handler."""
        if self._open and self._account is not None:
            self._frame_count = 0
        super().tick(now)

    def _is_alive(self, now: float) -> bool:
        """Send a ping when due, and cut the connection if the peer does not answer it, or has reset it."""
        if self._next_turn is not None and self._transport.end_if_failed():
            return False
        if self._pinged_at is not None:
            if self._next_turn is not None or self._is_ping_in_flight():  # its answer may not have been read yet
                self._pinged_at = now
            elif now >= self._pinged_at + self._state.limits.ping_timeout:
                self.abort("silent")
                return False
        elif now >= self._next_ping:
            self._ping(now)
        return True

    # Inbound.

    def _take_turn(self, *, has_waited: bool = False) -> None:
        """Process some of what the peer sent, and arrange for the rest."""
        self._next_turn = None
        if self._transport.end_if_failed() if has_waited else self._is_throttled():
            return
        work, left, is_new = 0, FRAMES_PER_TURN, self._account is None
        began, end = time.thread_time(), time.monotonic() + TURN
        with correlate(self.session):
            while left > 0 and not self._full and (self._frames or self._input):
                if not self._frames:
                    self._parse()
                while left > 0 and self._frames:
                    frame, self._frames = self._frames[0], self._frames[1:]
                    left -= 1
                    work += 1 + len(frame.data) // CHARGED_BYTES
                    self._receive_frame(frame)
                    frame.data = b""  # the library keeps the last frame until there is another one
                    if time.monotonic() >= end or (is_new and self.delay() > 0):
                        left = 0
                if not self._frames:
                    self._flush()
                    if time.monotonic() >= end:
                        left = 0
        if self._account is not None:
            spent = time.thread_time() - began
            self._state.accounts.charge(self._account, work, time.monotonic(), spent)
        self._continue()

    def _is_throttled(self) -> bool:
        """Whether this turn has to wait for what its user may do; then it is scheduled again."""
        if self._account is None or not self._open:
            return False
        if self.delay() <= 0 and not self._account.waiting:
            return False
        metrics.THROTTLED.inc()
        self._transport.pause_reading()
        self._next_turn = self._state.accounts.wait(self._account, partial(self._take_turn, has_waited=True))
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
        """Parse the next bytes, which answers pings and close frames and checks the order of frames.

        A large frame is one step, but what follows it is not: its last bytes could come with thousands of pings.
        """
        size = max(SLICE, self._protocol.reader.missing)
        self._protocol.receive_data(bytes(self._input[:size]))
        self._input = self._input[size:] or NOTHING  # an empty slice would keep the whole buffer
        self._frames += tuple(event for event in self._protocol.events_received() if isinstance(event, Frame))
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
            self._fragments += (bytes(frame.data),)
            if len(self._fragments) > limits.fragments:
                self._fail("too_big")
            elif frame.fin:
                message, self._fragments = b"".join(self._fragments), ()
                self._receive_message(message)

    def _receive_message(self, text: bytes) -> None:
        try:
            text.decode()
        except UnicodeDecodeError:
            self._fail("not_utf8")
            return
        if self._handler is not None:
            self._call(self._handler.message_received, text)

    # Outbound.

    def _flush(self) -> None:
        """Send the output of the protocol, and start closing when it has left the open state."""
        writes = self._protocol.data_to_send()
        if data := b"".join(writes):
            self._transport.write(data)
        if writes and writes[-1] == SEND_EOF:
            self._transport.write_eof()
        if self._open and self._protocol.state is not State.OPEN:
            self._stop(self._state.clock() + self._state.limits.close_timeout)

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
        self._ping_end = self._transport.written
        self._acked = self._count_acked()

    def _is_ping_in_flight(self) -> bool:
        """Whether the ping may still be on its way to the peer.

        Much data can be queued before the ping, on a slow line. Until the peer has acknowledged the ping, it is
        enough that it acknowledges something, or that the transport is full: `drain_timeout` applies then.
        """
        before, self._acked = self._acked, self._count_acked()
        return self._acked < self._ping_end and (self._acked > before or self._full)

    def _end_code(self) -> int:
        close = self._protocol.close_sent or self._protocol.close_rcvd or Close(1006, "")
        return int(close.code)

    def _closed_by_us(self) -> Close | None:
        sent = self._protocol.close_sent
        return Close(int(sent.code), sent.reason) if sent and not self._protocol.close_rcvd_then_sent else None
