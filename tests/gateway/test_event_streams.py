"""Server-sent events over real sockets: who is let in, when the response begins, and how it ends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from daemon.core import wire
from daemon.core.change import Change, Kind, Position, Seq, Topic
from daemon.core.errors import BadToken, ClientFault, NoSuchTopic, Unavailable
from daemon.gateway.door import Door
from daemon.gateway.framing import encode
from daemon.gateway.http import text_page
from daemon.gateway.live_events import LiveEvents
from tests.gateway.peers import RawPeer, Recorder, Server, request, serving, silence, until
from tests.support.browser import browser_page

BEARER = {"Authorization": "Bearer t"}
AT = Position("e", Seq(1))


def follow(recorder: Recorder, text: bytes) -> None:
    """Answer like a client's handler whose topics can all be read."""
    frame = wire.parse(text)
    if isinstance(frame, wire.Hello):
        recorder.socket.write(
            encode(
                wire.welcome(None, session="s", user="u", pos=AT, heartbeat=1, schema="h", limits={}, expires_in=60.0)
            )
        )
    elif isinstance(frame, wire.Subscribe):
        recorder.socket.write(encode(wire.subscribed(frame.id, Topic(frame.topic), AT)))


async def opened(server: Server, receive_buffer: int | None = None) -> tuple[RawPeer, Recorder]:
    """A peer that reads a stream, and its handler."""
    peer = await server.raw(receive_buffer)
    await peer.send(request("GET /v1/stream?topic=a", BEARER))
    assert (await peer.read_head()).startswith(b"HTTP/1.1 200 ")
    return peer, await server.handlers.get()


@pytest.mark.parametrize(
    ("start", "headers", "status", "expected"),
    [
        ("HEAD /v1/stream?topic=a", BEARER, 405, b""),
        ("POST /v1/stream?topic=a", BEARER, 405, b"GET"),
        ("GET /v1/stream/?topic=a", BEARER, 404, b"Not found"),
        ("GET /v1/stream?topic=a", {}, 401, b'"code":"token"'),
        ("GET /v1/stream?topic=a", {"Authorization": "Basic dTpw"}, 401, b'"code":"token"'),
        ("GET /v1/stream", BEARER, 400, b"topic"),
        ("GET /v1/stream?topic=%ff", BEARER, 400, b"query"),
        ("GET /v1/stream?topic=a&token=t", BEARER, 400, b"token"),
        ("GET /v1/stream?topic=a&snapshot=1&snapshot=2", BEARER, 400, b"only"),
        ("GET /v1/stream?topic=a&numbers=roman", BEARER, 400, b"numbers"),
        ("GET /v1/stream?topic=a&order={}", BEARER, 400, b"order"),
        ("GET /v1/stream?topic=a&snapshot=Infinity", BEARER, 400, b'"code":"bad_json"'),
        (f"GET /v1/stream?topic=a&where=[{'0,' * 300}0]", BEARER, 400, b"256 values"),
        ("GET /v1/stream?topic=a", BEARER | {"Last-Event-ID": "e:1/"}, 200, b""),
        ("GET /v1/stream?topic=a", BEARER | {"Last-Event-ID": "e:1/2"}, 400, b"seen"),
        ("GET /v1/stream?" + "&".join(f"topic={n}" for n in range(129)), BEARER, 400, b"too_many_topics"),
    ],
)
async def test_a_request_is_answered_by_what_is_right_or_wrong_with_it(
    start: str, headers: dict[str, str], status: int, expected: bytes
) -> None:
    async with serving(answer=follow) as server:
        peer = await server.raw()
        await peer.send(request(start, headers))
        head = await peer.read_head()
        assert status == int(head.split()[1])
        if status != 200:
            assert expected in await peer.read_all()
            assert server.handlers.empty()


