"""The first request of a connection: a page is served, or a websocket session or an event stream takes over."""

import asyncio
from collections.abc import Callable
from typing import Final

from daemon.gateway.admission import address_group
from daemon.gateway.client_connection import ClientConnection
from daemon.gateway.connection import WebSocketConnection
from daemon.gateway.door import PREFLIGHT, address_in
from daemon.gateway.event_stream import STREAM_PATH, EventStream, stream_request
from daemon.gateway.http import Call, Handler, Page, Request, Site, is_preflight, read_head, text_page
from daemon.gateway.state import NEVER, GatewayState, log, peer_name, refuse
from daemon.gateway.transport import Transport
from daemon.gateway.upgrade import upgrade

PATH: Final = "/v1"
MAX_LOGGED: Final = 200  # characters of client-supplied text in a log line

FULL: Final = text_page("All connections are taken: try again later.", 503, {"Retry-After": "5"})
CROWDED_ADDRESS: Final = text_page(
    "Your address has too many connections: close some first.", 429, {"Retry-After": "5"}
)
_RESTARTING: Final = text_page("The server is restarting: try again.", 503, {"Retry-After": "1"})
_GET_ONLY: Final = text_page("Use GET here.", 405, {"Allow": "GET"})
_NO_WEBSOCKET: Final = text_page(f"The WebSocket endpoint is {PATH}.", 404)
_INCOMPLETE: Final = text_page("The request is not complete.", 400)
_FAILED: Final = text_page("Internal server error.", 500)


