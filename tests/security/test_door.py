"""The door of a real daemon: TLS and its reload, who may come in, what is where, and wrong settings."""

import asyncio
import signal
import ssl
from collections.abc import AsyncIterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin, Subprotocol

from daemon.app.node import door_of
from daemon.commands.status import status
from daemon.postgres.connect import Connection
from daemon.postgres.connect import connect as connect_to_database
from daemon.settings import Address
from daemon.settings.load import load
from tests.acceptance.chat import EMPTY, Chat
from tests.support.daemon import Client, Daemon, command, free_port, get, token
from tests.support.gateways import PLACES, node
from tests.support.issuer import self_signed


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def sql(dsn: str) -> AsyncIterator[Connection]:
    connection = await connect_to_database(dsn, application_name="test")
    yield connection
    await connection.close()


@pytest.fixture
async def chat(sql: Connection) -> Chat:
    await sql.execute(EMPTY)
    return await Chat.begin(sql)


def certificate_of(daemon: Daemon) -> str:
    """The certificate that a new connection gets."""
    return ssl.get_server_certificate(daemon.address).strip()


async def reload(daemon: Daemon, event: str, **data: object) -> dict[str, Any]:
    """Send a SIGHUP, and wait until this has been logged; returns its data."""
    before = len(daemon.events())
    daemon.process.send_signal(signal.SIGHUP)

    def found() -> list[dict[str, Any]]:
        logged = [line["data"] for line in daemon.events()[before:] if line["event"] == event]
        return [line for line in logged if data.items() <= line.items()]

    while not found():
        await asyncio.sleep(0.01)
    return found()[0]


