import asyncio
import errno
import re
import resource
import socket
from contextlib import AsyncExitStack
from contextvars import Context, copy_context
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from websockets.asyncio.client import unix_connect
from websockets.exceptions import InvalidStatus
from websockets.frames import Opcode
from websockets.typing import Subprotocol

from daemon.core.ports import Socket
from daemon.gateway.acceptor import USER_TIMEOUT, Acceptor
from daemon.gateway.http import Site, text_page
from daemon.gateway.server import Gateway, Limits, ListenFailed, bind
from daemon.logs import correlate
from tests.gateway.peers import UPGRADE, RawPeer, Recorder, Server, echo, frame, request, serving, until


async def refused(server: Server, start: str, **changes: str | None) -> tuple[int, bytes]:
    """Status and body of the response to an upgrade with changed headers; None leaves a header out."""
    headers = {name: changes.get(name.replace("-", "_"), value) for name, value in UPGRADE.items()}
    peer = await server.raw()
    await peer.send(request(start, {name: value for name, value in headers.items() if value is not None}))
    head, _, body = (await peer.read_all()).partition(b"\r\n\r\n")
    assert b"server:" not in head.lower()
    return int(head.split()[1]), body


async def test_a_client_that_offers_the_subprotocol_gets_it_and_no_extension() -> None:
    async with serving() as server, server.connect(compression="deflate") as client:
        assert client.subprotocol == "rowcast.v1"
        assert client.protocol.extensions == []
        assert client.response is not None
        assert "Server" not in client.response.headers
        assert server.gateway.connections == 1
    assert server.gateway.connections == 0


async def test_the_query_of_the_path_is_ignored() -> None:
    async with serving() as server:
        peer = await server.raw()
        await peer.send(request("GET /v1?colour=red", UPGRADE))
        assert (await peer.read_head()).startswith(b"HTTP/1.1 101 ")


async def test_the_subprotocol_is_found_among_others() -> None:
    async with serving() as server:
        offered = [Subprotocol("other"), Subprotocol("rowcast.v1")]
        async with server.connect(subprotocols=offered) as client:
            assert client.subprotocol == "rowcast.v1"


@pytest.mark.parametrize(
    ("start", "changes", "status", "expected"),
    [
        ("GET /v1", {"Sec_WebSocket_Protocol": None}, 400, b"rowcast.v1"),
        ("GET /v1", {"Sec_WebSocket_Protocol": "rowcast.v2"}, 400, b"rowcast.v1"),
        ("GET /v2", {}, 404, b"/v1"),
        ("GET /", {}, 404, b"/v1"),
        ("GET /v1/", {}, 404, b"/v1"),
        ("POST /v1", {}, 405, b"GET"),
        ("HEAD /v1", {}, 405, b"GET"),
        ("GET /v1", {"Upgrade": None}, 426, b"WebSocket client"),
        ("GET /v1", {"Connection": "close"}, 426, b"WebSocket client"),
        ("GET /v1", {"Sec_WebSocket_Key": None}, 400, b"Sec-WebSocket-Key"),
        ("GET /v1", {"Sec_WebSocket_Key": "c2hvcnQ="}, 400, b"Sec-WebSocket-Key"),
        ("GET /v1", {"Sec_WebSocket_Version": "8"}, 400, b"Sec-WebSocket-Version"),
    ],
)
async def test_an_invalid_upgrade_is_refused_with_the_reason(
    start: str, changes: dict[str, str | None], status: int, expected: bytes
) -> None:
    async with serving() as server:
        answered_status, body = await refused(server, start, **changes)
        assert answered_status == status
        assert body == b"" if start.startswith("HEAD") else expected in body
        assert server.handlers.empty()


async def test_a_library_client_without_the_subprotocol_sees_status_400() -> None:
    async with serving() as server:
        with pytest.raises(InvalidStatus) as refusal:
            async with server.connect(subprotocols=None):
                pass
        assert refusal.value.response.status_code == 400


async def test_a_client_may_send_before_it_has_the_response() -> None:
    async with serving() as server:
        peer = await server.raw()
        await peer.send(request("GET /v1", UPGRADE) + frame(Opcode.TEXT, b"early"))
        await peer.read_head()
        assert await peer.read_frame() == (Opcode.TEXT, b"early")


async def test_a_handshake_may_arrive_byte_by_byte() -> None:
    async with serving() as server:
        peer = await server.raw()
        for byte in request("GET /v1", UPGRADE):
            await peer.send(bytes([byte]))
        assert (await peer.read_head()).startswith(b"HTTP/1.1 101 ")


