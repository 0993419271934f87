"""Signals, presence and acknowledgements, on two daemons of one database, one of which has two workers."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from daemon.delivery.presence import GRACE
from daemon.postgres.connect import Connection, connect
from tests.acceptance.chat import Chat
from tests.support.daemon import Client, Daemon, Frame, daemon_process
from tests.support.postgres import Server

LEAVE_TIMEOUT = 15.0  # seconds after which nobody sees the people of a daemon that was killed


@pytest.fixture(scope="module")
async def database(postgres: Server) -> AsyncIterator[str]:
    async with postgres.chatgenius() as dsn:
        yield dsn


@pytest.fixture(scope="module")
async def sql(database: str) -> AsyncIterator[Connection]:
    connection = await connect(database, application_name="test")
    yield connection
    await connection.close()


@pytest.fixture(scope="module")
async def daemons(database: str) -> AsyncIterator[list[Daemon]]:
    async with AsyncExitStack() as stack:
        workers = ("2", "1")
        yield [
            await stack.enter_async_context(daemon_process(database, environment={"ROWCAST_WORKERS": number}))
            for number in workers
        ]


@pytest.fixture(scope="module")
async def chat(daemons: list[Daemon], sql: Connection) -> Chat:
    """Both users are members of the channel."""
    chat = await Chat.begin(sql)
    await sql.execute(
        "insert into chatgenius.channel_members (channel_id, user_id) values ($1, $2)", chat.channel, chat.bob
    )
    for daemon in daemons:
        await chat.settled(daemon)
    return chat


async def presence(client: Client) -> Frame:
    return next(frame for frame in reversed(await client.until("presence")) if frame["op"] == "presence")


async def status(client: Client, user: str) -> str:
    """The status of a user, as the next change says."""
    while True:
        for change in (await client.until("changes"))[-1]["changes"]:
            if change["table"] == "user_status" and change["key"]["user_id"] == user:
                return str(change["record"]["status"])


async def test_a_signal_reaches_the_followers_on_every_daemon_but_not_its_sender(
    daemons: list[Daemon], chat: Chat, sql: Connection
) -> None:
    one, two = daemons
    await sql.execute("select pg_notify('rowcast_signals', t) from unnest(array['', '[]', '{}', 'garbage']) as t")
    async with one.client(chat.ada) as ada, one.client(chat.bob) as near, two.client(chat.bob) as far:
        for client in (ada, near, far):
            await client.subscribe(chat.topic)
        long = "é😀" * 2700  # so much does not fit into one notification
        for data in ({"at": 1}, long):
            await ada.say(op="signal", topic=chat.topic, name="typing", data=data)
            expected = {"op": "signal", "topic": chat.topic, "name": "typing", "data": data, "user": chat.ada}
            assert [expected, expected] == [(await client.until("signal"))[-1] for client in (near, far)]
        await ada.say(op="ping", id=1)
        assert "signal" not in {frame["op"] for frame in await ada.until("pong")}
        await ada.say(op="signal", id=2, topic="users", name="typing")
        assert "not_subscribed" == (await ada.until("error"))[-1]["code"]


async def test_people_are_seen_on_every_daemon_and_stay_while_they_reconnect(
    daemons: list[Daemon], chat: Chat, sql: Connection
) -> None:
    one, two = daemons
    async with one.client(chat.ada, device="laptop") as ada:
        await ada.subscribe(chat.topic, presence={"data": {"mood": "good"}})
        [mine] = (await presence(ada))["state"][chat.ada]
        assert ("laptop", {"mood": "good"}) == (mine["device"], mine["data"])
        async with two.client(chat.bob, device="phone") as bob:
            await bob.subscribe(chat.topic, presence={})
            assert {chat.ada, chat.bob} == (await presence(bob))["state"].keys()
            assert [(chat.bob, "phone")] == [(one["user"], one["device"]) for one in (await presence(ada))["joined"]]
            await ada.say(op="presence", topic=chat.topic, data={"mood": "better"})
            for client in (ada, bob):
                assert {"mood": "better"} == (await presence(client))["updated"][0]["data"]
        async with one.client(chat.bob, device="phone") as bob:  # on the other daemon
            await bob.subscribe(chat.topic, presence={"data": {"back": True}})
            assert {chat.ada, chat.bob} == (await presence(bob))["state"].keys()
            assert {"back": True} == (await presence(ada))["updated"][0]["data"]
            async with asyncio.timeout(GRACE / 2):  # the other daemon has seen him go, and waits for him no longer
                while await sql.fetchval("select count(*) from rowcast.people where user_id = $1", chat.bob) > 1:
                    await asyncio.sleep(0)
            await bob.say(op="unsubscribe", topic=chat.topic)
            await bob.until("unsubscribed")
            left: list[dict[str, str]] = []
            while not left:  # before it may come what he last said on the other daemon
                left = (await presence(ada)).get("left", [])
            assert [{"user": chat.bob, "device": "phone"}] == left


async def test_the_people_of_a_killed_daemon_leave_within_fifteen_seconds_and_nobody_is_listed_twice(
    daemons: list[Daemon], chat: Chat, database: str, sql: Connection
) -> None:
    async with daemons[0].client(chat.ada, device="laptop") as ada:
        await ada.subscribe(chat.topic, presence={})
        await presence(ada)
        async with (
            daemon_process(database) as killed,
            killed.client(chat.bob, device="phone") as phone,
            killed.client(chat.bob, device="tablet") as tablet,
        ):
            for client in (phone, tablet):
                await client.subscribe(chat.topic, presence={})
            joined: list[str] = []
            while len(joined) < 2:
                joined += [one["device"] for one in (await presence(ada))["joined"]]
            assert ["phone", "tablet"] == sorted(joined)
            await killed.stop(signal.SIGKILL)
            async with asyncio.timeout(LEAVE_TIMEOUT), daemons[1].client(chat.bob, device="phone") as back:
                await back.subscribe(chat.topic, presence={})
                listed = (await presence(back))["state"][chat.bob]
                assert ["phone", "tablet"] == sorted(one["device"] for one in listed)
                left = await presence(ada)
                assert [{"user": chat.bob, "device": "tablet"}] == left["left"]
                assert not left.keys() & {"joined", "updated"}


async def test_the_status_of_users_and_the_state_of_their_devices_follow(
    daemons: list[Daemon], chat: Chat, sql: Connection
) -> None:
    one, two = daemons
    async with one.client(chat.ada) as ada:
        await ada.subscribe("users")
        cyd = await sql.fetchval(
            "insert into chatgenius.users (auth0_id, email, username) values ('c', 'c@c', 'c') returning id"
        )
        async with two.client(cyd, device="desk") as client:
            await client.subscribe(f"user:{cyd}")
            pos = client.welcome["pos"]
            await client.say(op="ack", pos=pos)
            [synced] = await client.changes()
            assert {"rowcast_device": "desk"} == synced["record"]["metadata"]
            await client.subscribe("users", presence={})
            assert "online" == await status(ada, cyd)
            await client.say(op="unsubscribe", topic="users")
            assert "offline" == await status(ada, cyd)
        async with one.client(cyd, since="stored", device="desk") as client:
            assert pos == client.welcome["since"]
            assert pos == (await client.subscribe("users"))["pos"]
        async with one.client(cyd, since="stored", device="another") as client:
            assert "since" not in client.welcome