async def test_a_daemon_with_tls_reloads_its_certificate_without_dropping_anybody(
    place: str, dsn: str, chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, key = self_signed(tmp_path)
    first = certificate.read_text().strip()
    environment = {"ROWCAST_TLS_CERTIFICATE": str(certificate), "ROWCAST_TLS_KEY": str(key)}
    trusting = ssl.create_default_context(cafile=certificate)
    running = node(place, dsn, environment=environment, module="tests.acceptance.own_session")
    async with running as own, connect(wss(own), ssl=trusting, subprotocols=[Subprotocol("rowcast.v1")]) as socket:
        client = Client(socket)
        await client.say(op="hello", token=token(chat.ada))
        assert "welcome" == (await client.next())["op"]
        await client.subscribe(chat.topic)
        good = key.read_bytes()
        key.write_bytes(b"hello")
        assert "the key is not usable" in (await reload(own, "reload_failed"))["reason"]
        assert first == await asyncio.to_thread(certificate_of, own)
        key.write_bytes(good)
        second = self_signed(tmp_path)[0].read_text().strip()
        await reload(own, "reloaded", certificates=1)
        assert second == await asyncio.to_thread(certificate_of, own) != first
        await chat.say("still here")
        assert "still here" == (await client.changes())[0]["record"]["content"]
        settings = load(listen=Address(*own.address), tls_certificate=certificate, tls_key=key)
        assert await asyncio.to_thread(status, settings, watch=False, as_json=False)
        assert "the TLS certificate ends in 1.0 days" in capsys.readouterr().out


def wss(daemon: Daemon) -> str:
    return daemon.url.replace("ws:", "wss:")


async def test_only_pages_of_listed_origins_and_this_machine_connect(place: str, dsn: str, chat: Chat) -> None:
    environment = {"ROWCAST_ORIGINS": "https://chat.example.com"}
    async with node(place, dsn, environment=environment) as own:
        for origin in ("https://evil.example", "https://chat.example.com.evil.example"):
            with pytest.raises(InvalidStatus) as refused:
                async with own.raw(origin=Origin(origin)):
                    pass
            assert 403 == refused.value.response.status_code
            assert b"ROWCAST_ORIGINS" in (refused.value.response.body or b"")
        for allowed in ("https://chat.example.com", own.http, "null", "http://localhost:5173"):
            async with own.raw(origin=Origin(allowed)) as client:
                await client.say(op="hello", token=token(chat.ada))
                assert "welcome" == (await client.next())["op"]
        assert 'reason="origin"} 2.0' in (await get(f"{own.http}/metrics"))[1]


async def test_a_reload_changes_who_may_come_in_and_how_many_without_dropping_anybody(
    place: str, dsn: str, chat: Chat, tmp_path: Path
) -> None:
    file = tmp_path / "rowcast.toml"
    file.write_text('origins = ["https://old.example"]\n')
    running = node(place, dsn, "--config", str(file), module="tests.acceptance.own_session")
    async with running as own, own.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        file.write_text(
            'origins = ["https://new.example"]\nhosts = ["chat.example.com"]\ntrusted_proxies = ["127.0.0.1"]\n'
            "max_topics = 1\nmax_clients_per_user = 1\nmax_clients_per_address = 2\nworkers = 2\n"
            "signal_rate = 1\nmax_filter = 256\nmax_present = 1\n"
        )
        limits = ["MAX_CLIENTS_PER_ADDRESS", "MAX_CLIENTS_PER_USER", "MAX_FILTER", "MAX_PRESENT", "MAX_TOPICS"]
        changed = ["HOSTS", *limits, "ORIGINS", "SIGNAL_RATE"]
        settings = [f"ROWCAST_{name}" for name in [*changed, "TRUSTED_PROXIES"]]
        await reload(own, "reloaded", settings=settings)
        assert ["ROWCAST_WORKERS"] == (await reload(own, "reload_incomplete"))["settings"]
        with pytest.raises(InvalidStatus):
            async with own.raw(origin=Origin("https://old.example")):
                pass
        async with own.raw(origin=Origin("https://new.example")) as another:
            await another.say(op="hello", token=token(chat.ada))
            assert "too_many_connections" == (await another.next())["code"]
        async with own.client(chat.bob) as another:
            assert 1 == another.welcome["limits"]["topics"]
            await another.subscribe("users")
            assert "too_many_topics" == (await another.subscribe(chat.topic))["code"]
            for number in range(2):
                await another.say(op="signal", id=number, topic="users", name="typing")
            assert (1, "too_many_signals") == itemgetter("id", "code")(await another.next())
            where = {"users": {"id": {"in": [str(number) * 9 for number in range(50)]}}}
            await another.say(op="unsubscribe", topic="users")
            await another.next()
            found = await another.subscribe("users", where=where)
            assert "filter_too_large" == found.get("code"), found
        for headers, status in (({"Host": "evil.example"}, 421), ({"X-Forwarded-For": "192.0.2.1"}, 200)):
            assert status == (await get(f"{own.http}/healthz", headers))[0]
        there = {"X-Forwarded-For": "192.0.2.1"}
        async with own.raw(additional_headers=there), own.raw(additional_headers=there):
            with pytest.raises(InvalidStatus) as refused:
                async with own.raw(additional_headers=there):
                    pass
            assert 429 == refused.value.response.status_code
            async with own.raw(additional_headers={"X-Forwarded-For": "192.0.2.2"}):
                assert 'reason="address"} 1.0' in (await get(f"{own.http}/metrics"))[1]
        assert "subscribed" == (await client.subscribe("users"))["op"], "who is connected keeps what was agreed"
        await chat.say("still here")
        assert "still here" == (await client.changes())[0]["record"]["content"]
        file.write_text("max_topics = 0\n")
        assert "max_topics" in (await reload(own, "reload_failed"))["reason"]


def test_in_production_a_page_of_the_same_machine_has_to_be_listed() -> None:
    proxies = ("unix", "10.0.0.0/8", "::1")
    door = door_of(
        load(environment="production", origins=("null",), hosts=("Chat.example.com",), trusted_proxies=proxies)
    )
    assert not door.admits_local_pages
    assert {"null"} == door.origins
    assert {"chat.example.com"} == door.hosts
    assert [True] * 3 == [door.trusts(host) for host in ("", "10.1.2.3", "::1")]
    assert not door.trusts("192.0.2.1")
    assert door_of(load()).admits_local_pages


async def test_with_a_listener_for_metrics_what_is_for_operators_is_only_there(place: str, dsn: str) -> None:
    async with node(place, dsn, environment={"ROWCAST_METRICS_LISTEN": "127.0.0.1:0"}) as own:
        [serving] = [line["data"] for line in own.events() if line["event"] == "serving"]
        admin = serving["metrics"].removesuffix("/metrics")
        for path in ("/metrics", "/console", "/console/state", "/readyz", "/healthz"):
            assert 200 == (await get(f"{admin}{path}"))[0]
        for path in ("/metrics", "/console", "/console/state", "/console/console.css"):
            assert 404 == (await get(f"{own.http}{path}"))[0]
        assert (200, '{"ready":true}') == await get(f"{own.http}/readyz")


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"ROWCAST_TLS_CERTIFICATE": "a.pem"}, "ROWCAST_TLS_CERTIFICATE and ROWCAST_TLS_KEY need each other"),
        (
            {"ROWCAST_TLS_CERTIFICATE": "a.pem", "ROWCAST_TLS_KEY": "b.pem"},
            "TLS cannot use a.pem with b.pem (a.pem: No such file or directory)",
        ),
        ({"ROWCAST_ORIGINS": "chat.example.com"}, "ROWCAST_ORIGINS: origins are written as browsers do"),
        ({"ROWCAST_ORIGINS": "https://chat.example.com:443"}, "ROWCAST_ORIGINS: origins are written as browsers do"),
        ({"ROWCAST_ORIGINS": "http://chat.example.com:80"}, "ROWCAST_ORIGINS: origins are written as browsers do"),
        ({"ROWCAST_ORIGINS": "https://bücher.example"}, "ROWCAST_ORIGINS: origins are written as browsers do"),
        ({"ROWCAST_ORIGINS": "https://chat.example.com/"}, "ROWCAST_ORIGINS: origins are written as"),
        ({"ROWCAST_HOSTS": "chat.example.com:443"}, "ROWCAST_HOSTS: names without a port are needed"),
        ({"ROWCAST_TRUSTED_PROXIES": "10.0.0.1/8"}, "ROWCAST_TRUSTED_PROXIES: addresses or networks such as"),
        ({"ROWCAST_TRUSTED_PROXIES": "proxy"}, "ROWCAST_TRUSTED_PROXIES: addresses or networks such as"),
        ({"ROWCAST_PROXY_HEADER": "x-real-ip"}, "ROWCAST_PROXY_HEADER"),
    ],
)
async def test_a_start_with_a_wrong_door_ends_in_one_line_with_a_code(
    place: str, dsn: str, environment: dict[str, str], line: str
) -> None:
    settings = {"DATABASE_URL": dsn, "ROWCAST_LISTEN": f"127.0.0.1:{free_port()}", **environment}
    if place == "gateway":
        found, _, errors = await command("gateway", ROWCAST_NATS_URL="nats://127.0.0.1:1", **settings)
    else:
        found, _, errors = await command(**settings)
    assert 78 == found, errors
    assert errors.startswith(f"daemon: {line}"), errors
    assert 1 == len(errors.splitlines())