async def test_a_handshake_that_trickles_in_is_cut_at_the_timeout() -> None:
    async with serving(open_timeout=5.0) as server:
        peer = await server.raw()
        await until(lambda: server.gateway.sockets == 1)
        for byte in b"GET /":
            await peer.send(bytes([byte]))
            server.pass_time(1)
        assert await peer.read_all() == b""
        assert server.gateway.aborted == {"open_timeout": 1}


async def test_a_connection_that_sends_nothing_is_cut_at_the_timeout_and_not_before() -> None:
    async with serving(open_timeout=5.0) as server:
        await server.raw()
        await until(lambda: server.gateway.sockets == 1)
        server.pass_time(4)
        assert server.gateway.aborted == {}
        server.pass_time(1)
        await until(lambda: server.gateway.sockets == 0)
        assert server.gateway.aborted == {"open_timeout": 1}


async def test_a_connection_that_closes_without_a_request_is_not_aborted() -> None:
    async with serving() as server:
        peer = await server.raw()
        await until(lambda: server.gateway.sockets == 1)
        peer.close()
        await until(lambda: server.gateway.sockets == 0)
        assert server.gateway.aborted == {}


async def test_a_full_gateway_refuses_upgrades_with_503_and_still_serves_pages() -> None:
    async with serving(connections=1) as server, server.connect() as client:
        status, body = await refused(server, "GET /v1")
        assert status == 503
        assert b"later" in body
        assert (await refused(server, "GET /nowhere", Upgrade=None))[0] == 404
        await client.send("still here")
        assert await client.recv() == "still here"


async def test_a_session_that_ends_makes_room_for_another() -> None:
    async with serving(connections=1) as server:
        async with server.connect():
            pass
        await until(lambda: server.gateway.connections == 0)
        async with server.connect() as client:
            await client.send("my turn")
            assert await client.recv() == "my turn"


async def test_the_gateway_recovers_after_running_out_of_descriptors() -> None:
    async with serving({"/": lambda: text_page("ok")}) as server:
        peer = await server.raw()
        await until(lambda: server.gateway.sockets == 1)
        waiting = socket.socket()
        waiting.setblocking(False)
        server.peers.append(RawPeer(waiting))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with capture_logs() as lines:
            resource.setrlimit(resource.RLIMIT_NOFILE, (waiting.fileno() + 1, hard))
            try:
                await asyncio.get_running_loop().sock_connect(waiting, (server.host, server.port))
                await until(lambda: bool(lines))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert [(line["event"], line["reason"]) for line in lines] == [("client_refused", "Too many open files")]
        server.pass_time(1)
        for here in (peer, server.peers[-1]):
            await here.send(request("GET /"))
            assert (await here.read_all()).endswith(b"\r\n\r\nok\n")


async def test_a_client_who_makes_room_leaves_no_correlation_id_to_those_who_come_in() -> None:
    [listening] = await bind("127.0.0.1", 0)
    found: list[Context] = []
    delays: list[float] = []

    def admit(connection: socket.socket, _: str) -> None:
        found.append(copy_context())
        connection.close()

    def delay() -> float:
        delays.append(0.0 if delays else 3600.0)
        return delays[-1]

    acceptor = Acceptor(listening, admit, delay=delay)
    with socket.create_connection(listening.getsockname()):
        await until(lambda: bool(delays))
        with correlate("01JSESSION"):
            acceptor.accept_again()
        await until(lambda: bool(found))
    acceptor.close()
    assert {} == dict(found[0])


async def test_localhost_listens_on_all_of_its_addresses() -> None:
    async with Gateway(lambda client: Recorder(client, print), Site({"/": lambda: text_page("ok")})) as gateway:
        _, port = await gateway.start("localhost")
        for address in {info[4] for info in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)}:
            try:
                reader, writer = await asyncio.open_connection(*address[:2])
            except OSError as error:
                assert error.errno in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
                continue
            writer.write(request("GET /"))
            assert (await reader.read()).endswith(b"ok\n")
            writer.close()
            await writer.wait_closed()


async def test_a_client_whose_handler_cannot_be_opened_is_closed_with_1011() -> None:
    async with serving() as server:

        def open_client(client: object) -> Recorder:
            raise RuntimeError("a bug")

        async with Gateway(open_client, Site({})) as broken:
            server.host, server.port = await broken.start("127.0.0.1")
            peer = await server.raw()
            await peer.send(request("GET /v1", UPGRADE))
            await peer.read_head()
            assert await peer.read_close() == 1011
            peer.close()


