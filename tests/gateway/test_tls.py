"""TLS of the gateway, with real clients: frames, pages, a new certificate, and peers that do not speak TLS."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from daemon.gateway.fan_out import fan_out
from daemon.gateway.http import Page, text_page
from daemon.gateway.server import encode
from daemon.gateway.tls import Tls, TlsFiles, TlsFilesUnusable
from daemon.metrics import REGISTRY
from tests.gateway.peers import Follower, Recorder, Server, fill, request, serving, silence, until
from tests.support.issuer import EC, RSA, private_pem, self_signed

LARGE = Page(200, b"x" * 3_000_000, "text/plain")
PAGES = {"/healthz": lambda: text_page("ok"), "/large": lambda: LARGE}


@asynccontextmanager
async def with_tls(folder: Path, pages: dict[str, Callable[[], Page]] = PAGES) -> AsyncIterator[tuple[Server, Tls]]:
    tls = Tls()
    assert await tls.load(TlsFiles(*self_signed(folder))) == 1
    async with serving(pages, answer=silence, tls=tls) as server:
        yield server, tls


def trusting(certificate: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    return context


def client(server: Server, context: ssl.SSLContext) -> connect:
    url = server.url.replace("ws:", "wss:")
    return connect(url, ssl=context, subprotocols=[Subprotocol("rowcast.v1")], max_size=None, ping_interval=None)


async def says(handler: Recorder, socket: ClientConnection) -> None:
    handler.socket.write(encode(b"still here"))
    assert await socket.recv() == "still here"


async def page(server: Server, path: str, context: ssl.SSLContext) -> bytes:
    reader, writer = await asyncio.open_connection(server.host, server.port, ssl=context)
    writer.write(request(f"GET {path}"))
    answer = await reader.read()
    writer.close()
    return answer


async def test_a_client_over_wss_gets_everything_in_order(tmp_path: Path) -> None:
    async with with_tls(tmp_path) as (server, _), client(server, trusting(tmp_path / "certificate.pem")) as socket:
        handler = await server.handlers.get()
        await socket.send("hello")
        await until(lambda: handler.texts == [b"hello"])
        fill(handler)  # much more than the kernel takes: it waits in the queue, and some writes are repeated
        for _ in range(250):
            assert await socket.recv() == "x" * 65000
        for size in (1, 20_000, 5, 16_384, 100_000):
            handler.socket.write(encode(b"y" * size))
        assert [len(await socket.recv()) for _ in range(5)] == [1, 20_000, 5, 16_384, 100_000]
        transport = socket.transport.get_extra_info("ssl_object")
        assert transport.version() == "TLSv1.3"
    await until(lambda: server.gateway.sockets == 0)


async def test_frames_that_many_clients_get_are_encrypted_for_those_with_tls(tmp_path: Path) -> None:
    async with with_tls(tmp_path) as (server, _), client(server, trusting(tmp_path / "certificate.pem")) as socket:
        handler = await server.handlers.get()
        await socket.send("hello")
        await until(lambda: handler.texts == [b"hello"])
        follower = Follower(handler)
        for text in ("a", "b" * 100_000, "c"):
            fan_out([follower], encode(text.encode()))
            assert await socket.recv() == text
        assert follower.calls == 3


async def test_pages_over_https_arrive_whole_and_are_ended_properly(tmp_path: Path) -> None:
    async with with_tls(tmp_path) as (server, _):
        context = trusting(tmp_path / "certificate.pem")
        assert (await page(server, "/large", context)).endswith(b"\r\n\r\n" + LARGE.body)
        assert (await page(server, "/healthz", context)).endswith(b"\r\n\r\nok\n")
        await until(lambda: server.gateway.sockets == 0)
        server.port = server.admin_port
        peer = await server.raw()
        await peer.send(request("GET /healthz"))
        assert (await peer.read_all()).endswith(b"ok\n"), "the listener for metrics has no TLS"


async def test_a_new_certificate_is_for_new_connections_and_drops_nobody(tmp_path: Path) -> None:
    async with with_tls(tmp_path) as (server, tls):
        old = trusting(tmp_path / "certificate.pem")
        async with client(server, old) as before:
            handler = await server.handlers.get()
            (tmp_path / "new").mkdir()
            files = TlsFiles(*self_signed(tmp_path / "new"))
            await tls.load(files)
            async with client(server, trusting(files.certificate)) as after:
                await says(await server.handlers.get(), after)
            with pytest.raises(ssl.SSLCertVerificationError):
                await page(server, "/healthz", old)
            await says(handler, before)
        assert REGISTRY.get_sample_value("rowcast_certificate_end_timestamp_seconds") == files.read()[1]


async def test_a_peer_that_does_not_speak_tls_gets_an_answer(tmp_path: Path) -> None:
    async with with_tls(tmp_path) as (server, _):
        peer = await server.raw()
        await peer.send(request("GET /healthz"))
        assert b"This port speaks TLS: use https, or wss." in await peer.read_all()
        peer = await server.raw()
        await peer.send(b"\x16\x03\x01\xff\xff" + b"nonsense" * 20)
        await peer.read_all()
        silent = await server.raw()
        await until(lambda: server.gateway.sockets == 1)
        server.pass_time(6)
        assert await silent.read_all() == b"", "what has not finished its handshake in time is cut"
        assert server.gateway.aborted == {"open_timeout": 1}
        waiting = await server.raw()
        await until(lambda: server.gateway.sockets == 1)
        await server.gateway.drain(None, within=0.1)
        assert await waiting.read_all() == b""


async def test_wrong_files_are_refused_in_one_line_and_change_nothing(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)

    def written(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    rsa = written("rsa", private_pem(RSA))
    absent, text = tmp_path / "absent", written("text", b"hello")
    encrypted = written("encrypted", encrypted_pem())
    for pair, reason in (
        ((absent, key), f"{absent}: No such file or directory"),
        ((certificate, absent), f"{absent}: No such file or directory"),
        ((tmp_path, key), f"{tmp_path}: Is a directory"),
        ((text, key), "the first is not a certificate in PEM"),
        ((key, key), "the first is not a certificate in PEM"),
        ((certificate, text), "the key is not usable"),
        ((certificate, certificate), "the key is not usable"),
        ((certificate, encrypted), "the key is encrypted"),
        ((certificate, rsa), "the key is of another certificate"),
    ):
        tls = Tls()
        await tls.load(TlsFiles(certificate, key))
        with pytest.raises(TlsFilesUnusable) as fault:
            await tls.load(TlsFiles(*pair))
        assert fault.value.reason == reason
        assert str(fault.value).count("\n") == 0
        assert "PRIVATE" not in str(fault.value)
        assert "the TLS certificate ends in" in str(tls.warnings()), "the old one is still there"


def encrypted_pem() -> bytes:
    return EC.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
