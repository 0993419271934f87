"""Plain HTTP over real sockets. The pages themselves are tested in test_pages.py."""

import asyncio

import pytest

from daemon.gateway.http import MAX_BODY, MAX_HEAD, MAX_HEADERS, MAX_LINE, Call, Page, html_page, json_page, text_page
from tests.gateway.peers import Server, request, serving, until


def fail() -> Page:
    raise RuntimeError("a bug in a page")


PAGES = {
    "/": lambda: html_page("<p>hello</p>"),
    "/healthz": lambda: text_page("ok"),
    "/readyz": lambda: json_page({"ready": False}, 503),
    "/broken": fail,
    "/large": lambda: Page(200, b"x" * 8_000_000, "application/octet-stream"),
}


async def fetch(server: Server, data: bytes, *, half_close: bool = False) -> tuple[int, bytes, bytes]:
    """Send `data`. Returns status, remaining head and body of the single response."""
    peer = await server.raw()
    await peer.send(data)
    if half_close:
        peer.half_close()
    response = await peer.read_all()
    assert not peer.was_reset, "a reset can destroy the response"
    peer.close()
    head, found, body = response.partition(b"\r\n\r\n")
    assert found, response
    first, _, rest = head.partition(b"\r\n")
    assert b"\r\nConnection: close" in b"\r\n" + rest
    assert first.startswith(b"HTTP/1.1 ")
    return int(first.split()[1]), rest, body


async def test_a_page_is_served_and_the_connection_closed() -> None:
    async with serving(PAGES) as server:
        status, head, body = await fetch(server, request("GET /healthz", {"Host": "x"}))
        assert (status, body) == (200, b"ok\n")
        assert b"Content-Length: 3" in head
        await until(lambda: server.gateway.sockets == 0)
        assert server.gateway.aborted == {}


async def test_a_page_is_made_afresh_for_each_request() -> None:
    numbers = iter(range(10))
    async with serving({"/": lambda: text_page(str(next(numbers)))}) as server:
        assert [(await fetch(server, request("GET /")))[2] for _ in range(3)] == [b"0\n", b"1\n", b"2\n"]


