"""The log events about clients."""

from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs
from websockets.frames import Opcode

from daemon.gateway.http import text_page
from daemon.gateway.server import encode
from daemon.logs import EVENTS
from tests.gateway.peers import SMALL, UPGRADE, fill, request, serving, until

Lines = list[MutableMapping[str, Any]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What is logged, from debug on."""
    before = structlog.get_config()["wrapper_class"]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("debug"))
    with capture_logs() as captured:
        yield captured
    structlog.configure(wrapper_class=before)
    assert {line["event"] for line in captured} <= EVENTS.keys()


async def test_a_session_is_logged_when_it_begins_and_ends(lines: Lines) -> None:
    async with serving() as server:
        peer, recorder = await server.open()
        server.pass_time(7)
        recorder.socket.close(4401, "token")
        peer.close()
        await recorder.lost.wait()
    session = recorder.socket.session
    began, ended = lines
    assert began["peer"].startswith("127.0.0.1:")
    assert dict(began) | {"peer": "?"} == {
        "event": "client_connected",
        "log_level": "debug",
        "session": session,
        "peer": "?",
    }
    assert ended == {
        "event": "client_disconnected",
        "log_level": "debug",
        "session": session,
        "code": 4401,
        "seconds": 7.0,
    }


@pytest.mark.parametrize(("sent", "code"), [(b"\x03\xe9", 1001), (b"", 1005), (None, 1006)])
async def test_the_logged_code_is_the_peers_if_it_ended_the_session(
    lines: Lines, sent: bytes | None, code: int
) -> None:
    async with serving() as server:
        peer, recorder = await server.open()
        if sent is not None:
            await peer.send_frame(Opcode.CLOSE, sent)
        peer.close()
        await recorder.lost.wait()
    assert lines[-1]["event"] == "client_disconnected"
    assert lines[-1]["code"] == code


async def test_an_aborted_client_is_logged_with_the_reason(lines: Lines) -> None:
    async with serving() as server:
        _, recorder = await server.open(receive_buffer=SMALL)
        recorder.socket.write(encode(bytes(16 * 2**20)))
        server.pass_time(30)
        await recorder.lost.wait()
    assert [(line["event"], line["log_level"]) for line in lines] == [
        ("client_connected", "debug"),
        ("client_aborted", "warning"),
        ("client_disconnected", "debug"),
    ]
    assert lines[1]["reason"] == "too_slow"


async def test_a_refusal_is_logged_and_client_supplied_text_is_truncated(lines: Lines) -> None:
    async with serving() as server:
        peer = await server.raw()
        await peer.send(request("GET /v1", UPGRADE | {"Sec-WebSocket-Version": "v" * 5000}))
        await peer.read_all()
        peer.close()
        await until(lambda: server.gateway.sockets == 0)
    (refused,) = lines
    assert refused["event"] == "client_refused"
    assert refused["status"] == 400
    assert refused["reason"] == "request"
    assert "Sec-WebSocket-Version" in refused["answer"]
    assert len(refused["answer"]) <= 200


async def test_page_requests_and_empty_connections_are_not_logged(lines: Lines) -> None:
    async with serving({"/healthz": lambda: text_page("ok")}) as server:
        for sent in (request("GET /healthz"), request("GET /favicon.ico"), b""):
            peer = await server.raw()
            await peer.send(sent)
            peer.half_close()
            await peer.read_all()
            peer.close()
        await until(lambda: server.gateway.sockets == 0)
    assert lines == []


async def test_no_violation_by_a_client_is_logged_as_an_error(lines: Lines) -> None:
    async with serving() as server:
        for violation in (b"\xff" * 100, b"\x81\x85abcd\xff\xff\xff\xff\xff", b"\x88\x81abcd1", b"\x00" * 1000):
            peer, recorder = await server.open()
            await peer.send(violation)
            await peer.read_all()
            peer.reset()
            await recorder.lost.wait()
        peer, recorder = await server.open(receive_buffer=SMALL)
        fill(recorder)
        peer.reset()
        await recorder.lost.wait()
    assert {line["log_level"] for line in lines} == {"debug"}


async def test_a_bug_in_a_handler_is_logged_as_an_internal_error(lines: Lines) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    async with serving(answer=fail) as server:
        peer, recorder = await server.open()
        await peer.send_frame(Opcode.TEXT, b"provoke")
        assert await peer.read_close() == 1011
        peer.close()
        await recorder.lost.wait()
    assert [line["event"] for line in lines] == ["client_connected", "internal_error", "client_disconnected"]
    assert lines[1]["session"] == recorder.socket.session