async def test_a_topic_is_followed_once_and_with_the_members_of_its_request() -> None:
    async with serving(answer=follow) as server:
        peer = await server.raw()
        await peer.send(request("GET /v1/stream?topic=a%2Bb&topic=c&topic=c&snapshot=5&numbers=string", BEARER))
        await peer.read_head()
        recorder = await server.handlers.get()
        hello, first, second = map(wire.parse, recorder.texts)
        assert isinstance(hello, wire.Hello)
        assert ("t", "string") == (hello.token, hello.numbers)
        assert isinstance(first, wire.Subscribe)
        assert isinstance(second, wire.Subscribe)
        assert [("a+b", 0), ("c", 1)] == [(frame.topic, frame.id) for frame in (first, second)]
        assert first.snapshot == wire.SnapshotOptions(limit=5)


@pytest.mark.parametrize(
    ("payload", "code", "status", "header"),
    [
        (wire.error(BadToken()), 4401, 401, b"WWW-Authenticate: Bearer"),
        (wire.error(NoSuchTopic(), 0), None, 404, b"Content-Type: application/json"),
        (wire.error(Unavailable(), 0), None, 503, b"Retry-After: 5"),
    ],
)
async def test_a_refusal_before_the_first_topic_is_an_http_response(
    payload: bytes, code: int | None, status: int, header: bytes
) -> None:
    def refuse(recorder: Recorder, text: bytes) -> None:
        if isinstance(wire.parse(text), wire.Subscribe) or code is not None:
            recorder.socket.write(encode(payload))
            if code is not None:
                recorder.socket.close(code, "refused")

    async with serving(answer=refuse) as server:
        peer = await server.raw()
        await peer.send(request("GET /v1/stream?topic=a", BEARER))
        head, body = await peer.read_head(), await peer.read_all()
        assert (status, payload + b"\n") == (int(head.split()[1]), body)
        assert header in head
        peer.close()
        await until(lambda: server.gateway.sockets == 0)
        assert {} == server.gateway.aborted


@pytest.mark.parametrize(("first", "status"), [(NoSuchTopic(), 404), (Unavailable(), 503)])
async def test_if_no_topic_is_left_the_first_refusal_is_the_answer_or_one_that_may_pass(
    first: ClientFault, status: int
) -> None:
    def refuse(recorder: Recorder, text: bytes) -> None:
        frame = wire.parse(text)
        if isinstance(frame, wire.Subscribe):
            lost = wire.revoked(Topic("b"), AT)  # while the right was being looked up
            recorder.socket.write(encode(lost if frame.id else wire.error(first, 0)))

    async with serving(answer=refuse) as server:
        peer = await server.raw()
        await peer.send(request("GET /v1/stream?topic=a&topic=b", BEARER) + b"x" * 100_000)
        response = await peer.read_all()
        assert (status, False) == (int(response.split()[1]), peer.was_reset)


async def test_an_error_that_another_request_can_overcome_ends_the_stream() -> None:
    def half(recorder: Recorder, text: bytes) -> None:
        frame = wire.parse(text)
        if isinstance(frame, wire.Subscribe) and frame.id == 1:
            recorder.socket.write(encode(wire.error(Unavailable(), 1)))
        else:
            follow(recorder, text)

    async with serving(answer=half) as server:
        peer = await server.raw()
        await peer.send(request("GET /v1/stream?topic=a&topic=b", BEARER))
        assert (await peer.read_all()).endswith(b"data: %b\n\n" % wire.error(Unavailable(), 1))


async def test_a_stream_waits_while_its_user_has_used_up_the_rate() -> None:
    async with serving(answer=follow, user_rate=10) as server:
        _, recorder = await opened(server)
        recorder.socket.charge(15)
        peer = await server.raw()
        await peer.send(request("GET /v1/stream?topic=a", BEARER))
        waiting = await server.handlers.get()
        assert 1 == len(waiting.texts)
        assert (await peer.read_head()).startswith(b"HTTP/1.1 200 ")
        assert 2 == len(waiting.texts)


