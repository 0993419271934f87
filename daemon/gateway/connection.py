"""One websocket session: the transport below, the library's protocol beside, the attendant above."""

import asyncio
import fcntl
import logging
import sys
import termios
from collections.abc import Callable, Sequence
from typing import Final

from ulid import ULID
from websockets.extensions import Extension
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import SEND_EOF, Protocol, Side, State

from daemon.core.close_codes import CLOSE_CODES, Close
from daemon.core.ports import ClientHandler
from daemon.gateway.limits import MIN_DRAIN_BYTES
from daemon.gateway.state import NEVER, GatewayState, log, peer_name
from daemon.gateway.transport import Transport
from daemon.logs import correlate

SLICE: Final = 16 * 1024  # bytes parsed before the frames among them are counted
MAX_REASON: Final = 123  # bytes, in a close frame

# The library has a line for every connection and, at DEBUG, for every frame; only a bug in it is of interest.
_library_log: Final = logging.getLogger("websockets.server")
_library_log.setLevel(logging.ERROR)


def encode(payload: bytes) -> bytes:
    """The one final, unmasked text frame that carries `payload`; any number of sessions may be written it.

    See RFC 6455, section 5.2. The library's own way takes four times as long.
    """
    size = len(payload)
    if size < 126:
        return b"\x81%c%b" % (size, payload)
    if size < 65_536:
        return b"\x81\x7e%b%b" % (size.to_bytes(2), payload)
    return b"\x81\x7f%b%b" % (size.to_bytes(8), payload)


