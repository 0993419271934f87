"""Server-sent events: a client's connection that only sends, in one response that does not end."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl

from pydantic_core import from_json, to_json

from daemon import metrics
from daemon.core import wire
from daemon.core.change import Topic
from daemon.core.close_codes import Close
from daemon.core.errors import BadFrame, BadToken, ClientFault, NoSuchTopic, TooManyTopics
from daemon.core.event_stream import (
    MEMBERS_OF_HELLO,
    MEMBERS_OF_SUBSCRIBE,
    Place,
    event,
    live_event,
    op_of,
    parse_place,
)
from daemon.gateway.client_connection import ClientConnection
from daemon.gateway.framing import split
from daemon.gateway.http import Page, Request, text_page
from daemon.gateway.state import NEVER, GatewayState, log
from daemon.gateway.transport import Transport
from daemon.logs import correlate

STREAM_PATH: Final = "/v1/stream"
MAX_OTHERS: Final = 64  # parameters of a query beside the topics; there are fewer

HEAD: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store\r\nX-Accel-Buffering: no\r\n"
    b"X-Content-Type-Options: nosniff\r\nConnection: close\r\n"
)
FIRST: Final = b"retry: 1000\n\n"  # milliseconds until a client reconnects, unless a `bye` says otherwise

_STATUS: Final = {"token": 401, "no_such_topic": 404, "too_large": 413, "too_many_connections": 429}
_FAILED: Final = text_page("Internal server error.", 500)
_RESTARTING: Final = text_page("The server is restarting: try again.", 503, {"Retry-After": "1"})


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """What a client asks for: the frames that it would send over a websocket, and the place where it resumes."""

    hello: bytes
    subscribes: list[bytes]
    place: Place


def stream_request(request: Request, max_topics: int) -> StreamRequest | Page:
    """Read the request of an event stream, or return the Page that refuses it."""
    try:
        return _read(request, max_topics)
    except ClientFault as fault:
        metrics.ERRORS.labels(code=fault.code).inc()
        return refusal(wire.error(fault))


def _read(request: Request, max_topics: int) -> StreamRequest:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise BadToken
    topics, parameters = _parameters(request.query, max_topics)
    since, seen = parse_place(request.headers.get("last-event-id", ""))
    hello = {name: parameters[name] for name in MEMBERS_OF_HELLO & parameters.keys()}
    members = {name: _json(text) for name, text in parameters.items() if name in MEMBERS_OF_SUBSCRIBE}
    if (limit := members.get("snapshot", b"")).isdigit():
        members["snapshot"] = b'{"limit":%b}' % limit
    if since:  # the snapshot has been read
        members.pop("snapshot", None)
        hello |= {"since": since} | ({"seen": seen} if seen else {})
    first = to_json({"op": "hello", "token": token.strip(), **hello})
    wire.parse(first)  # so that what is said about `since` is said before anything else
    more = b"".join(b',"%b":%b' % (name.encode(), value) for name, value in members.items())
    subscribes = [
        to_json({"op": "subscribe", "id": n, "topic": topic})[:-1] + more + b"}" for n, topic in enumerate(topics)
    ]
    for frame in subscribes:
        _refuse_unidentified(frame)
    return StreamRequest(
        first,
        subscribes,
        Place(topics, since, seen, snapshot=members.get("snapshot", b"false") != b"false"),
    )


def _refuse_unidentified(frame: bytes) -> None:
    """Raise what is so wrong with a frame that the error about it would not say which one it is about."""
    try:
        wire.parse(frame)
    except ClientFault as fault:
        if fault.frame is None:
            raise


def _parameters(query: str, max_topics: int) -> tuple[list[Topic], Mapping[str, str]]:
    """The topics, each once, and the other parameters of a query."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=2 * max_topics + MAX_OTHERS, errors="strict")
    except ValueError:
        raise BadFrame("the query is malformed, or has too many parameters") from None
    topics = list(dict.fromkeys(Topic(value) for name, value in pairs if name == "topic"))
    others = [(name, value) for name, value in pairs if name != "topic"]
    if not topics:
        raise BadFrame('the parameter "topic" is missing')
    if len(topics) > max_topics:
        raise TooManyTopics(max_topics)
    if unknown := {name for name, _ in others} - MEMBERS_OF_HELLO - MEMBERS_OF_SUBSCRIBE:
        known = ", ".join(sorted({"topic"} | MEMBERS_OF_HELLO | MEMBERS_OF_SUBSCRIBE))
        raise BadFrame(f"there is no parameter {to_json(min(unknown)[:64]).decode()}: the parameters are {known}")
    if len(dict(others)) < len(others):
        raise BadFrame('only "topic" may be given more than once')
    return topics, dict(others)


def _json(text: str) -> bytes:
    """The value of a parameter as JSON: as it was written, for its digits, or if it is no JSON, as a string."""
    try:
        from_json(text)
    except ValueError:
        return to_json(text)
    return text.strip().encode()


def refusal(error: bytes) -> Page:
    """The page for an error frame, whose payload is its body."""
    frame = from_json(error)
    status = _STATUS.get(frame["code"], 503 if frame["retry"] else 400)
    headers = {"Retry-After": "5"} if status in {429, 503} else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Page(status, error + b"\n", "application/json", headers)