GET_ROOT = request("GET /")
CASES = {
    "an unknown path": (request("GET /nowhere"), 404),
    "a path that is not normalised": (request("GET /./healthz"), 404),
    "a path that is not decoded": (request("GET /%68ealthz"), 404),
    "a path traversal": (request("GET /../../etc/passwd"), 404),
    "a query": (request("GET /healthz?full=1&x=../.."), 200),
    "an absolute target": (request("GET http://x/healthz"), 200),
    "an absolute target without a path": (request("GET HTTP://x?y"), 200),
    "an absolute target with a user": (request("GET http://a@x/healthz"), 400),
    "HTTP/1.1 without Host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET /healthz HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400),
    "a Host with a path": (request("GET /healthz", {"Host": "x/y"}), 400),
    "an empty Host": (request("GET /healthz", {"Host": ""}), 200),
    "an IPv6 address as Host": (request("GET /healthz", {"Host": "[::1]:8787"}), 200),
    "HTTP/1.0 without Host": (b"GET /healthz HTTP/1.0\r\n\r\n", 200),
    "an upgrade to something else": (request("GET /healthz", {"Connection": "Upgrade", "Upgrade": "h2c"}), 200),
    "POST": (request("POST /healthz"), 405),
    "PUT with a body": (request("PUT /healthz", {"Content-Length": "3"}) + b"abc", 413),
    "OPTIONS": (request("OPTIONS /healthz"), 405),
    "an unknown method": (request("BREW /healthz"), 405),
    "HEAD of nothing": (request("HEAD /nowhere"), 404),
    "a body": (request("GET /healthz", {"Content-Length": "5"}) + b"hello", 413),
    "an empty body": (request("GET /healthz", {"Content-Length": "0"}), 200),
    "a length that is not a number": (request("GET /healthz", {"Content-Length": "+0"}), 400),
    "two lengths": (b"GET / HTTP/1.1\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\nhello", 400),
    "a chunked body": (request("GET /healthz", {"Transfer-Encoding": "chunked"}) + b"0\r\n\r\n", 501),
    "HTTP/1.0": (request("GET /healthz", version="HTTP/1.0"), 200),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "a request line of one word": (b"hello\r\n\r\n", 400),
    "two spaces": (b"GET  / HTTP/1.1\r\n\r\n", 400),
    "a trailing space": (b"GET / HTTP/1.1 \r\n\r\n", 400),
    "a path beyond ASCII": ("GET /grüße HTTP/1.1\r\n\r\n".encode(), 400),
    "a NUL": (b"GET /\0 HTTP/1.1\r\n\r\n", 400),
    "a header without a colon": (b"GET / HTTP/1.1\r\nhello\r\n\r\n", 400),
    "a header without a name": (b"GET / HTTP/1.1\r\n: x\r\n\r\n", 400),
    "a space before the colon": (b"GET / HTTP/1.1\r\nTransfer-Encoding : chunked\r\n\r\n", 400),
    "a folded header": (b"GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n", 400),
    "a bare CR in a header": (b"GET / HTTP/1.1\r\nA: b\rc\r\n\r\n", 400),
    "a bare LF in a header": (b"GET / HTTP/1.1\r\nA: b\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "the beginning of TLS": (b"\x16\x03\x01\x02\x00\x01\x00", 400),
    "the longest request line": (request("GET /healthz?" + (MAX_LINE - len("GET /healthz? HTTP/1.1")) * "x"), 200),
    "a request line too long": (request("GET /?" + MAX_LINE * "x"), 414),
    "an endless request line": (b"GET /" + (MAX_LINE + 2) * b"x", 414),
    "a header too long": (request("GET /", {"A": MAX_LINE * "x"}), 431),
    "an endless header": (b"GET / HTTP/1.1\r\nA: " + (MAX_LINE + 2) * b"x", 431),
    "the maximum number of headers": (request("GET /", {f"A{n}": "x" for n in range(MAX_HEADERS - 1)}), 200),
    "one header too many": (request("GET /", {f"A{n}": "x" for n in range(MAX_HEADERS + 1)}), 431),
    "a head too large": (request("GET /", {f"A{n}": 8000 * "x" for n in range(5)}), 431),
    "an endless head": (b"GET / HTTP/1.1\r\n" + MAX_HEAD * b"A: x\r\n", 431),
    "a page that fails": (request("GET /broken"), 500),
    "a page with another status": (request("GET /readyz"), 503),
}


@pytest.mark.parametrize(("sent", "status"), CASES.values(), ids=CASES.keys())
async def test_every_request_gets_its_response_and_is_closed(sent: bytes, status: int) -> None:
    async with serving(PAGES) as server:
        assert (await fetch(server, sent))[0] == status
        await until(lambda: server.gateway.sockets == 0)


@pytest.mark.parametrize(("sent", "status"), CASES.values(), ids=CASES.keys())
async def test_a_client_that_half_closes_gets_its_response_too(sent: bytes, status: int) -> None:
    async with serving(PAGES) as server:
        assert (await fetch(server, sent, half_close=True))[0] == status


async def test_head_has_the_length_of_the_page_and_no_body() -> None:
    async with serving(PAGES) as server:
        _, got, body = await fetch(server, request("GET /"))
        status, head, nothing = await fetch(server, request("HEAD /"))
        assert (status, nothing) == (200, b"")
        assert f"Content-Length: {len(body)}".encode() in head
        undated = [line for line in got.split(b"\r\n") if not line.startswith(b"Date")]
        assert [line for line in head.split(b"\r\n") if not line.startswith(b"Date")] == undated


async def test_head_has_the_length_of_what_a_handler_makes_and_no_body() -> None:
    places = ("GET", "/echo"), ("HEAD", "/echo")
    async with serving(PAGES, handle=dict.fromkeys(places, echo_body)) as server:
        _, got, body = await fetch(server, request("GET /echo"))
        status, head, nothing = await fetch(server, request("HEAD /echo"))
        assert (200, b"") == (status, nothing)
        assert [f"Content-Length: {len(body)}".encode() in lines for lines in (got, head)] == [True, True]
        assert b"Allow: GET, HEAD" in (await fetch(server, request("DELETE /echo")))[1]


async def test_a_refused_method_gets_the_list_of_allowed_ones() -> None:
    async with serving(PAGES) as server:
        assert b"Allow: GET, HEAD" in (await fetch(server, request("DELETE /healthz")))[1]


async def test_only_the_first_of_two_requests_in_one_packet_is_answered() -> None:
    async with serving(PAGES) as server:
        status, _, body = await fetch(server, request("GET /healthz") + request("GET /"))
        assert (status, body) == (200, b"ok\n")


async def test_an_incomplete_request_that_is_half_closed_gets_400() -> None:
    async with serving(PAGES) as server:
        status, _, body = await fetch(server, b"GET /healthz HTTP/1.1\r\nHost:", half_close=True)
        assert (status, body) == (400, b"The request is not complete.\n")


async def test_a_connection_that_is_half_closed_at_once_ends_without_a_response() -> None:
    async with serving(PAGES) as server:
        peer = await server.raw()
        peer.half_close()
        assert await peer.read_all() == b""


async def test_a_large_body_that_is_refused_does_not_destroy_the_response() -> None:
    async with serving(PAGES) as server:
        sent = request("POST /healthz", {"Content-Length": "3000000"}) + 3_000_000 * b"x"
        assert (await fetch(server, sent))[0] == 413


async def test_a_large_page_arrives_whole() -> None:
    async with serving(PAGES) as server:
        assert len((await fetch(server, request("GET /large")))[2]) == 8_000_000


async def test_a_peer_that_does_not_read_its_page_is_cut() -> None:
    async with serving(PAGES, answer_timeout=10.0) as server:
        peer = await server.raw(receive_buffer=4096)
        await peer.send(request("GET /large"))
        await peer.read_some(100)
        server.pass_time(9)
        assert server.gateway.aborted == {}
        server.pass_time(1)
        await until(lambda: server.gateway.sockets == 0)
        assert server.gateway.aborted == {"answer_timeout": 1}


async def test_a_peer_that_keeps_its_side_open_after_a_page_is_cut() -> None:
    async with serving(PAGES, answer_timeout=10.0) as server:
        peer = await server.raw()
        await peer.send(request("GET /healthz"))
        await peer.read_all()
        await peer.send(b"and another thing")
        server.pass_time(10)
        await until(lambda: server.gateway.sockets == 0)


async def test_a_page_does_not_end_a_session() -> None:
    async with serving(PAGES) as server, server.connect() as client:
        await fetch(server, request("GET /broken"))
        await client.send("still here")
        assert await client.recv() == "still here"


# Handlers, which may wait and get a body


async def echo_body(call: Call) -> Page:
    return json_page([call.body.decode(), call.request.query, call.is_local])


HANDLERS = {("POST", "/echo"): echo_body}


def posted(body: bytes, path: str = "/echo", length: int | None = None) -> bytes:
    return request(f"POST {path}", {"Content-Length": str(len(body) if length is None else length)}) + body


async def test_a_handler_gets_the_whole_body_however_it_arrives() -> None:
    async with serving(PAGES, handle=HANDLERS) as server:
        whole = posted(b"hello", "/echo?a=1")
        assert (200, b'["hello","a=1",true]') == (await fetch(server, whole))[::2]
        peer = await server.raw()
        for byte in whole:
            await peer.send(bytes([byte]))
        assert (await peer.read_all()).endswith(b'["hello","a=1",true]')
        peer.close()
        assert (200, b'["","",true]') == (await fetch(server, posted(b"")))[::2]
        assert 200 == (await fetch(server, posted(b"x" * MAX_BODY)))[0]
        await until(lambda: server.gateway.sockets == 0)


async def test_a_body_is_read_only_for_a_handler_and_up_to_its_limit() -> None:
    async with serving(PAGES, handle=HANDLERS) as server:
        for expected, sent in (
            (413, posted(b"x" * (MAX_BODY + 1))),
            (413, posted(b"", length=10**30)),
            (405, posted(b"hello", "/healthz")),
            (404, posted(b"hello", "/nowhere")),
            (405, request("GET /echo")),
            (405, request("DELETE /echo")),
            (200, request("POST /echo", {"Content-Length": "00005"}) + b"hello"),
        ):
            assert expected == (await fetch(server, sent))[0], sent[:60]


async def test_a_body_that_never_arrives_ends_with_the_time_for_the_request() -> None:
    async with serving(PAGES, handle=HANDLERS, open_timeout=5.0) as server:
        peer = await server.raw()
        await peer.send(posted(b"hel", length=5))
        await until(lambda: server.gateway.sockets == 1)
        server.pass_time(6)
        await peer.read_all()
        assert {"open_timeout": 1} == server.gateway.aborted


async def test_a_handler_that_fails_costs_only_its_own_page(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(call: Call) -> Page:
        raise RuntimeError(call.request.path)

    async with serving(PAGES, handle={("GET", "/slow"): broken}) as server:
        assert 500 == (await fetch(server, request("GET /slow")))[0]
        assert 200 == (await fetch(server, request("GET /healthz")))[0]


async def test_a_handler_ends_with_its_connection() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def wait(_: Call) -> Page:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    async with serving(PAGES, handle={("GET", "/slow"): wait}, answer_timeout=5.0) as server:
        peer = await server.raw()
        await peer.send(request("GET /slow"))
        await begun.wait()
        server.pass_time(6)
        await ended.wait()
        assert {"answer_timeout": 1} == server.gateway.aborted