class WebSocketConnection:
    """The `Socket` of one attendant, from the 101 to the end, and the `User` of its transport.

    It is open until somebody starts to close it: this side, the peer, or an error. From then on nothing is
    written or passed on, and `deadline` says when it is cut if the peer does not play its part.
    """

    __slots__ = (
        "_cut",
        "_deadline",
        "_deflate",
        "_fragments",
        "_frames",
        "_full",
        "_full_since",
        "_full_taken",
        "_handler",
        "_next_ping",
        "_open",
        "_ping_end",
        "_pinged",
        "_protocol",
        "_room",
        "_sent",
        "_since",
        "_state",
        "_taken",
        "_transport",
        "session",
    )

    def __init__(self, state: GatewayState, transport: Transport, extensions: list[Extension]) -> None:
        now = state.clock()
        self.session = str(ULID())
        self._state = state
        self._transport = transport
        self._protocol = Protocol(Side.SERVER, max_size=state.limits.message_bytes, logger=_library_log)
        self._protocol.extensions = extensions
        self._handler: ClientHandler | None = None
        self._open = True
        self._cut = ""  # why it was cut
        self._since = now
        self._deadline = 0.0
        # Inbound: fragments of the message that is coming in.
        self._fragments: list[bytes] = []
        self._frames = 0
        # Outbound.
        self._deflate = state.deflate if extensions else None
        self._full = False
        self._full_since = now  # when the transport became full, or LEAST bytes less
        self._full_taken = 0  # what the peer had taken then
        self._room: asyncio.Event | None = None
        self._sent = 0
        # Keepalive.
        self._next_ping = now + state.limits.ping_every
        self._pinged: float | None = None  # when, if it has not been answered
        self._ping_end = 0  # what `_sent` was behind the ping
        self._taken = 0

    def begin(self, answer: bytes, early: bytes) -> None:
        """Send the answer to the request and let the attendant in. `early` is what the peer sent behind it."""
        self._state.add(self)
        self._state.sessions += 1
        self._sent += len(answer)
        self._transport.write(answer)
        with correlate(self.session):
            log.info("client_connected", session=self.session, peer=peer_name(self._transport.connection))
            try:
                self._handler = self._state.open_client(self)
            except Exception:  # noqa: BLE001 - see _ask
                self._fail_internally()
        if early:
            self.data_received(early)

    # The Socket of the attendant.

    def write(self, frames: bytes) -> int:
        """Hand whole, already encoded frames to the peer, in order. Returns how many bytes wait for it to read."""
        if not self._open:
            return 0
        if self._deflate is not None:
            frames = self._deflate(frames)
        self._sent += len(frames)
        return self._transport.write(frames)

    def queued(self) -> int:
        """How many bytes wait for the peer to read."""
        return self._transport.queued

    async def drained(self) -> None:
        """Wait until the peer has taken most of what was written; at once if little waits, or it has gone."""
        if not self._full or not self._open:
            return
        if self._room is None:
            self._room = asyncio.Event()
        await self._room.wait()

    def close(self, code: int, reason: str) -> None:
        """Send a close frame behind what was written, and end. The first call counts, later ones do nothing."""
        if self._open and self._protocol.state is State.OPEN:
            self._protocol.send_close(code, reason.encode()[:MAX_REASON].decode(errors="ignore"))
            self._flush()

    # The user of the transport.

    def data_received(self, data: bytes) -> None:
        """Bytes came in: whatever they are, the peer lives."""
        self._pinged = None
        for start in range(0, len(data), SLICE):
            self._protocol.receive_data(data[start : start + SLICE])
            frames = self._protocol.events_received()
            if self._protocol.state is State.OPEN:
                self._flush()  # a pong does not wait for the answers to what came with its ping; a close does
            with correlate(self.session):
                self._take(frames)
            self._flush()
            self._frames += len(frames)
            if self._frames > self._state.limits.frames:
                self._fail("rate")

    def eof_received(self) -> None:
        """The peer will send nothing more; the transport closes."""
        self._protocol.receive_eof()
        self._flush()

    def pause_writing(self) -> None:
        """The peer does not read: read nothing from it either, or its pings would fill the memory with pongs."""
        self._full = True
        self._full_since = self._state.clock()
        self._full_taken = self._count_taken()
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """There is room."""
        self._full = False
        self._wake()
        self._transport.resume_reading()

    def connection_lost(self) -> None:
        """The end, however it came."""
        self._shut(NEVER)
        self._state.sessions -= 1
        self._state.discard(self)
        close = self._protocol.close_sent or self._protocol.close_rcvd or Close(1006, "")
        seconds = round(self._state.clock() - self._since, 3)
        with correlate(self.session):
            log.info("client_disconnected", session=self.session, code=int(close.code), seconds=seconds)
            if self._handler is not None:
                self._ask(self._handler.connection_lost, self._why())
                self._handler = None
        # Both refer to the protocol, which refers to them: it would wait for the garbage collector.
        self._protocol.parser.close()
        self._protocol.parser_exc = None

    # The peer of the gateway.

    def tick(self, now: float) -> None:
        """Ping, find out who is silent, cut what should have ended, and tell the attendant the time."""
        if not self._open:
            if now >= self._deadline:
                self.abort("close_timeout")
            return
        self._frames = 0
        if self._full and not self._keeps_pace(now):
            self.abort("too_slow")
            return
        if self._pinged is not None:
            if self._is_excused():
                self._pinged = now
            elif now >= self._pinged + self._state.limits.ping_timeout:
                self.abort("silent")
                return
        elif now >= self._next_ping:
            self._ping(now)
        if self._handler is not None:
            self._ask(self._handler.tick, now)

    def drain(self, bye: Callable[[], bytes] | None, code: int, reason: str, deadline: float) -> None:
        """Say bye and close; the peer has until `deadline`."""
        if self._open:
            if bye is not None:
                self.write(bye())
            self.close(code, reason)
            if self._deadline != NEVER:
                self._deadline = deadline

    def abort(self, reason: str) -> None:
        """Cut the connection now, whatever waits to be sent."""
        if self._deadline != NEVER:
            self._cut = reason
            self._shut(NEVER)
            with correlate(self.session):
                log.warning("client_aborted", session=self.session, reason=reason)
            self._state.aborted[reason] += 1
            self._transport.abort()

    # In.

    def _take(self, frames: Sequence[Request | Response | Frame]) -> None:
        """Make messages of frames. The protocol has answered pings and close frames, and checked the order."""
        for frame in frames:
            if not self._open or not isinstance(frame, Frame):
                return
            if frame.opcode is Opcode.BINARY:
                self._fail("not_text")
            elif frame.opcode is Opcode.TEXT or frame.opcode is Opcode.CONT:
                self._fragments.append(bytes(frame.data))
                if len(self._fragments) > self._state.limits.fragments:
                    self._fail("too_big")
                elif frame.fin:
                    self._message(b"".join(self._fragments))
                    self._fragments.clear()

    def _message(self, text: bytes) -> None:
        try:
            text.decode()
        except UnicodeDecodeError:
            self._fail("not_utf8")
            return
        if self._handler is not None:
            self._ask(self._handler.message_received, text)

    def _ask(self, question: Callable[..., None], *arguments: object) -> None:
        """Call the attendant. One that raises has a bug: its client is closed, and no other notices."""
        try:
            question(*arguments)
        except Exception:  # noqa: BLE001 - whatever it is, it stays with this client
            self._fail_internally()

    # Out.

    def _flush(self) -> None:
        """Send what the protocol has to say, and notice when it has left the open state."""
        writes = self._protocol.data_to_send()
        if data := b"".join(writes):
            self._sent += len(data)
            self._transport.write(data)
        if writes and writes[-1] == SEND_EOF:
            self._transport.write_eof()
        if self._open and self._protocol.state is not State.OPEN:
            self._shut(self._state.clock() + self._state.limits.close_timeout)

    def _shut(self, deadline: float) -> None:
        self._open = False
        self._deadline = deadline
        self._wake()

    def _wake(self) -> None:
        """Let go on who waits in `drained`."""
        if self._room is not None:
            self._room.set()
            self._room = None

    def _fail(self, name: str) -> None:
        """Close for a fault, and hear nothing more from this peer."""
        if not self._protocol.eof_sent:
            self._protocol.fail(CLOSE_CODES[name].code, name)
            self._flush()

    def _fail_internally(self) -> None:
        log.exception("internal_error", session=self.session)
        self._fail("internal")

    def _ping(self, now: float) -> None:
        self._next_ping = now + self._state.limits.ping_every
        self._pinged = now
        self._protocol.send_ping(b"")
        self._flush()
        self._ping_end = self._sent
        self._taken = self._count_taken()

    def _is_excused(self) -> bool:
        """May a peer be waited for that has not answered the ping?

        Until it has the ping, as long as it takes something, or is given the time that a full transport has: what
        is sent before the ping may be long, and the line slow.
        """
        before, self._taken = self._taken, self._count_taken()
        return self._taken < self._ping_end and (self._taken > before or self._full)

    def _keeps_pace(self, now: float) -> bool:
        """Does the peer read, slowly as it may, while the transport is full?"""
        if now >= self._full_since + self._state.limits.drain_timeout:
            taken = self._count_taken()
            if taken < self._full_taken + MIN_DRAIN_BYTES:
                return False
            self._full_since, self._full_taken = now, taken
        return True

    def _why(self) -> Close | None:
        """Why this side has ended the connection; None if it has not."""
        if self._cut in CLOSE_CODES:
            return Close(CLOSE_CODES[self._cut].code, self._cut)
        sent = self._protocol.close_sent
        return Close(int(sent.code), sent.reason) if sent and not self._protocol.close_rcvd_then_sent else None

    def _count_taken(self) -> int:
        """How many bytes the peer's kernel has acknowledged; our own kernel's buffer can hold megabytes."""
        try:
            held = fcntl.ioctl(self._transport.connection, termios.TIOCOUTQ, bytes(4))
        except OSError:  # not on this system
            return self._sent - self.queued()
        return self._sent - self.queued() - int.from_bytes(held, sys.byteorder)