class Handshake:
    """Reads one request, then responds with a page or passes the transport to a `ClientConnection`.

    A page that a handler makes is made in a task, which ends with the connection.

    After a page it discards what still arrives until the peer closes: closing a socket with unread data sends a
    reset, which can destroy the response before the peer reads it. `_deadline` limits the wait for the request,
    and then the wait for the peer to close.
    """

    __slots__ = (
        "_answered",
        "_deadline",
        "_is_proxy",
        "_making",
        "_received",
        "_request",
        "_state",
        "_transport",
        "address",
        "is_admin",
    )

    def __init__(
        self, state: GatewayState, transport: Transport, address: str, *, is_admin: bool, is_proxy: bool
    ) -> None:
        self._state = state
        self._transport = transport
        self.address = address
        self.is_admin = is_admin
        self._is_proxy = is_proxy  # and the client's address is not known yet
        self._received = bytearray()
        self._request: Request | None = None  # while its body is incomplete
        self._making: asyncio.Task[None] | None = None  # a page
        self._answered = False
        self._deadline = state.clock() + state.limits.open_timeout

    def data_received(self, data: bytes) -> None:
        """Read the request. Anything that follows the request of a page is discarded."""
        if self._answered or self._making is not None:
            return
        self._received += data
        request = self._request or read_head(self._received)
        if isinstance(request, Page):
            self._refuse(request)
        elif request is not None:
            self._respond(request)

    def eof_received(self) -> None:
        """The peer sends nothing more; the transport closes once the response is out."""
        if self._received and not self._answered and self._making is None:
            self._refuse(_INCOMPLETE)

    def pause_writing(self) -> None:
        """A large page is queued; nothing else will be written."""

    def resume_writing(self) -> None:
        """Most of the page has been sent."""

    def connection_lost(self) -> None:
        """The connection has ended."""
        if self._making is not None:
            self._making.cancel()
        self._state.discard(self)

    def tick(self, now: float) -> None:
        """Cut the connection if its deadline has passed."""
        if now >= self._deadline:
            self.abort("answer_timeout" if self._answered or self._making else "open_timeout")

    def drain(self, bye: Callable[[], bytes] | None, code: int, reason: str, deadline: float) -> None:
        """Refuse an unfinished request, and give the peer until `deadline` to read the response."""
        if not self._answered:
            self._refuse(_RESTARTING, "stopping")
        if self._deadline != NEVER:
            self._deadline = deadline
            self._transport.close()

    def abort(self, reason: str) -> None:
        """Cut the connection now and drop queued data. `reason` is logged and counted."""
        if self._deadline != NEVER:
            self._deadline = NEVER
            log.debug("client_aborted", peer=self._transport.peer_name(), reason=reason)
            self._state.count_abort(reason)
            self._transport.abort()

    def evict(self) -> None:
        """End the connection at once, because another needs its place; the peer is told if it reads."""
        if self._deadline != NEVER:
            self._deadline = NEVER
            if not self._answered:
                self._transport.write(FULL.serialize())
            self._transport.abort()

    def _respond(self, request: Request) -> None:
        with_body = request.method != "HEAD"
        if self._is_proxy and not self._knows_client(request):
            self._refuse(CROWDED_ADDRESS, "address", with_body=with_body)
        elif not self.is_admin and (page := self._state.door.wrong_host(request)):
            self._refuse(page, "host", with_body=with_body)
        elif request.path in {PATH, STREAM_PATH} and (page := self._state.door.wrong_origin(request)):
            self._refuse(page, "origin", with_body=with_body)
        elif request.path == PATH and request.method == "GET":
            self._upgrade(request)
        elif request.path == STREAM_PATH and request.method == "GET":
            self._stream(request)
        elif request.path == STREAM_PATH and is_preflight(request):
            self._answer(Page(200, b"", "text/plain", PREFLIGHT).having(self._state.door.sharing(request)))
        elif request.path in {PATH, STREAM_PATH}:
            self._refuse(_GET_ONLY, with_body=with_body)
        elif request.lists("upgrade", "websocket"):
            self._refuse(_NO_WEBSOCKET, with_body=with_body)
        elif handler := self._site.handler(request.method, request.path):
            self._make(handler, request)
        else:
            self._answer(self._page(request), with_body=with_body)

    def _knows_client(self, request: Request) -> bool:
        """Count the connection under the address of the client that the proxy names. False if it has too many."""
        if self._transport.client or not (client := self._state.door.client_behind_proxy(request.headers)):
            return True
        self._transport.client = client
        address = address_group(client)
        if not self._state.addresses.has_room(address):
            return False
        self._state.leave(self)
        self.address = address
        self._state.add(self)
        return True

    @property
    def _site(self) -> Site:
        return self._state.admin_site if self.is_admin else self._state.site

    def _make(self, handler: Handler, request: Request) -> None:
        """Have the handler make a page, once the body is complete."""
        self._request = request
        body = bytes(self._received[request.size : request.size + request.body_size])
        if len(body) < request.body_size:
            return
        self._received.clear()
        self._deadline = self._state.clock() + self._state.limits.answer_timeout
        is_local = not self._is_proxy and _is_loopback(peer_name(self._transport.connection))
        call = Call(request, body, is_local, self._transport.charge)
        self._making = asyncio.create_task(self._answer_with(handler, call))

    async def _answer_with(self, handler: Handler, call: Call) -> None:
        try:
            page = await handler(call)
        except Exception:  # noqa: BLE001 - a bug costs this page only
            log.exception("internal_error", path=call.request.path[:MAX_LOGGED])
            page = _FAILED
        if not self._answered and self._deadline != NEVER:
            self._answer(page, with_body=call.request.method != "HEAD")

    def _page(self, request: Request) -> Page:
        try:
            return self._site.answer(request.method, request.path)
        except Exception:  # noqa: BLE001 - a bug costs this page only
            log.exception("internal_error", path=request.path[:MAX_LOGGED])
            return _FAILED

    def _upgrade(self, request: Request) -> None:
        if self._state.accounts.full:
            self._refuse(FULL, "full")
            return
        accepted = upgrade(request, deflate=self._state.deflate is not None)
        if isinstance(accepted, Page):
            self._refuse(accepted)
            return
        connection = WebSocketConnection(self._state, self._transport, accepted.extensions, self.address)
        self._pass_to(connection)
        connection.begin(accepted.response, bytes(self._received[request.size :]))

    def _stream(self, request: Request) -> None:
        shared = self._state.door.sharing(request)
        wanted = stream_request(request, self._state.limits.topics)
        if isinstance(wanted, Page):
            self._refuse(wanted.having(shared))
            return
        connection = EventStream(self._state, self._transport, wanted, self.address, shared)
        self._pass_to(connection)
        connection.begin()

    def _pass_to(self, connection: ClientConnection) -> None:
        self._transport.protocol = connection
        self._state.replace(self, connection)

    def _refuse(self, page: Page, reason: str = "request", *, with_body: bool = True) -> None:
        text = page.body.decode(errors="replace").strip()[:MAX_LOGGED]
        refuse(reason, peer=self._transport.peer_name(), status=page.status, answer=text)
        self._answer(page, with_body=with_body)

    def _answer(self, page: Page, *, with_body: bool = True) -> None:
        self._answered = True
        self._received.clear()
        self._deadline = self._state.clock() + self._state.limits.answer_timeout
        self._transport.write(page.serialize(with_body=with_body))
        self._transport.write_eof()


def _is_loopback(peer: str) -> bool:
    """Whether `peer`, as `peer_name` writes it, has an address that only processes of this machine have."""
    host = peer.rpartition(":")[0].strip("[]")
    address = address_in(host)
    return address is not None and address.is_loopback  # behind a Unix socket are the clients of a proxy
