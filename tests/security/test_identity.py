"""Tokens and the real daemon: who gets in, who stays, and what an operator learns."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from daemon.core.errors import BadToken
from daemon.gateway.auth import Authenticator
from daemon.postgres.connect import Connection, connect
from daemon.systemd import monotonic_usec
from tests.acceptance.chat import Chat
from tests.support.daemon import Client, Daemon, command, free_port, get, token
from tests.support.gateways import PLACES, node
from tests.support.issuer import (
    EC,
    ED,
    RSA,
    KeyServer,
    claims,
    encoded,
    key_server,
    key_set,
    page,
    public_jwk,
    public_pem,
    token_of,
    write,
)

OLD = b"a secret that is being replaced, still"
NONE = b'{"alg": "none"}'
UNSET, SHORT = "", "short"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
async def issuer() -> AsyncIterator[KeyServer]:
    async with key_server(page(key_set(public_jwk(RSA, kid="first")))) as served:
        yield served


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
async def daemon(place: str, dsn: str, issuer: KeyServer, directory: Path) -> AsyncIterator[Daemon]:
    """A node with two secrets, a public key and a key set; ChatGenius knows the users of the issuer."""
    environment = {
        "ROWCAST_MORE_SECRETS_FILE": str(write(directory / "more", OLD + b"\n")),
        "ROWCAST_PUBLIC_KEYS": str(write(directory / "ed.pem", public_pem(ED))),
        "ROWCAST_JWKS": issuer.url,
        "ROWCAST_MAP_SUBJECTS": "true",
        "ROWCAST_TOKEN_LIFETIME": "2h",
    }
    async with node(place, dsn, environment=environment, module="tests.acceptance.own_session") as process:
        yield process


@pytest.fixture
async def sql(dsn: str) -> AsyncIterator[Connection]:
    connection = await connect(dsn, application_name="test")
    yield connection
    await connection.close()


@pytest.fixture
async def chat(sql: Connection, daemon: Daemon) -> Chat:
    return await Chat.begin_again(sql, daemon)


async def hello(client: Client, its_token: str) -> dict[str, Any]:
    await client.say(op="hello", id=1, token=its_token)
    return await client.next()


async def answer(daemon: Daemon, its_token: str) -> tuple[dict[str, Any], tuple[int | None, str | None] | None]:
    """The answer to a hello with this token, and how the connection ends if it is an error."""
    async with daemon.raw() as client:
        frame = await hello(client, its_token)
        return frame, await client.closed() if frame["op"] == "error" else None


async def logged(daemon: Daemon, count: int, *names: str) -> list[dict[str, Any]]:
    """Wait until so many events of these names have been logged."""
    while len(found := [line for line in daemon.events() if line["event"] in names]) < count:
        await asyncio.sleep(0.01)
    return found


REFUSED: dict[str, Callable[[Chat], str]] = {
    "alg none": lambda chat: f"{encoded(NONE)}.{encoded(json.dumps(claims(chat.ada)).encode())}.",
    "a forged secret": lambda chat: Authenticator(OLD[::-1]).issue(chat.ada, 60),
    "expired": lambda chat: token(chat.ada, ttl=-1),
    "valid for too long": lambda chat: token(chat.ada, ttl=3 * 3600),
    "an unknown key": lambda chat: token_of(EC, "ada", "unknown"),
    "a foreign key by a known name": lambda chat: token_of(EC, "ada", "first"),
    "a subject whom the pack does not know": lambda chat: token_of(RSA, "auth0|nobody", "first"),
    "the id of a user, which is no subject": lambda chat: token_of(RSA, chat.ada, "first"),
    "a subject that the database cannot express": lambda chat: token_of(RSA, "ada\0", "first"),
    "injected SQL": lambda chat: token_of(RSA, "' or true --", "first"),
    "no token": lambda chat: "x",
}


async def test_every_token_that_is_refused_gets_the_same_answer(daemon: Daemon, chat: Chat) -> None:
    expected = (
        {
            "op": "error",
            "id": 1,
            "code": "token",
            "message": str(BadToken()),
            "retry": False,
        },
        (4401, "token"),
    )
    answers = {name: await answer(daemon, make(chat)) for name, make in REFUSED.items()}
    assert dict.fromkeys(REFUSED, expected) == answers


async def test_a_token_of_each_key_welcomes_its_user(daemon: Daemon, chat: Chat) -> None:
    tokens = {
        token(chat.ada): chat.ada,
        Authenticator(OLD).issue(chat.bob, 60): chat.bob,
        token_of(RSA, "ada", "first"): chat.ada,
        token_of(ED, "bob"): chat.bob,
    }
    for its_token, user in tokens.items():
        frame, _ = await answer(daemon, its_token)
        assert ("welcome", user) == (frame["op"], frame.get("user"))
        assert 50 < frame["expires_in"] <= 3600


async def test_a_mapped_user_follows_what_that_user_may_read(daemon: Daemon, chat: Chat) -> None:
    async with daemon.raw() as client:
        await hello(client, token_of(RSA, "ada", "first"))
        await client.subscribe(chat.topic)
        await chat.say("for ada")
        assert "for ada" == (await client.changes())[0]["record"]["content"]


async def test_a_user_that_is_deleted_is_nobody_at_the_next_hello(daemon: Daemon, chat: Chat) -> None:
    its_token = token_of(RSA, "bob", "first")
    assert "welcome" == (await answer(daemon, its_token))[0]["op"]
    await chat.sql.execute("update chatgenius.users set deleted_at = now() where id = $1", chat.bob)
    assert "token" == (await answer(daemon, its_token))[0]["code"]


async def test_a_hello_while_users_cannot_be_looked_up_is_to_be_repeated(daemon: Daemon, chat: Chat) -> None:
    async with chat.sql.transaction():
        await chat.sql.execute("lock table chatgenius.users in access exclusive mode")
        assert "welcome" == (await answer(daemon, token(chat.ada)))[0]["op"]  # it names its user itself
        frame, end = await answer(daemon, token_of(RSA, "ada", "first"))
    assert ("unavailable", True, (1013, "unavailable")) == (frame["code"], frame["retry"], end)


async def test_many_clients_of_another_issuer_are_welcomed_at_once(daemon: Daemon, chat: Chat) -> None:
    answers = await asyncio.gather(*(answer(daemon, token_of(RSA, name, "first")) for name in ["ada", "bob"] * 25))
    assert [chat.ada, chat.bob] * 25 == [frame["user"] for frame, _ in answers]


async def test_frames_that_follow_a_hello_that_waits_are_answered_in_order(daemon: Daemon, chat: Chat) -> None:
    for more in ({}, {"since": "stored", "device": "desk"}):
        async with daemon.raw() as client:
            await client.say(op="hello", token=token_of(RSA, "ada", "first"), **more)
            await client.say(op="subscribe", topic=chat.topic)
            await client.say(op="ping", id="p")
            assert ["welcome", "subscribed", "pong"] == [(await client.next())["op"] for _ in range(3)]


async def test_a_token_is_renewed_in_band_and_outlives_the_first(daemon: Daemon, chat: Chat) -> None:
    first = token(chat.ada, ttl=2)
    async with daemon.raw() as client, daemon.raw() as other:
        assert 0 < (await hello(client, first))["expires_in"] <= 2
        await hello(other, first)
        await client.subscribe(chat.topic)
        await client.say(op="token", id="r", token=token_of(RSA, "ada", "first"))
        renewed = await client.next()
        assert ("renewed", "r") == (renewed["op"], renewed["id"])
        assert 3500 < renewed["expires_in"] <= 3600
        assert (4401, "token") == await other.closed()
        await chat.say("still here")
        assert "still here" == (await client.changes())[0]["record"]["content"]


@pytest.mark.parametrize(
    "make", [lambda chat: token(chat.bob), lambda chat: token_of(RSA, "bob", "first"), lambda chat: "forged"]
)
async def test_a_renewal_by_another_user_or_with_a_bad_token_ends_the_connection(
    daemon: Daemon, chat: Chat, make: Callable[[Chat], str]
) -> None:
    async with daemon.client(chat.ada) as client:
        await client.say(op="token", token=make(chat))
        frame = await client.next()
        assert ("error", "token") == (frame["op"], frame["code"])
        assert (4401, "token") == await client.closed()


async def test_a_token_frame_before_the_hello_is_not_a_hello(daemon: Daemon, chat: Chat) -> None:
    async with daemon.raw() as client:
        await client.say(op="token", token=token(chat.ada))
        assert "hello_expected" == (await client.next())["code"]
        assert 4400 == (await client.closed())[0]


async def test_nothing_is_sent_once_a_token_has_expired(daemon: Daemon, chat: Chat) -> None:
    async with daemon.raw() as client:
        await hello(client, token(chat.ada, ttl=2))
        await client.subscribe(chat.topic)
        ended = asyncio.Event()
        writing = asyncio.create_task(_write_until(chat, ended))
        frames = await client.until("error")
        assert {"changes"} >= {frame["op"] for frame in frames[:-1]}
        assert "token" == frames[-1]["code"]
        assert (4401, "token") == await client.closed()
        ended.set()
        await writing


async def _write_until(chat: Chat, ended: asyncio.Event) -> None:
    while not ended.is_set():
        await chat.say("more")


async def test_keys_that_the_issuer_replaces_are_fetched_and_a_failure_keeps_them(
    place: str, dsn: str, daemon: Daemon, chat: Chat, served: KeyServer
) -> None:
    async with node(place, dsn, environment={"ROWCAST_JWKS": served.url}) as own:
        assert "welcome" == (await answer(own, token_of(RSA, chat.ada, "first")))[0]["op"]
        served.answer = page(key_set(public_jwk(EC, kid="second")))
        assert "welcome" == (await answer(own, token_of(EC, chat.ada, "second")))[0]["op"]
        assert "token" == (await answer(own, token_of(RSA, chat.ada, "first")))[0]["code"]
        assert ["keys_changed"] == [line["event"] for line in own.events() if line["event"].startswith("keys_")]
        metrics = (await get(f"{own.http}/metrics"))[1]
        assert 'rowcast_key_fetches_total{outcome="done"} 2.0' in metrics
        served.answer = page(b"", "503 Service Unavailable")
        own.process.send_signal(signal.SIGHUP)
        failed, reloaded = await logged(own, 2, "keys_unavailable", "reloaded")
        assert "it answers 503, not 200" == failed["data"]["reason"]
        assert {"keys": 2} == reloaded["data"]  # the secret, and the key that was fetched last
        assert ["the keys cannot be fetched: it answers 503, not 200"] == json.loads(
            (await get(f"{own.http}/readyz"))[1]
        )["warnings"]
        assert "welcome" == (await answer(own, token_of(EC, chat.ada, "second")))[0]["op"]


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_sighup_replaces_secrets_without_dropping_anybody(
    place: str, dsn: str, daemon: Daemon, chat: Chat, tmp_path: Path, workers: str
) -> None:
    file = write(tmp_path / "more", OLD)
    environment = {"ROWCAST_MORE_SECRETS_FILE": str(file), "ROWCAST_WORKERS": workers}
    new = OLD[::-1]
    running = node(place, dsn, environment=environment, module="tests.acceptance.own_session")
    async with running as own, own.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        for content, event in ((b"short", "reload_failed"), (new, "reloaded")):
            file.write_bytes(content)
            asked = monotonic_usec()
            own.process.send_signal(signal.SIGHUP)
            _, began = await own.notices.wait_for("RELOADING=1")
            assert asked <= int(began.removeprefix("MONOTONIC_USEC=")) <= monotonic_usec()
            await own.notices.wait_for("READY=1")  # of every worker: then `systemctl reload` returns
            lines = await logged(own, int(workers), event)
            assert int(workers) == len(lines)
            assert OLD.decode() not in str(lines)
        assert [{"keys": 2}] * int(workers) == [
            {name: value for name, value in line["data"].items() if name != "worker"} for line in lines
        ]
        for _ in range(2 * int(workers)):
            assert "welcome" == (await answer(own, Authenticator(new).issue(chat.ada, 60)))[0]["op"]
            assert "token" == (await answer(own, Authenticator(OLD).issue(chat.ada, 60)))[0]["code"]
        await chat.say("still here")
        assert "still here" == (await client.changes())[0]["record"]["content"]
        assert 0 == await own.stop()
        assert not {"worker_ended", "worker_hung"} & {line["event"] for line in own.events()}


async def test_a_worker_that_takes_the_place_of_another_one_has_the_keys_of_the_last_reload(
    place: str, dsn: str, chat: Chat, tmp_path: Path
) -> None:
    file = write(tmp_path / "more", OLD)
    environment = {"ROWCAST_MORE_SECRETS_FILE": str(file), "ROWCAST_WORKERS": "2"}
    async with node(place, dsn, environment=environment, module="tests.acceptance.own_session") as own:
        new = OLD[::-1]
        file.write_bytes(new)
        own.process.send_signal(signal.SIGHUP)
        await logged(own, 2, "reloaded")
        for line in await logged(own, 2, "worker_started"):
            os.kill(line["data"]["pid"], signal.SIGKILL)
        await logged(own, 4, "serving")
        for _ in range(4):
            assert "welcome" == (await answer(own, Authenticator(new).issue(chat.ada, 60)))[0]["op"]
            assert "token" == (await answer(own, Authenticator(OLD).issue(chat.ada, 60)))[0]["code"]


@pytest.mark.parametrize(
    ("environment", "code", "line"),
    [
        (
            {"ROWCAST_PUBLIC_KEYS": "absent.pem"},
            78,
            "The key file absent.pem cannot be used (No such file or directory)",
        ),
        ({"ROWCAST_JWKS": "absent.json"}, 78, "The key file absent.json cannot be used (No such file or directory)"),
        ({"ROWCAST_JWKS": "http://127.0.0.1:1/k"}, 49, "The keys at http://127.0.0.1:1/k cannot be fetched"),
        ({"ROWCAST_JWKS": "http://10.0.0.1/k"}, 78, "ROWCAST_JWKS: https is needed"),
        ({"ROWCAST_JWKS": "https://u:p@a.example/k"}, 78, "ROWCAST_JWKS: a URL such as https://HOST/PATH is needed"),
        ({"ROWCAST_JWKS": "ftp://a.example/k"}, 78, "ROWCAST_JWKS: https is needed"),
        ({"ROWCAST_MORE_SECRETS": SHORT}, 78, "ROWCAST_MORE_SECRETS: 32 bytes or more are needed"),
        ({"ROWCAST_SECRET": UNSET}, 78, "No key for tokens is configured"),
        ({"ROWCAST_TOKEN_LIFETIME": "0s"}, 78, "ROWCAST_TOKEN_LIFETIME"),
        ({"ROWCAST_MAP_SUBJECTS": "true", "ROWCAST_PACKS": "disclosure"}, 78, "ROWCAST_MAP_SUBJECTS needs one pack"),
    ],
)
async def test_a_start_with_wrong_keys_ends_in_one_line_with_a_code(
    dsn: str, environment: dict[str, str], code: int, line: str
) -> None:
    found, _, errors = await command(DATABASE_URL=dsn, ROWCAST_LISTEN=f"127.0.0.1:{free_port()}", **environment)
    assert code == found, errors
    assert errors.startswith(f"daemon: {line}"), errors
    assert 1 == len(errors.splitlines())