async def test_a_stream_counts_as_a_client_until_its_peer_has_gone() -> None:
    async with serving(answer=follow) as server:
        peer, recorder = await opened(server)
        assert (1, 0) == (server.gateway.clients, server.gateway.pending)
        assert recorder.socket.outlet is not None
        assert -1 == recorder.socket.outlet.direct, "frames have to become events"
        peer.close()
        await recorder.lost.wait()
        assert (0, 0, None) == (server.gateway.clients, server.gateway.sockets, recorder.close)


async def test_a_peer_that_does_not_read_is_cut() -> None:
    async with serving(answer=follow) as server:
        _, recorder = await opened(server, receive_buffer=4096)
        change = Change(Seq(2), "1", "", "app", "rows", Topic("a"), Kind.INSERT, "{}", '"' + "x" * 65_000 + '"')
        for _ in range(250):
            recorder.socket.write(encode(wire.changes(Topic("a"), AT, [change])))
        assert recorder.socket.queued() > 2**20
        server.pass_time(32)
        await recorder.lost.wait()
        assert recorder.close is not None
        assert (4408, "too_slow") == recorder.close
        assert {"too_slow": 1} == server.gateway.aborted


async def test_a_drain_refuses_a_stream_that_has_not_begun() -> None:
    async with serving(answer=silence) as server:
        peer = await server.raw()
        await peer.send(request("GET /v1/stream?topic=a", BEARER))
        await server.handlers.get()
        drained = asyncio.create_task(server.gateway.drain(lambda: encode(wire.bye("restart", 1)), within=1))
        assert (await peer.read_head()).startswith(b"HTTP/1.1 503 ")
        peer.close()
        await drained


async def test_what_follows_a_request_is_not_read() -> None:
    async with serving(answer=follow) as server:
        peer, recorder = await opened(server)
        await peer.send(b"x" * 1000)
        recorder.socket.write(encode(wire.head(AT)))
        while b"event: head" not in peer.buffer:
            peer.buffer += await peer.read_some()
        assert 2 == len(recorder.texts)


async def test_clients_with_the_same_frames_share_the_bytes_of_their_events() -> None:
    frames = encode(wire.head(AT)) + encode(wire.revoked(Topic("a"), AT))
    events = LiveEvents()
    assert events(frames) is events(frames)
    assert (1, b"id: e:1\nevent: head\n") == (events(frames).revoked, events(frames).data[:20])


LISTED = "https://chat.example.com"


async def headers_of(server: Server, start: str, **headers: str) -> tuple[int, dict[str, str]]:
    """The status of an answer, and the headers that are about other origins."""
    peer = await server.raw()
    await peer.send(request(start, {name.replace("_", "-"): value for name, value in headers.items()}))
    status, *lines = (await peer.read_head()).decode().strip().split("\r\n")
    named = dict(line.split(": ", 1) for line in lines)
    return int(status.split()[1]), {name: value for name, value in named.items() if name.startswith("Access-Control")}


@pytest.mark.parametrize(
    ("origins", "origin", "allowed", "with_credentials"),
    [
        ({LISTED}, LISTED, LISTED, True),
        ({LISTED}, "http://localhost:5173", "http://localhost:5173", True),  # a page of this machine
        ({LISTED}, "null", "null", False),
        ({LISTED, "*"}, LISTED, LISTED, True),
        ({"*"}, "https://anybody.example", "*", False),
        ({"*"}, "null", "*", False),
    ],
)
async def test_a_page_that_may_connect_may_read_every_answer_about_a_stream(
    origins: set[str], origin: str, allowed: str, with_credentials: bool
) -> None:
    asked = {"Origin": origin, "Access-Control-Request-Method": "GET"}
    async with serving(answer=follow, door=Door(origins=frozenset(origins))) as server:
        for start, headers, status in (
            ("OPTIONS /v1/stream?topic=a", asked, 200),
            ("GET /v1/stream?topic=a", BEARER | asked, 200),
            ("GET /v1/stream?topic=a", asked, 401),
            ("GET /v1/stream", BEARER | asked, 400),
        ):
            found, shared = await headers_of(server, start, **headers)
            assert (status, allowed) == (found, shared["Access-Control-Allow-Origin"])
            assert with_credentials == ("Access-Control-Allow-Credentials" in shared)
            assert ("Authorization" in shared.get("Access-Control-Allow-Headers", "")) == start.startswith("OPTIONS")


