"""Clients that resume: many at once, or after a transaction that is too large to deliver change by change."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from daemon.postgres.connect import connect
from tests.acceptance.chat import Chat
from tests.support.daemon import Client, Daemon, Frame, daemon_process, get

CROWD = 200


async def reads(daemon: Daemon) -> tuple[float, float]:
    """How many reads of resuming clients were answered from memory, and how many by the database."""
    lines = (await get(f"{daemon.http}/metrics"))[1].splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    memory, database = (f'rowcast_resume_reads_total{{source="{source}"}}' for source in ("memory", "database"))
    return values[memory], values[database]


async def test_many_clients_that_resume_at_once_miss_nothing_and_are_served_from_memory(
    daemon: Daemon, chat: Chat
) -> None:
    async def follow(stack: AsyncExitStack, since: str | None = None) -> Client:
        client = await stack.enter_async_context(daemon.client(chat.ada, since))
        assert "subscribed" == (await client.subscribe(chat.topic))["op"]
        return client

    async with AsyncExitStack() as stack:
        crowd = await asyncio.gather(*(follow(stack) for _ in range(CROWD)))
        await chat.say("to all")
        positions = {(await client.until("changes"))[-1]["pos"] for client in crowd}
        [since] = positions
        for client in crowd:
            client.connection.transport.abort()
        for client in crowd:
            await client.connection.wait_closed()
    missed = [str(number) for number in range(20)]
    for content in missed:
        await chat.say(content)
    await chat.settled(daemon)
    async with AsyncExitStack() as stack:
        crowd = await asyncio.gather(*(follow(stack, since) for _ in range(CROWD)))
        for client in crowd:
            frames = await client.until("resumed")
            assert missed == [c["record"]["content"] for frame in frames[:-1] for c in frame["changes"]]
        await chat.say("live")
        assert {"live"} == {(await client.changes())[0]["record"]["content"] for client in crowd}
    memory, database = await reads(daemon)
    assert (True, 0) == (memory >= 2 * CROWD, database)


async def test_a_client_that_resumes_from_before_the_daemon_started_is_replayed_from_the_log(
    chat: Chat, database: str
) -> None:
    async with daemon_process(database) as daemon:
        async with daemon.client(chat.ada) as client:
            since = client.welcome["pos"]
        await chat.say("one")
        await chat.settled(daemon)
    async with daemon_process(database) as daemon, daemon.client(chat.ada, since) as client:
        await client.subscribe(chat.topic)
        assert "one" == (await client.changes())[0]["record"]["content"]
        assert (await reads(daemon))[1] > 0


@pytest.fixture
async def narrow(database: str, chat: Chat) -> AsyncIterator[Daemon]:
    """A daemon that delivers transactions of at most 10 changes one by one."""
    async with daemon_process(database, environment={"ROWCAST_TRANSACTION_CHANGES": "10"}) as process:
        yield process


async def say_much(chat: Chat, *more: str) -> None:
    """Write twenty messages and run these statements, in one transaction."""
    async with chat.sql.transaction():
        for number in range(20):
            await chat.say(f"too much {number}")
        for statement in more:
            await chat.sql.execute(statement)


def shape(frames: list[Frame]) -> list[str]:
    """Each frame in a word or two."""
    return [
        frame["changes"][0]["record"]["content"] if frame["op"] == "changes" else f"{frame['op']} {frame['reason']}"
        for frame in frames
    ]


async def test_a_too_large_transaction_resets_its_topic_in_order_live_and_in_a_replay(
    narrow: Daemon, chat: Chat
) -> None:
    async with narrow.client(chat.ada) as client:
        start = client.welcome["pos"]
        for topic in (chat.topic, f"channel:{chat.other}"):
            await client.subscribe(topic)
        await chat.say("before")
        await say_much(chat)
        await chat.say("after")
        live = [await client.next() for _ in range(3)]
        assert ["before", "reset limit", "after"] == shape(live)
        assert (chat.topic, live[1]["pos"]) == (live[1]["topic"], live[2]["prev"])
        await chat.say("elsewhere", chat.other)
        assert ["elsewhere"] == shape([await client.next()])
    inside = f"{start.rpartition(':')[0]}:{int(live[1]['pos'].rpartition(':')[2]) - 5}"
    for since, expected in (
        (start, live),
        (live[0]["pos"], live[1:]),
        (inside, live[1:]),
        (live[1]["pos"], live[2:]),
    ):
        async with narrow.client(chat.ada, since) as client:
            assert since == (await client.subscribe(chat.topic))["pos"]
            assert shape(expected) == shape((await client.until("resumed"))[:-1])


async def test_a_right_that_ends_in_a_too_large_transaction_is_revoked(narrow: Daemon, chat: Chat) -> None:
    await chat.sql.execute("insert into chatgenius.channel_members values ($1, $2)", chat.channel, chat.bob)
    await chat.settled(narrow)
    async with narrow.client(chat.ada) as ada, narrow.client(chat.bob) as bob:
        await ada.subscribe(chat.topic)
        await bob.subscribe(chat.topic)
        await say_much(chat, f"delete from chatgenius.channel_members where user_id = '{chat.bob}'")
        await chat.say("not to Bob")
        frames = [await bob.next(), await ada.next(), await ada.next()]
        assert ["revoked", "reset", "changes"] == [frame["op"] for frame in frames]
        await bob.say(op="ping")
        assert "pong" == (await bob.next())["op"]


async def test_a_table_truncated_in_a_too_large_transaction_resets_every_topic(narrow: Daemon, chat: Chat) -> None:
    async with narrow.client(chat.ada) as client:
        start = client.welcome["pos"]
        await client.subscribe("users")
        await say_much(chat, "truncate chatgenius.user_settings")
        assert ["reset limit"] == shape([await client.next()])
    async with narrow.client(chat.ada, start) as client:
        await client.subscribe("users")
        assert ["reset limit"] == shape((await client.until("resumed"))[:-1])


async def test_a_too_large_transaction_is_logged(narrow: Daemon, chat: Chat) -> None:
    async with narrow.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        async with chat.sql.transaction():
            tx = await chat.sql.fetchval("select pg_current_xact_id()::text")
            for number in range(20):
                await chat.say(str(number))
        await client.until("reset")
        await client.say(op="ping")  # the answer comes after the transaction was handled
        await client.until("pong")
    [warning] = [line for line in narrow.events() if line["event"] == "transaction_too_large"]
    assert {"transaction": tx} == warning["data"]


async def test_connected_clients_are_served_while_many_subscribes_wait_for_permission_checks(
    daemon: Daemon, chat: Chat, database: str
) -> None:
    """No permission check returns until the lock is released; the live stream continues meanwhile."""
    gate = 4711
    async with AsyncExitStack() as stack:
        connected, *crowd = [await stack.enter_async_context(daemon.client(chat.ada)) for _ in range(50)]
        assert "subscribed" == (await connected.subscribe(chat.topic))["op"]
        holder = await connect(database, application_name="gate")
        stack.push_async_callback(holder.close)
        await holder.execute("select pg_advisory_lock($1)", gate)
        await chat.sql.execute(f"""
            create or replace function chatgenius.may_read(user_id text, topic text) returns boolean
            language sql security definer as $$ select pg_advisory_xact_lock_shared({gate}) is not null $$
        """)
        for client in crowd:
            await client.say(op="subscribe", topic=chat.topic)
        for number in range(20):
            await chat.say(str(number))
            assert [str(number)] == [change["record"]["content"] for change in await connected.changes()]
        await holder.execute("select pg_advisory_unlock($1)", gate)
        for client in crowd:
            while (answer := await client.next())["op"] != "subscribed":
                assert "unavailable" == answer["code"], answer  # permission checks time out
                await client.say(op="subscribe", topic=chat.topic)
        await chat.say("all are in")
        for client in [*crowd, connected]:
            assert "all are in" == (await client.next())["changes"][-1]["record"]["content"]