class EventStream(ClientConnection):
    """A client that reads server-sent events. Its handler gets the frames that a websocket client would send.

    Nothing is sent until a topic is followed: until then, a refusal is an HTTP response of its own. The stream ends
    when no topic is left.
    """

    __slots__ = ("_close", "_error", "_held", "_later", "_place", "_request", "_shared", "_started", "_topics")

    def __init__(
        self,
        state: GatewayState,
        transport: Transport,
        request: StreamRequest,
        address: str,
        shared: Mapping[str, str],
    ) -> None:
        super().__init__(state, transport, address)
        self._request = request
        self._shared = shared  # headers that let a page of another origin read the answer
        self._place: Place | None = request.place  # None once every topic is live
        self._topics = len(request.subscribes)  # that have not been refused or revoked
        self._held: list[bytes] = []  # events, until the stream has started
        self._error = b""  # the first, which is the answer if no topic can be followed
        self._started = False
        self._later: asyncio.TimerHandle | None = None
        self._close: Close | None = None

    def begin(self) -> None:
        """Open the handler, and say what the client wants."""
        with correlate(self.session):
            self._open_handler()
            self._say(self._request.hello)
        self._subscribe()

    def _subscribe(self) -> None:
        """Follow the topics, as soon as the user's rate allows it."""
        self._later = None
        if self._account is None or not self._open:
            return
        loop = asyncio.get_running_loop()
        delay = self._state.accounts.delay(self._account, loop.time())
        if delay > 0:
            metrics.THROTTLED.inc()
            self._later = loop.call_later(delay, self._subscribe)
            return
        self.charge(1 + len(self._request.subscribes))
        with correlate(self.session):
            for frame in self._request.subscribes:
                self._say(frame)

    def _say(self, text: bytes) -> None:
        if self._open and self._handler is not None:
            self._call(self._handler.message_received, text)

    # The handler's Socket.

    def write(self, frames: bytes) -> int:
        """Write whole, encoded frames in order; does nothing once closing. Returns how many bytes are queued."""
        if not self._open:
            return 0
        if self._place is None:
            data, revoked = self._state.live_events(frames)
            self._topics -= revoked
            self._send(data)
        else:
            for _, payload in split(frames):
                if self._open:
                    self._write_pending(payload)
        if self._open and not self._topics:
            self._end()
        return self._transport.queued

    def _write_pending(self, payload: bytes) -> None:
        """Write one frame while a topic is pending."""
        assert self._place is not None
        place = self._place.after(payload)
        match op_of(payload):
            case b"error":
                self._refused(payload)
            case b"revoked":
                self._topics -= 1
                self._send(event(payload))
            case b"bye":
                self._send(live_event(payload))
            case b"subscribed" if not self._started:
                self._start()
                self._send(event(payload, place))
            case _:
                self._send(event(payload, place))
        if self._place.is_live:
            self._place = None

    def _refused(self, error: bytes) -> None:
        """A topic cannot be followed, or the connection is about to be closed."""
        frame = from_json(error)
        self._topics -= "id" in frame
        self._error = self._error or error
        if frame["retry"] and not self._started:
            self._answer(refusal(error))
            return
        self._send(event(error))
        if frame["retry"]:  # only another request can ask again
            self.close(1013, frame["code"])

    def _end(self) -> None:
        """No topic is left."""
        if self._started:
            self.close(1000, "no_topics")
        else:
            self._answer(refusal(self._error or wire.error(NoSuchTopic())))

    def _start(self) -> None:
        self._started = True
        metrics.EVENT_STREAMS.inc()
        shared = "".join(f"{name}: {value}\r\n" for name, value in self._shared.items()).encode("latin-1")
        self._transport.write(b"".join([HEAD, shared, b"\r\n", FIRST, *self._held]))
        self._held.clear()

    def _send(self, data: bytes) -> None:
        if self._started:
            self._transport.write(data)
        else:
            self._held.append(data)

    def close(self, code: int, reason: str) -> None:
        """End the stream after everything written so far. Only the first call has an effect."""
        if not self._open:
            return
        self._close = Close(code, reason)
        if self._started:
            self._finish(self._state.limits.close_timeout)
        elif self._error and code != 1012:
            self._answer(refusal(self._error))
        else:
            self._answer(_RESTARTING if code == 1012 else _FAILED)

    def _answer(self, page: Page) -> None:
        """Refuse the request."""
        log.debug("client_refused", reason="stream", session=self.session, status=page.status)
        self._transport.write(page.having(self._shared).serialize())
        self._finish(self._state.limits.answer_timeout)

    def _finish(self, timeout: float) -> None:
        """Write nothing more, and discard what arrives: unread data would make the kernel drop the response."""
        self._transport.write_eof()
        self._transport.resume_reading()
        self._stop(self._state.clock() + timeout)

    # The transport's protocol.

    def data_received(self, data: bytes) -> None:
        """Leave it to TCP to hold up what follows the request; once it has been answered, discard it."""
        if self._open:
            self._transport.pause_reading()

    def eof_received(self) -> None:
        """The peer sends nothing more; the transport closes the connection."""

    def connection_lost(self) -> None:
        """Log the end of the connection and tell the handler."""
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if self._started:
            metrics.EVENT_STREAMS.dec()
        super().connection_lost()

    # The gateway's Peer.

    def drain(self, bye: Callable[[], bytes] | None, code: int, reason: str, deadline: float) -> None:
        """Send `bye()` if given, close, and give the peer until `deadline` to close too."""
        super().drain(bye if self._started else None, code, reason, deadline)

    def evict(self) -> None:
        """End the connection at once, because another needs its place."""
        if self._deadline != NEVER:
            self._stop(NEVER)
            self._transport.abort()

    def _end_code(self) -> int:
        return self._close.code if self._close else 1006

    def _closed_by_us(self) -> Close | None:
        return self._close

    def _fail_internally(self) -> None:
        log.exception("internal_error", session=self.session)
        self.close(1011, "internal")
