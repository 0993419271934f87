"""The line to NATS, with a real server."""

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from daemon.relay import connection
from daemon.relay import link as links
from daemon.relay.link import MAX_WAITING, BadNatsSettings, Link, LinkOptions
from tests.support.daemon import free_port
from tests.support.issuer import self_signed
from tests.support.nats import Issuer, NatsServer, running_cluster, running_link, running_nats, until_cut_off


class Received:
    """What a link has received, and a way to wait for it."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self._news = asyncio.Event()

    def receive(self, message: bytes) -> None:
        self.messages.append(message)
        self._news.set()

    async def until(self, is_enough: Callable[[list[bytes]], bool]) -> list[bytes]:
        while not is_enough(self.messages):
            self._news.clear()
            await self._news.wait()
        return self.messages


@asynccontextmanager
async def connected(server: NatsServer, prefix: str, name: str = "node") -> AsyncIterator[Link]:
    async with running_link(server.url, prefix, name) as link:
        await link.connected.wait()
        yield link


async def until_failed(link: Link) -> str:
    """Why a link is cut off, or is refused a subject."""
    while link.failure in {"", "NATS has not been reached yet"}:
        await asyncio.sleep(0.001)
    return link.failure


async def until_received(link: Link, received: Received, message: bytes) -> None:
    """Publish a message until it comes back."""
    while message not in received.messages:
        link.publish("log", message)
        await asyncio.sleep(0.01)


async def test_messages_arrive_in_order_across_subjects(nats: NatsServer, prefix: str) -> None:
    async with connected(nats, prefix, "a") as sender, connected(nats, prefix, "b") as receiver:
        received = Received()
        for subject in ("log", "beat", "t.1"):
            receiver.subscribe(subject, received.receive)
        assert await sender_sees_subscriptions(sender, receiver, received)
        sent = [b"%d" % number for number in range(3000)]
        for number, message in enumerate(sent):
            assert sender.publish(("log", "beat", "t.1")[number % 3], message)
        assert sent == (await received.until(lambda messages: len(messages) > len(sent)))[1:]


async def sender_sees_subscriptions(sender: Link, receiver: Link, received: Received) -> bool:
    """The receiver's own message shows that the server knows its subscriptions."""
    receiver.publish("log", b"begin")
    await received.until(bool)
    return sender.connected.is_set()


async def test_a_receiver_that_raises_does_not_end_the_reading(nats: NatsServer, prefix: str) -> None:
    async with connected(nats, prefix) as link:
        received = Received()

        def fail(message: bytes) -> None:
            raise RuntimeError("a bug")

        link.subscribe("beat", fail)
        link.subscribe("log", received.receive)
        with capture_logs() as logs:
            link.publish("beat", b"x")
            link.publish("log", b"y")
            await received.until(bool)
        assert [("internal_error", f"{prefix}.beat")] == [(line["event"], line["subject"]) for line in logs]
        assert link.connected.is_set()


async def test_nothing_arrives_after_unsubscribing(nats: NatsServer, prefix: str) -> None:
    async with connected(nats, prefix) as link:
        gone, received = Received(), Received()
        link.subscribe("beat", gone.receive)
        link.unsubscribe("beat")
        link.subscribe("log", received.receive)
        link.publish("beat", b"x")
        link.publish("log", b"y")
        await received.until(bool)
        assert [] == gone.messages
        with pytest.raises(ValueError, match="subscribed already"):
            link.subscribe("log", received.receive)


async def test_a_link_survives_the_death_of_the_server(prefix: str) -> None:
    async with running_nats() as server, connected(server, prefix) as link:
        received = Received()
        link.subscribe("log", received.receive)
        await until_received(link, received, b"before")
        with capture_logs() as logs:
            await server.kill()
            await until_cut_off(link)
            assert not link.publish("log", b"lost")
            while "nothing listens" not in link.failure:
                await asyncio.sleep(0.001)
            link.subscribe("beat", received.receive)
            await server.start()
            await link.connected.wait()
        link.publish("log", b"after")
        link.publish("beat", b"beat")
        assert [b"after", b"beat"] == (await received.until(lambda messages: b"beat" in messages))[-2:]
        assert "" == link.failure
        assert ["relay_lost", "relay_lost", "relay_connected"] == [line["event"] for line in logs]
        closed, refused = (line["reason"] for line in logs[:2])
        assert closed.endswith(f"{server.address} closed the connection")
        assert f"nothing listens at {server.address}" == refused


