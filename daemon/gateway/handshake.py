"""A connection until it is known what it wants: a page, or a websocket."""

from collections.abc import Callable
from typing import Final

from daemon.gateway.connection import WebSocketConnection
from daemon.gateway.http import Page, Request, read_head, text_page
from daemon.gateway.state import NEVER, GatewayState, log, peer_name
from daemon.gateway.transport import Transport
from daemon.gateway.upgrade import upgrade

PATH: Final = "/v1"
MAX_LOGGED: Final = 200  # characters of what a stranger sent

FULL: Final = text_page("All connections are taken: come back later.", 503, {"Retry-After": "5"})
_GOING: Final = text_page("The server restarts: come back.", 503, {"Retry-After": "1"})
_GET_ONLY: Final = text_page("A websocket is opened with GET.", 405, {"Allow": "GET"})
_NO_SOCKET: Final = text_page(f"There is no websocket here, but at {PATH}.", 404)
_UNFINISHED: Final = text_page("The request is not complete.", 400)
_FAILED: Final = text_page("The page could not be made.", 500)


class Handshake:
    """Reads one request, and answers it with a page or becomes a `Connection`.

    After a page it reads on until the peer has closed, for a socket that is closed with unread bytes takes its
    answer with it. `deadline` bounds both: the wait for the request, and the wait for the peer.
    """

    __slots__ = ("_answered", "_deadline", "_received", "_state", "_transport")

    def __init__(self, state: GatewayState, transport: Transport) -> None:
        self._state = state
        self._transport = transport
        self._received = bytearray()
        self._answered = False
        self._deadline = state.clock() + state.limits.open_timeout

    def data_received(self, data: bytes) -> None:
        """Bytes came in; what comes behind the request of a page is thrown away."""
        if self._answered:
            return
        self._received += data
        request = read_head(self._received)
        if isinstance(request, Page):
            self._refuse(request)
        elif request is not None:
            self._respond(request)

    def eof_received(self) -> None:
        """The peer has said all; the transport closes once the answer is out."""
        if self._received and not self._answered:
            self._refuse(_UNFINISHED)

    def pause_writing(self) -> None:
        """The page is large."""

    def resume_writing(self) -> None:
        """Most of the page is on its way."""

    def connection_lost(self) -> None:
        """The end."""
        self._state.discard(self)

    def tick(self, now: float) -> None:
        """Cut a peer that takes too long."""
        if now >= self._deadline:
            self.abort("answer_timeout" if self._answered else "open_timeout")

    def drain(self, bye: Callable[[], bytes] | None, code: int, reason: str, deadline: float) -> None:
        """The server goes, before the peer has finished asking."""
        if not self._answered:
            self._refuse(_GOING)
        if self._deadline != NEVER:
            self._deadline = deadline
            self._transport.close()

    def abort(self, reason: str) -> None:
        """Cut the connection now, whatever waits to be sent."""
        if self._deadline != NEVER:
            self._deadline = NEVER
            log.info("client_aborted", peer=peer_name(self._transport.connection), reason=reason)
            self._state.aborted[reason] += 1
            self._transport.abort()

    def _respond(self, request: Request) -> None:
        with_body = request.method != "HEAD"
        if request.path == PATH and request.method == "GET":
            self._upgrade(request)
        elif request.path == PATH:
            self._refuse(_GET_ONLY, with_body=with_body)
        elif request.lists("upgrade", "websocket"):
            self._refuse(_NO_SOCKET, with_body=with_body)
        else:
            self._answer(self._page(request), with_body=with_body)

    def _page(self, request: Request) -> Page:
        try:
            return self._state.site.answer(request.method, request.path)
        except Exception:  # noqa: BLE001 - whatever it is, it stays with this page
            log.exception("internal_error", path=request.path[:MAX_LOGGED])
            return _FAILED

    def _upgrade(self, request: Request) -> None:
        if self._state.sessions >= self._state.max_sessions:
            self._refuse(FULL)
            return
        accepted = upgrade(request, deflate=self._state.deflate is not None)
        if isinstance(accepted, Page):
            self._refuse(accepted)
            return
        connection = WebSocketConnection(self._state, self._transport, accepted.extensions)
        self._transport.protocol = connection
        connection.begin(accepted.answer, bytes(self._received[request.size :]))
        self._state.discard(self)

    def _refuse(self, page: Page, *, with_body: bool = True) -> None:
        reason = page.body.decode(errors="replace").strip()[:MAX_LOGGED]
        log.info("client_refused", peer=peer_name(self._transport.connection), status=page.status, reason=reason)
        self._answer(page, with_body=with_body)

    def _answer(self, page: Page, *, with_body: bool = True) -> None:
        self._answered = True
        self._received.clear()
        self._deadline = self._state.clock() + self._state.limits.answer_timeout
        self._transport.write(page.serialize(with_body=with_body))
        self._transport.write_eof()
