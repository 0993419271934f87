import asyncio
import errno
import re
import resource
import socket

import pytest
from structlog.testing import capture_logs
from websockets.exceptions import InvalidStatus
from websockets.frames import Opcode
from websockets.typing import Subprotocol

from daemon.gateway.http import Site, text_page
from daemon.gateway.limits import SPARE
from daemon.gateway.server import Gateway, ListenFailed
from tests.gateway.peers import UPGRADE, RawPeer, Recorder, Served, frame, request, serving, until


async def refused(served: Served, start: str, **changes: str | None) -> tuple[int, bytes]:
    """Status and body of the answer to an upgrade whose headers are changed, or left out, by `changes`."""
    headers = {name: changes.get(name.replace("-", "_"), value) for name, value in UPGRADE.items()}
    peer = await served.raw()
    await peer.send(request(start, {name: value for name, value in headers.items() if value is not None}))
    head, _, body = (await peer.read_all()).partition(b"\r\n\r\n")
    assert b"server:" not in head.lower()
    return int(head.split()[1]), body


async def test_a_client_that_asks_for_the_subprotocol_gets_it_and_no_extension() -> None:
    async with serving() as served, served.connect(compression="deflate") as client:
        assert client.subprotocol == "rowcast.v1"
        assert client.protocol.extensions == []
        assert client.response is not None
        assert "Server" not in client.response.headers
        assert served.gateway.connections == 1
    assert served.gateway.connections == 0


async def test_the_query_of_the_path_is_ignored() -> None:
    async with serving() as served:
        peer = await served.raw()
        await peer.send(request("GET /v1?colour=red", UPGRADE))
        assert (await peer.read_head()).startswith(b"HTTP/1.1 101 ")


async def test_the_subprotocol_is_found_among_others() -> None:
    async with serving() as served:
        offered = [Subprotocol("other"), Subprotocol("rowcast.v1")]
        async with served.connect(subprotocols=offered) as client:
            assert client.subprotocol == "rowcast.v1"