@pytest.mark.parametrize("scheme", ["nats", "tls"])
async def test_memory_is_bounded_while_the_server_reads_nothing(
    prefix: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PING_INTERVAL", 0.3)
    cert, key = self_signed(tmp_path)
    tls = f'tls {{ cert_file: "{cert}", key_file: "{key}" }}' if scheme == "tls" else ""
    ca_file = cert if tls else None
    async with (
        running_nats(tls) as server,
        running_link(f"{scheme}://{server.address}", prefix, ca_file=ca_file) as link,
    ):
        await link.connected.wait()
        server.signal(signal.SIGSTOP)
        message, sent = bytes(100_000), 0
        while link.publish("log", message):
            sent += len(message)
            await asyncio.sleep(0)
        assert MAX_WAITING < link.waiting < MAX_WAITING + 2 * len(message)
        assert not link.publish("log", b"x")
        while link.waiting > 0:
            await asyncio.sleep(0)
        assert not link.publish("log", b"x"), "a lost connection takes nothing, also before the link knows"
        await until_cut_off(link)
        assert (0, False) == (link.waiting, link.publish("log", b"x"))
        assert f"{server.address} does not answer" == link.failure
        server.signal(signal.SIGCONT)
        await link.connected.wait()
        assert link.publish("log", b"x")


async def test_a_forced_reconnect_takes_effect_at_once(nats: NatsServer, prefix: str) -> None:
    async with connected(nats, prefix) as link:
        received = Received()
        link.subscribe("log", received.receive)
        await link.reconnect()
        await until_cut_off(link)
        assert "carried nothing any more" in link.failure
        await link.connected.wait()
        link.publish("log", b"x")
        await received.until(bool)


async def test_each_wrong_address_is_named_in_one_line(prefix: str) -> None:
    port = free_port()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-none\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", port):
        for url, reason in {
            f"nats://127.0.0.1:{free_port()}": "nothing listens at 127.0.0.1:",
            f"nats://127.0.0.1:{port}": f"what listens at 127.0.0.1:{port} is no NATS server",
            "nats://rowcast.invalid": "the host rowcast.invalid is unknown",
        }.items():
            async with running_link(url, prefix) as link:
                assert (await until_failed(link)).startswith(reason)


@pytest.mark.parametrize("url", ["", "http://127.0.0.1", "nats://", "nats://h:port", "nats://h/path", "ws://h"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(BadNatsSettings, match="ROWCAST_NATS_URL must be nats://HOST:PORT"):
        LinkOptions((url,), "p", "n")


def test_a_password_is_not_part_of_any_message() -> None:
    options = LinkOptions(("nats://me:hunter2@127.0.0.1",), "p", "n")
    assert "hunter2" not in repr(options)
    with pytest.raises(BadNatsSettings) as refused:
        LinkOptions(("nats://me:hunter2@127.0.0.1:port",), "p", "n")
    assert "hunter2" not in str(refused.value)


USERS = """
authorization {
  gateway = { publish: ["P.q.*"], subscribe: ["P.log", "P.beat", "P.a.>"] }
  users = [
    { user: member, password: "hunter2:/@" }
    { user: gateway, password: hunter2, permissions: $gateway }
  ]
}
"""


async def test_a_user_is_known_by_the_url_and_a_refused_subject_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "RETRY_REFUSED", 0.05)
    async with running_nats(USERS) as server:
        gateway = f"nats://gateway:hunter2@{server.address}"
        async with running_link(f"nats://gateway:wrong@{server.address}", "P") as link:
            assert f"{server.address} refuses the credentials (authorization violation)" == await until_failed(link)
        async with running_link(server.url, "P") as link:
            assert "refuses the credentials" in await until_failed(link)
        async with (
            running_link(f"nats://member:hunter2%3A%2F%40@{server.address}", "P", "m") as member,
            running_link(gateway, "P", "g") as link,
        ):
            member.answer("m", echo)
            received = Received()
            link.subscribe("log", received.receive)
            await asyncio.gather(member.connected.wait(), link.connected.wait())
            await until_received(member, received, b"x")
            assert b"x" == await link.ask("m", "rights", b"x", 5.0)
            assert ("", "") == (member.failure, link.failure)
            with capture_logs() as logs:
                link.publish("log", b"forged")
                assert 'NATS does not permit this node to publish to "p.log"' == await until_failed(link)
                link.subscribe("x.1", received.receive)
                while "subscribe" not in link.failure:
                    await asyncio.sleep(0.001)
            assert {"relay_refused"} == {line["event"] for line in logs}
            assert (2, True) == (len(logs), link.connected.is_set())
            assert b"forged" not in received.messages
            server.configure(USERS.replace('"P.beat"', '"P.beat", "P.x.1"'))
            server.signal(signal.SIGHUP)
            while b"t" not in received.messages:
                member.publish("x.1", b"t")
                await asyncio.sleep(0.01)
            assert "" == link.failure


async def echo(question: str, payload: bytes) -> bytes:
    return payload


async def test_a_token_in_the_url_is_enough() -> None:
    async with (
        running_nats("authorization { token: hunter2 }") as server,
        running_link(f"nats://hunter2@{server.address}", "P") as link,
    ):
        await link.connected.wait()


async def test_a_file_with_credentials_is_read_for_each_connection(tmp_path: Path) -> None:
    issuer, creds = Issuer(), tmp_path / "node.creds"
    async with (
        running_nats(issuer.configuration()) as server,
        running_link(server.url, "P", creds_file=creds) as link,
    ):
        assert f"cannot read the credentials in {creds}: No such file or directory" == await until_failed(link)
        for text, reason in {
            "-----BEGIN NATS USER JWT-----": f"{creds} is not a file with the credentials of a NATS user",
            issuer.credentials().replace("\nSU", "\nS1"): f"the credentials in {creds} are not valid",
            Issuer().credentials(): f"{server.address} refuses the credentials (authorization violation)",
        }.items():
            creds.write_text(text)
            while link.failure != reason:
                await asyncio.sleep(0.001)
        creds.write_text(issuer.credentials())
        await link.connected.wait()


async def test_a_server_is_verified_and_may_verify_this_node(tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path)
    tls = f'tls {{ cert_file: "{cert}", key_file: "{key}", ca_file: "{cert}", verify: VERIFY }}'
    async with running_nats(tls.replace("VERIFY", "false")) as server:
        secure = f"tls://{server.address}"
        for url in (secure, server.url):
            async with running_link(url, "P", ca_file=cert) as link:
                await link.connected.wait()
        async with running_link(secure, "P") as link:
            assert (await until_failed(link)).startswith(f"the certificate of {server.address} is not valid: ")
        for wrong in (tmp_path / "none.pem", key):
            async with running_link(secure, "P", ca_file=wrong) as link:
                assert (await until_failed(link)).startswith(f"cannot use the certificates in {wrong}: ")
        for file, reason in (
            (tmp_path / "none.pem", f"cannot use the certificates in {tmp_path / 'none.pem'}: No such"),
            (None, f"cannot use the certificate in {cert} with the key in {cert}: they are not in PEM format"),
        ):
            async with running_link(secure, "P", ca_file=cert, cert_file=cert, key_file=file) as link:
                assert (await until_failed(link)).startswith(reason)
        await server.kill()
        server.configure(tls.replace("VERIFY", "true"))
        await server.start()
        async with running_link(secure, "P", ca_file=cert) as link:
            assert (await until_failed(link)).startswith((f"TLS with {server.address} failed: ", server.address))
        async with running_link(secure, "P", ca_file=cert, cert_file=cert, key_file=key) as link:
            await link.connected.wait()


async def test_a_password_is_not_sent_without_tls_where_tls_is_wanted(nats: NatsServer) -> None:
    got = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"auth_required": true, "max_payload": 1048576}\r\n')
        got.extend(await reader.read())
        writer.close()

    port = free_port()
    async with (
        await asyncio.start_server(serve, "127.0.0.1", port),
        running_link(f"tls://me:hunter2@127.0.0.1:{port}", "P") as link,
    ):
        assert f"127.0.0.1:{port} offers no TLS" in await until_failed(link)
    assert b"" == got
    async with running_link(f"tls://{nats.address}", "P") as link:
        assert f"{nats.address} offers no TLS" in await until_failed(link)


async def test_a_server_with_too_small_messages_is_refused() -> None:
    async with running_nats("max_payload: 65536") as server, running_link(server.url, "P") as link:
        assert "set its max_payload to 524288 or more" in await until_failed(link)


async def test_the_next_server_of_a_cluster_takes_over(prefix: str) -> None:
    async with running_cluster() as servers:
        urls = tuple(server.url for server in servers)
        with capture_logs() as logs:
            async with running_link(urls, prefix, "a") as link, running_link(urls, prefix, "b") as other:
                received = Received()
                other.subscribe("log", received.receive)
                await asyncio.gather(link.connected.wait(), other.connected.wait())
                await until_received(link, received, b"before")
                [used] = {line["server"] for line in logs[:1]}
                await next(server for server in servers if server.address == used).kill()
                await until_received(link, received, b"after")
        assert [] == [line for line in logs if "nothing listens" in line.get("reason", "")]
        assert used not in [line["server"] for line in logs[2:] if line["event"] == "relay_connected"]


async def test_a_link_that_is_stopped_while_it_connects_ends(nats: NatsServer, prefix: str) -> None:
    for steps in itertools.count():
        link = Link(LinkOptions((nats.url,), prefix, "node"))
        running = asyncio.create_task(link.run())
        for _ in range(steps):
            await asyncio.sleep(0)
        was_connected = link.connected.is_set()
        running.cancel()
        await asyncio.wait({running}, timeout=10)
        assert running.cancelled(), steps
        if was_connected:
            break
