"""Plain HTTP on bytes, without a socket: parse one request, make one page, and the connection ends."""

import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

MAX_LINE: Final = 8190  # bytes of the request line or of one header, without its CRLF
MAX_HEADERS: Final = 128
MAX_HEAD: Final = 32 * 1024  # bytes; bounds the memory of a connection before its request is complete
MAX_LENGTH_DIGITS: Final = 20  # of a Content-Length; more say nothing more
MAX_BODY: Final = 16 * 1024  # bytes; only a POST has a body

# The grammar of RFC 9110 and RFC 9112, read strictly: a proxy and this parser must never read a request differently.
_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]"  # noqa: S105 - not a password
_TOKEN_START: Final = re.compile(_TOKEN.encode())
_REQUEST_LINE: Final = re.compile(rf"({_TOKEN}{{1,32}}) ([\x21-\x7e]+) HTTP/([0-9]\.[0-9])")
_ABSOLUTE: Final = re.compile(r"https?://([^/?#]+)(.*)", re.IGNORECASE)
_HOST: Final = re.compile(r"(?:[A-Za-z0-9._~%!$&'()*+;=-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_HEADER: Final = re.compile(rf"({_TOKEN}+):[ \t]*([\t\x20-\x7e\x80-\xff]*)")

_COMMON: Final = {
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Connection": "close",
}


@dataclass(frozen=True, slots=True)
class Page:
    """One response: HTTP status, body, MIME type, and headers beyond those of every response."""

    status: int
    body: bytes
    content_type: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def having(self, headers: Mapping[str, str]) -> "Page":
        """This page with more headers."""
        return replace(self, headers={**self.headers, **headers})

    def serialize(self, *, with_body: bool = True) -> bytes:
        """The whole response. For HEAD, leave out the body; Content-Length still gives its size."""
        headers = {
            "Date": formatdate(usegmt=True),
            "Content-Type": self.content_type,
            "Content-Length": str(len(self.body)),
            **_COMMON,
            **self.headers,
        }
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        return head + self.body if with_body else head


def is_preflight(request: "Request") -> bool:
    """Whether a browser asks what the page of another origin may request."""
    return request.method == "OPTIONS" and "access-control-request-method" in request.headers


def text_page(text: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Page:
    """A page of plain text that ends in one newline."""
    return Page(status, f"{text.rstrip()}\n".encode(), "text/plain; charset=utf-8", headers or {})


def json_page(obj: Any, status: int = 200) -> Page:  # noqa: ANN401 - whatever json takes
    """A page of `obj` as compact JSON. Raises ValueError for NaN, TypeError for what JSON cannot represent."""
    body = json.dumps(obj, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Page(status, body.encode(), "application/json")


def html_page(text: str) -> Page:
    """A page of HTML. It may load files of its own origin and open websockets; inline code and styles are blocked."""
    return Page(200, text.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": _POLICY})


_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self' ws: wss:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def static_pages(folder: Path) -> dict[str, Page]:
    """The pages of `folder`: index.html at `/`, NAME.html at `/NAME`, scripts and style sheets at their paths.

    Other files are not served. All are read here, so a request never touches the file system. Raises OSError.
    """
    pages = {"/": html_page((folder / "index.html").read_text(encoding="utf-8"))}
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        if file.suffix == ".html" and file.name != "index.html":
            pages[f"/{path.with_suffix('').as_posix()}"] = html_page(file.read_text(encoding="utf-8"))
        elif content_type := _CONTENT_TYPES.get(file.suffix):
            pages[f"/{path.as_posix()}"] = Page(200, file.read_bytes(), content_type)
    return pages


def script_page(file: Path) -> Page:
    """One script, which pages of any origin may import: it is the same for everybody. Raises OSError."""
    return Page(200, file.read_bytes(), _CONTENT_TYPES[".js"], {"Access-Control-Allow-Origin": "*"})


_CONTENT_TYPES: Final = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}


NOT_FOUND: Final = text_page("Not found.", 404)
_ELSEWHERE: Final = text_page("This page is for operators: it is at ROWCAST_METRICS_LISTEN.", 404)


class Site:
    """Pages by path, held in memory, and handlers of requests by method and path.

    A callable makes a fresh page for each request. It runs on the event loop and must not block. A handler may wait.
    """

    def __init__(
        self,
        pages: Mapping[str, Page | Callable[[], Page]],
        handlers: "Mapping[tuple[str, str], Handler] | None" = None,
    ) -> None:
        self._pages = dict(pages)
        self._handlers = dict(handlers or {})

    def without(self, moved: Sequence[str], changed: Mapping[str, Callable[[Page], Page]]) -> "Site":
        """This site for the listener of clients: what begins with one of `moved` is elsewhere, and pages at the
        paths of `changed` are made from those here.
        """

        def is_moved(path: str) -> bool:
            return any(path == begin or path.startswith(f"{begin}/") for begin in moved)

        pages: dict[str, Page | Callable[[], Page]] = {
            path: _ELSEWHERE if is_moved(path) else page for path, page in self._pages.items()
        }
        pages |= {path: _ELSEWHERE for _, path in self._handlers if is_moved(path)}
        for path, change in changed.items():
            pages[path] = lambda path=path, change=change: change(self.answer("GET", path))  # type: ignore[misc]
        return Site(pages, {place: handler for place, handler in self._handlers.items() if not is_moved(place[1])})

    def handler(self, method: str, path: str) -> "Handler | None":
        """What answers such requests, if it is not one of the pages."""
        return self._handlers.get((method, path))

    def answer(self, method: str, path: str) -> Page:
        """The page at `path`, or an error page: 404 or 405."""
        page = self._pages.get(path)
        if page is None:
            if allowed := [known for known, place in self._handlers if place == path]:
                return text_page(f"Use {' or '.join(allowed)} here.", 405, {"Allow": ", ".join(allowed)})
            return NOT_FOUND
        if method not in {"GET", "HEAD"}:
            return text_page("This page is read-only: use GET or HEAD.", 405, {"Allow": "GET, HEAD"})
        return page if isinstance(page, Page) else page()


@dataclass(frozen=True, slots=True)
class Request:
    """The head of one request.

    `query` is what follows the `?`, still encoded. `version` is 1.0 or 1.1, header names are in lower case, and
    repeated headers are joined by commas. `size` is the length of the head in bytes, and `body_size` that of the body
    behind it.
    """

    method: str
    path: str
    query: str
    version: str
    headers: Mapping[str, str]
    size: int
    body_size: int = 0

    def lists(self, header: str, token: str) -> bool:
        """Whether the comma-separated `header` contains `token` (lower case), ignoring case."""
        return token in {item.strip().lower() for item in self.headers.get(header, "").split(",")}


@dataclass(frozen=True, slots=True)
class Call:
    """A whole request, for a handler. `is_local`: the peer is a process of this machine, such as a reverse proxy.

    `charge` takes the seconds of CPU that answering it costs.
    """

    request: Request
    body: bytes
    is_local: bool
    charge: Callable[[float], None] = lambda _: None


Handler = Callable[[Call], Awaitable[Page]]
"""Answers a request; it runs on the event loop."""


def read_head(data: bytearray) -> Request | Page | None:
    """Parse a request from the bytes received so far: None while it is incomplete, an error Page if it is refused."""
    if data and not _TOKEN_START.match(data):
        return text_page("This is not HTTP.", 400)  # usually TLS: refuse at once, not after a timeout
    if len(data) >= MAX_LINE + 2 and data.find(b"\n", 0, MAX_LINE + 2) < 0:
        return _LINE_TOO_LONG
    end = data.find(b"\r\n\r\n", 0, MAX_HEAD)
    if end >= 0:
        return _parse(data[:end].decode("latin-1"), end + 4)
    if len(data) >= MAX_HEAD or len(data) - data.rfind(b"\n") > MAX_LINE + 2:
        return _HEADERS_TOO_LARGE
    return None


_LINE_TOO_LONG: Final = text_page(f"The request line is longer than {MAX_LINE} bytes.", 414)
_HEADERS_TOO_LARGE: Final = text_page(
    f"The limit is {MAX_HEADERS} headers of {MAX_LINE} bytes, {MAX_HEAD} bytes in all.", 431
)


def _parse(head: str, size: int) -> Request | Page:
    first, *lines = head.split("\r\n")
    if not (line := _REQUEST_LINE.fullmatch(first)):
        return text_page("The request line is malformed.", 400)
    method, target, version = line.groups()
    if version not in {"1.0", "1.1"}:
        return text_page("Only HTTP/1.0 and HTTP/1.1 are supported.", 505)
    if len(lines) > MAX_HEADERS or max(map(len, lines), default=0) > MAX_LINE:
        return _HEADERS_TOO_LARGE
    headers: dict[str, str] = {}
    for line in map(_HEADER.fullmatch, lines):
        if line is None:
            return text_page("A header is malformed.", 400)
        name, value = line[1].lower(), line[2].rstrip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if (version == "1.1" and "host" not in headers) or not _HOST.fullmatch(headers.get("host", "")):
        return text_page("Host must occur once, with a name or an address.", 400)  # two are joined by a comma
    body_size = _body_size(method, headers)
    if isinstance(body_size, Page):
        return body_size
    if absolute := _ABSOLUTE.fullmatch(target):
        headers["host"], target = absolute[1], absolute[2] if absolute[2].startswith("/") else f"/{absolute[2]}"
        if not _HOST.fullmatch(headers["host"]):
            return text_page("The request line is malformed.", 400)
    path, _, query = target.partition("?")
    return Request(method, path, query, version, headers, size, body_size)


def _body_size(method: str, headers: Mapping[str, str]) -> int | Page:
    """The size of the body. Refuses a body of any request but a POST, a large one, and an ambiguous length."""
    if "transfer-encoding" in headers:
        return text_page("Transfer-Encoding is not supported.", 501)
    if "content-length" not in headers:
        return 0
    lengths = {length.strip() for length in headers["content-length"].split(",")}
    if not all(length.isascii() and length.isdigit() for length in lengths) or len(lengths) > 1:
        return text_page("Content-Length is malformed.", 400)
    length = int(lengths.pop().lstrip("0")[:MAX_LENGTH_DIGITS] or "0")
    if length and method != "POST":
        return text_page("Only a POST may have a body.", 413)
    if length > MAX_BODY:
        return text_page(f"A body may have {MAX_BODY} bytes.", 413)
    return length