async def test_a_page_that_may_not_connect_is_refused_and_may_not_read_why() -> None:
    async with serving(answer=follow, door=Door(origins=frozenset({LISTED}))) as server:
        evil = {"Origin": "https://evil.example", "Access-Control-Request-Method": "GET"}
        for start in ("OPTIONS /v1/stream?topic=a", "GET /v1/stream?topic=a"):
            assert (403, {}) == await headers_of(server, start, **BEARER, **evil)
        assert (200, {}) == await headers_of(server, "GET /v1/stream?topic=a", **BEARER), "no page, no headers"
        assert (405, {}) == await headers_of(server, "OPTIONS /v1/stream", Origin=LISTED)
        assert 405 == (await headers_of(server, "OPTIONS /v1", **evil | {"Origin": LISTED}))[0]
        assert server.handlers.qsize() == 1


@asynccontextmanager
async def session_proxy(server: Server) -> AsyncIterator[int]:
    """The port of a proxy that turns the cookie of its session into a token."""
    connections: list[asyncio.Task[None]] = []

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        token = b"Authorization: Bearer t\r\n" if b"session=ada" in head else b""
        upstream, sender = await asyncio.open_connection(server.host, server.port)
        try:
            sender.write(head[:-2] + token + b"\r\n")
            while data := await upstream.read(65536):
                writer.write(data)
        finally:
            sender.close()
            writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.create_task(pass_on(reader, writer)))

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as proxy:
        yield proxy.sockets[0].getsockname()[1]
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


READ = """async ([url, headers]) => {
    try {
        const answer = await fetch(url, {headers});
        const {value} = await answer.body.getReader().read();
        return [answer.status, new TextDecoder().decode(value)];
    } catch (error) { return [0, error.name]; }
}"""
LISTEN = """([url, withCredentials]) => new Promise((resolve) => {
    const source = new EventSource(url, {withCredentials});
    source.addEventListener("subscribed", (event) => resolve([JSON.parse(event.data).topic, source.close()][0]));
    source.onerror = () => resolve(source.close() || "refused");
})"""


async def test_a_browser_reads_streams_from_pages_of_listed_origins_only() -> None:
    pages = {"/": lambda: text_page("hello")}
    async with serving(pages) as listed, serving(pages) as unlisted, browser_page() as (page, _):
        origin = f"http://{listed.host}:{listed.port}"
        door = Door(origins=frozenset({origin}), admits_local_pages=False)
        async with serving(answer=follow, door=door) as server, session_proxy(server) as proxy:
            url = f"http://{server.host}:{server.port}/v1/stream?topic=a"
            await page.goto(origin)
            await page.evaluate("document.cookie = 'session=ada'")
            status, text = await page.evaluate(READ, [url, BEARER | {"Last-Event-ID": "e:1"}])
            assert status == 200
            assert text.startswith("retry: 1000")
            assert [401, True] == [(answer := await page.evaluate(READ, [url, {}]))[0], '"token"' in answer[1]]
            behind = f"http://127.0.0.1:{proxy}/v1/stream?topic=a"
            assert "a" == await page.evaluate(LISTEN, [behind, True])
            assert "refused" == await page.evaluate(LISTEN, [behind, False]), "there is no cookie, so no token"
            await page.goto(f"http://{unlisted.host}:{unlisted.port}")
            assert [0, "TypeError"] == await page.evaluate(READ, [url, BEARER])
            assert "refused" == await page.evaluate(LISTEN, [behind, True])