async def test_a_socket_that_already_listens_can_be_used() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    async with serving() as server, Gateway(lambda client: Recorder(client, print), Site({})) as second:
        assert await second.start(sockets=[listening]) == ("127.0.0.1", port)
        server.port = port
        async with server.connect():
            assert second.connections == 1


def unix_socket(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    return listening


@pytest.mark.parametrize("handed_over", [False, True])
async def test_a_unix_socket_is_served_like_a_port(handed_over: bool, tmp_path: Path) -> None:
    path = tmp_path / "rowcast.sock"
    pages = {"/": lambda: text_page("ok")}
    handlers: list[Recorder] = []

    def open_client(client: Socket) -> Recorder:
        handlers.append(Recorder(client, echo))
        return handlers[-1]

    async with Gateway(open_client, Site(pages), limits=Limits(per_address=1)) as gateway:
        sockets = [unix_socket(path)] if handed_over else []
        assert await gateway.start(f"unix:{path}", sockets=sockets) == (f"unix:{path}", 0)
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(request("GET /"))
        assert (await reader.read()).endswith(b"ok\n")
        async with unix_connect(str(path), "ws://localhost/v1", subprotocols=[Subprotocol("rowcast.v1")]) as client:
            await client.send("hello")
            assert await client.recv() == "hello"
        writer.close()


async def test_a_unix_socket_replaces_only_one_that_nobody_listens_on(tmp_path: Path) -> None:
    path = tmp_path / "rowcast.sock"
    unix_socket(path).close()  # as a process that was killed leaves it
    async with Gateway(lambda client: Recorder(client, print), Site({})) as gateway, AsyncExitStack() as stack:
        await gateway.start(f"unix:{path}")
        assert 0o666 == path.stat().st_mode & 0o777
        second = await stack.enter_async_context(Gateway(lambda client: Recorder(client, print), Site({})))
        with pytest.raises(ListenFailed, match=f"Cannot listen on unix:{path}: Address already in use."):
            await second.start(f"unix:{path}")
        (tmp_path / "file").write_text("not a socket")
        with pytest.raises(ListenFailed, match="Address already in use"):
            await second.start(f"unix:{tmp_path}/file")
        with pytest.raises(ListenFailed, match="No such file or directory"):
            await second.start(f"unix:{tmp_path}/nowhere/rowcast.sock")


async def test_a_gateway_that_yields_a_connection_accepts_it_if_no_other_does() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    shared = listening.dup()
    async with (
        serving() as server,
        Gateway(lambda client: Recorder(client, print), Site({})) as yielding,
        Gateway(lambda client: Recorder(client, print), Site({})) as other,
    ):
        _, server.port = await yielding.start(sockets=[listening], should_accept=lambda _: False)
        async with server.connect():
            assert (1, 0) == (yielding.connections, other.connections)
            await other.start(sockets=[shared])
            async with server.connect(), server.connect():
                assert (1, 2) == (yielding.connections, other.connections)


async def test_an_address_in_use_is_an_operator_fault() -> None:
    async with serving() as server, Gateway(lambda client: Recorder(client, print), Site({})) as second:
        with pytest.raises(ListenFailed, match=f"Cannot listen on 127.0.0.1:{server.port}: Address already in use."):
            await second.start("127.0.0.1", server.port)


@pytest.mark.parametrize("host", ["nowhere.invalid", "no..where", "192.0.2.1"])
async def test_a_host_that_cannot_be_bound_is_an_operator_fault(host: str) -> None:
    async with Gateway(lambda client: Recorder(client, print), Site({})) as gateway:
        with pytest.raises(ListenFailed, match=f"Cannot listen on {re.escape(host)}:0: ."):
            await gateway.start(host)


async def test_accepted_sockets_have_a_user_timeout_and_no_delay() -> None:
    async with serving() as server, server.connect():
        recorder = await server.handlers.get()
        accepted = recorder.socket._transport.connection  # type: ignore[attr-defined]
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == USER_TIMEOUT
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


async def test_a_storm_of_handshakes_is_answered() -> None:
    async with serving() as server:
        clients = await asyncio.gather(*(server.connect() for _ in range(200)))
        assert server.gateway.connections == 200
        await asyncio.gather(*(client.close() for client in clients))
