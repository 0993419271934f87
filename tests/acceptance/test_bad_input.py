"""Client errors: each gets its code and affects no other client."""

import json
import time
from collections.abc import AsyncIterator

import pytest
from websockets.frames import Frame, Opcode

from daemon.gateway.auth import Authenticator
from daemon.postgres.connect import Connection
from tests.acceptance.chat import Chat
from tests.support.daemon import Daemon, daemon_process, token
from tests.support.gateways import PLACES, node
from tests.support.postgres import Server


@pytest.fixture(scope="module")
async def database(postgres: Server) -> AsyncIterator[str]:
    async with postgres.chatgenius() as dsn:
        yield dsn


@pytest.fixture(scope="module", params=PLACES)
async def daemon(request: pytest.FixtureRequest, database: str) -> AsyncIterator[Daemon]:
    async with node(request.param, database) as process:
        yield process


@pytest.fixture
async def chat(daemon: Daemon, sql: Connection) -> Chat:
    return await Chat.begin_again(sql, daemon)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", "bad_json"),
        ("[]", "bad_json"),
        ('{"op": "fly"}', "unknown_op"),
        ('{"op": "subscribe"}', "bad_frame"),
        ('{"op": "subscribe", "topic": 7}', "bad_frame"),
        ('{"op": "subscribe", "topic": "users", "since": "yesterday"}', "bad_frame"),
        ('{"op": "subscribe", "topic": "users", "where": {"eq": ["id", 1]}}', "bad_filter"),
        ('{"op": "hello", "token": "again"}', "already_greeted"),
    ],
)
async def test_a_bad_frame_gets_an_error_and_the_connection_stays_open(
    daemon: Daemon, chat: Chat, text: str, code: str
) -> None:
    async with daemon.client(chat.ada) as client:
        await client.connection.send(text)
        error = await client.next()
        assert ("error", code, False) == (error["op"], error["code"], error["retry"])
        await client.say(op="ping", id=1)
        assert {"op": "pong", "id": 1} == await client.next()


async def test_an_error_repeats_the_id_of_the_frame_it_answers(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        await client.say(op="subscribe", id="mine")
        assert "mine" == (await client.next())["id"]


@pytest.mark.parametrize(
    ("text", "code", "close"),
    [
        ("{", "bad_json", 4400),
        ('{"op": "ping"}', "hello_expected", 4400),
        ('{"op": "fly"}', "unknown_op", 4400),
        ('{"op": "hello"}', "bad_frame", 4400),
        ('{"op": "hello", "token": "t", "numbers": "exact"}', "bad_frame", 4400),
        ('{"op": "hello", "token": ""}', "token", 4401),
        ('{"op": "hello", "token": "a.b.c"}', "token", 4401),
    ],
)
async def test_a_bad_first_frame_gets_an_error_and_a_close(daemon: Daemon, text: str, code: str, close: int) -> None:
    async with daemon.raw() as client:
        await client.connection.send(text)
        assert code == (await client.next())["code"]
        assert close == (await client.closed())[0]


async def test_a_token_that_expired_long_ago_or_just_now_and_a_forged_one_get_the_same_answer(
    daemon: Daemon, chat: Chat
) -> None:
    forged = Authenticator(b"another key that is just as long as the right one").issue(chat.ada, 60)
    answers = []
    for bad in (token(chat.ada, ttl=-3600), token(chat.ada, ttl=-10), forged):
        async with daemon.raw() as client:
            await client.say(op="hello", token=bad)
            answers.append((await client.next(), (await client.closed())[0]))
    assert answers[0] == answers[1] == answers[2]
    assert ("token", 4401) == (answers[0][0]["code"], answers[0][1])


async def test_a_token_that_expires_ends_the_connection(daemon: Daemon, chat: Chat) -> None:
    # Tokens expire at whole seconds.
    async with daemon.raw() as client:
        await client.say(op="hello", token=token(chat.ada, ttl=2))
        assert "welcome" == (await client.next())["op"]
        assert "token" == (await client.next())["code"]
        assert 4401 == (await client.closed())[0]


async def test_a_silent_client_is_closed_after_five_seconds(daemon: Daemon) -> None:
    began = time.monotonic()
    async with daemon.raw() as client:
        assert "hello_timeout" == (await client.next())["code"]
        assert 4401 == (await client.closed())[0]
    assert time.monotonic() - began >= 5.0


async def test_a_frame_of_two_megabytes_closes_only_its_own_connection(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as bystander, daemon.client(chat.bob) as offender:
        await bystander.subscribe(chat.topic)
        await offender.connection.send("x" * 2_000_000)
        assert 1009 == (await offender.closed())[0]
        await chat.say("still here")
        assert "still here" == (await bystander.changes())[0]["record"]["content"]


async def test_a_client_that_sends_requests_faster_than_they_are_answered_is_closed(
    daemon: Daemon, chat: Chat
) -> None:
    async with daemon.client(chat.ada) as bystander, daemon.client(chat.bob) as offender:
        await bystander.subscribe(chat.topic)
        request = Frame(Opcode.TEXT, b'{"op": "subscribe", "topic": "users"}')
        # In one write, so that the daemon reads them together: all but the first wait for the answer to the first.
        offender.connection.transport.write(b"".join(request.serialize(mask=True) for _ in range(1000)))
        assert 4429 == (await offender.closed())[0]
        await chat.say("still here")
        assert "still here" == (await bystander.changes())[0]["record"]["content"]


async def test_the_number_of_topics_of_a_connection_is_limited(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        limit = client.welcome["limits"]["topics"]
        channels = await chat.sql.fetch(
            "insert into chatgenius.channels (name) select 'c' || n from generate_series(1, $1) as n returning id",
            limit + 1,
        )
        await chat.sql.executemany(
            "insert into chatgenius.channel_members (channel_id, user_id) values ($1, $2)",
            [(row["id"], chat.ada) for row in channels],
        )
        for row in channels:
            await client.say(op="subscribe", topic=f"channel:{row['id']}", id=row["id"])
        frames = await client.until("error")
    answers = [frame for frame in frames if "id" in frame]
    assert ["subscribed"] * limit + ["error"] == [answer["op"] for answer in answers]
    assert "too_many_topics" == answers[-1]["code"]


async def test_a_topic_can_be_subscribed_again_but_not_twice_at_once(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        assert "subscribed" == (await client.subscribe("users"))["op"]
        assert "already_subscribed" == (await client.subscribe("users"))["code"]
        await client.say(op="unsubscribe", topic="users", id=3)
        assert {"op": "unsubscribed", "id": 3, "topic": "users"} == await client.next()
        assert "subscribed" == (await client.subscribe("users"))["op"]


async def test_no_client_input_is_logged(chat: Chat, database: str) -> None:
    good = token(chat.ada)
    async with daemon_process(database) as daemon:
        async with daemon.raw() as client:
            await client.say(op="hello", token=good)
            await client.next()
            await client.say(op="subscribe", topic="canary-topic")
            await client.next()
            await client.connection.send('{"op": "canary-op"}')
            await client.next()
        await daemon.stop()
        text = daemon.log.read_text()
    assert good not in text
    assert "canary" not in text
    assert json.loads(text.splitlines()[-1])["event"] == "stopped"