@pytest.mark.parametrize(
    ("start", "changes", "status", "word"),
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
async def test_an_upgrade_that_is_wrong_is_told_why(
    start: str, changes: dict[str, str | None], status: int, word: bytes
) -> None:
    async with serving() as served:
        answered, body = await refused(served, start, **changes)
        assert answered == status
        assert body == b"" if start.startswith("HEAD") else word in body
        assert served.attendants.empty()


async def test_a_library_client_without_the_subprotocol_sees_status_400() -> None:
    async with serving() as served:
        with pytest.raises(InvalidStatus) as refusal:
            async with served.connect(subprotocols=None):
                pass
        assert refusal.value.response.status_code == 400


async def test_a_client_may_send_before_it_has_the_answer() -> None:
    async with serving() as served:
        peer = await served.raw()
        await peer.send(request("GET /v1", UPGRADE) + frame(Opcode.TEXT, b"early"))
        await peer.read_head()
        assert await peer.read_frame() == (Opcode.TEXT, b"early")


async def test_a_handshake_may_come_byte_by_byte() -> None:
    async with serving() as served:
        peer = await served.raw()
        for byte in request("GET /v1", UPGRADE):
            await peer.send(bytes([byte]))
        assert (await peer.read_head()).startswith(b"HTTP/1.1 101 ")


async def test_a_dripping_handshake_is_cut_when_its_time_is_over() -> None:
    async with serving(open_timeout=5.0) as served:
        peer = await served.raw()
        await until(lambda: served.gateway.sockets == 1)
        for byte in b"GET /":
            await peer.send(bytes([byte]))
            served.pass_time(1)
        assert await peer.read_all() == b""
        assert served.gateway.aborted == {"open_timeout": 1}


async def test_a_connection_that_says_nothing_is_cut_and_not_before_its_time() -> None:
    async with serving(open_timeout=5.0) as served:
        await served.raw()
        await until(lambda: served.gateway.sockets == 1)
        served.pass_time(4)
        assert served.gateway.aborted == {}
        served.pass_time(1)
        await until(lambda: served.gateway.sockets == 0)
        assert served.gateway.aborted == {"open_timeout": 1}


async def test_a_connection_that_is_closed_before_it_says_anything_leaves_nothing() -> None:
    async with serving() as served:
        peer = await served.raw()
        await until(lambda: served.gateway.sockets == 1)
        peer.close()
        await until(lambda: served.gateway.sockets == 0)
        assert served.gateway.aborted == {}


async def test_a_full_house_refuses_upgrades_with_503_and_serves_pages() -> None:
    async with serving(connections=1) as served, served.connect() as client:
        status, body = await refused(served, "GET /v1")
        assert status == 503
        assert b"later" in body
        assert (await refused(served, "GET /nowhere", Upgrade=None))[0] == 404
        await client.send("still here")
        assert await client.recv() == "still here"


async def test_a_place_that_was_given_up_is_given_again() -> None:
    async with serving(connections=1) as served:
        async with served.connect():
            pass
        await until(lambda: served.gateway.connections == 0)
        async with served.connect() as client:
            await client.send("my turn")
            assert await client.recv() == "my turn"


async def test_connections_that_never_ask_cannot_take_every_descriptor() -> None:
    async with serving(connections=1) as served:
        spare = 1 + SPARE // 2
        for _ in range(spare):
            await served.raw()
        await until(lambda: served.gateway.sockets == spare)
        one_more = await served.raw()
        assert (await one_more.read_all()).startswith(b"HTTP/1.1 503 ")
        await until(lambda: served.gateway.sockets == spare)


async def test_when_descriptors_run_out_the_gateway_waits_and_then_goes_on() -> None:
    async with serving({"/": lambda: text_page("ok")}) as served:
        peer = await served.raw()
        await until(lambda: served.gateway.sockets == 1)
        waiting = socket.socket()
        waiting.setblocking(False)
        served.peers.append(RawPeer(waiting))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with capture_logs() as lines:
            resource.setrlimit(resource.RLIMIT_NOFILE, (waiting.fileno() + 1, hard))
            try:
                await asyncio.get_running_loop().sock_connect(waiting, (served.host, served.port))
                await until(lambda: bool(lines))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert [(line["event"], line["reason"]) for line in lines] == [("client_refused", "Too many open files")]
        served.pass_time(1)
        for here in (peer, served.peers[-1]):
            await here.send(request("GET /"))
            assert (await here.read_all()).endswith(b"\r\n\r\nok\n")


async def test_localhost_is_every_address_that_it_has() -> None:
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


async def test_an_attendant_that_cannot_begin_costs_its_client_1011() -> None:
    async with serving() as served:

        def open_client(client: object) -> Recorder:
            raise RuntimeError("a bug")

        async with Gateway(open_client, Site({})) as broken:
            served.host, served.port = await broken.start("127.0.0.1")
            peer = await served.raw()
            await peer.send(request("GET /v1", UPGRADE))
            await peer.read_head()
            assert await peer.read_close() == 1011
            peer.close()


async def test_a_socket_that_already_listens_is_taken_over() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    async with serving() as served, Gateway(lambda client: Recorder(client, print), Site({})) as second:
        assert await second.start(sockets=[listening]) == ("127.0.0.1", port)
        served.port = port
        async with served.connect():
            assert second.connections == 1


async def test_who_is_not_at_turn_leaves_a_connection_to_another_and_takes_it_if_nobody_else_does() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    shared = listening.dup()
    async with (
        serving() as served,
        Gateway(lambda client: Recorder(client, print), Site({})) as shy,
        Gateway(lambda client: Recorder(client, print), Site({})) as other,
    ):
        _, served.port = await shy.start(sockets=[listening], should_accept=lambda _: False)
        async with served.connect():
            assert (1, 0) == (shy.connections, other.connections)
            await other.start(sockets=[shared])
            async with served.connect(), served.connect():
                assert (1, 2) == (shy.connections, other.connections)


async def test_an_address_that_is_taken_is_the_operators_fault() -> None:
    async with serving() as served, Gateway(lambda client: Recorder(client, print), Site({})) as second:
        with pytest.raises(ListenFailed, match=f"Cannot listen on 127.0.0.1:{served.port}: Address already in use."):
            await second.start("127.0.0.1", served.port)


@pytest.mark.parametrize("host", ["nowhere.invalid", "no..where", "192.0.2.1"])
async def test_a_host_that_is_not_here_is_the_operators_fault(host: str) -> None:
    async with Gateway(lambda client: Recorder(client, print), Site({})) as gateway:
        with pytest.raises(ListenFailed, match=f"Cannot listen on {re.escape(host)}:0: ."):
            await gateway.start(host)


async def test_accepted_sockets_give_up_on_a_peer_that_acknowledges_nothing() -> None:
    async with serving() as served, served.connect():
        recorder = await served.attendants.get()
        accepted = recorder.socket._transport.connection  # type: ignore[attr-defined]
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


async def test_a_storm_of_handshakes_is_answered() -> None:
    async with serving() as served:
        clients = await asyncio.gather(*(served.connect() for _ in range(200)))
        assert served.gateway.connections == 200
        await asyncio.gather(*(client.close() for client in clients))
