"""Snapshots: the rows of a topic, joined to the stream of a real daemon."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from daemon.postgres.connect import Connection, connect
from tests.acceptance.chat import Chat
from tests.support.daemon import Client, Daemon, Frame, daemon_process, get
from tests.support.postgres import Server

LIMIT = 500  # rows in a snapshot
SEED = 7
WRITERS, TRANSACTIONS, READERS = 3, 60, 12

# Each content is a number that grows. A message that is inserted with one that ends in "0" makes another message, and
# changes itself.
NESTED = """
create sequence public.version;
create function public.nest() returns trigger language plpgsql as $$
begin
    insert into chatgenius.messages (channel_id, user_id, content)
    values (new.channel_id, new.user_id, nextval('public.version') * 10 + 1);
    update chatgenius.messages set content = nextval('public.version') * 10 where id = new.id;
    return null;
end
$$;
create trigger nest after insert on chatgenius.messages
for each row when (new.content like '%0') execute function public.nest();
"""
VERSION = "nextval('public.version') * 10"


@pytest.fixture(scope="module")
async def database(postgres: Server) -> AsyncIterator[str]:
    async with postgres.chatgenius() as dsn:
        connection = await connect(dsn, application_name="test")
        await connection.execute(NESTED)
        await connection.close()
        yield dsn


@pytest.fixture(scope="module")
async def daemon(database: str) -> AsyncIterator[Daemon]:
    async with daemon_process(database, environment={"ROWCAST_SNAPSHOT_ROWS": str(LIMIT)}) as process:
        yield process


@pytest.fixture
async def chat(daemon: Daemon, sql: Connection) -> Chat:
    return await Chat.begin_again(sql, daemon)


async def snapshot_of(client: Client, topic: str, snapshot: object = True) -> dict[str, list[Any]]:
    """Subscribe with a snapshot; the rows of each table."""
    answer = await client.subscribe(topic, snapshot=snapshot)
    assert ("subscribed", True) == (answer["op"], answer["snapshot"])
    rows: dict[str, list[Any]] = {}
    more = True
    while more:
        frame = await client.next()
        assert ("snapshot", topic) == (frame["op"], frame["topic"])
        rows.setdefault(frame["table"], []).extend(frame["rows"])
        more = frame["more"]
    return rows


async def test_a_snapshot_holds_the_live_rows_of_the_topic_and_then_changes_follow(
    daemon: Daemon, chat: Chat
) -> None:
    first, deleted = await chat.say("first"), await chat.say("deleted")
    await chat.say("elsewhere", chat.other)
    await chat.sql.execute("update chatgenius.messages set deleted_at = now() where id = $1", deleted)
    async with daemon.client(chat.ada) as client:
        rows = await snapshot_of(client, chat.topic)
        assert [({"id": first}, "first")] == [(row["key"], row["record"]["content"]) for row in rows["messages"]]
        assert [chat.channel] == [row["record"]["id"] for row in rows["channels"]]
        assert [chat.ada] == [row["record"]["user_id"] for row in rows["channel_members"]]
        assert [] == rows["users"]
        assert "resumed" == (await client.next())["op"]
        await chat.say("second")
        [change] = await client.changes()
        assert "second" == change["record"]["content"]


async def write(sql: Connection, chat: Chat, chance: random.Random) -> None:
    """One transaction of one to four statements, with pauses in which others commit. Some are rolled back."""
    chosen = "where channel_id = any($1) order by random() limit 1 for update skip locked"
    some = f"(select id from chatgenius.messages {chosen})"
    channels = [chat.channel, chat.other]
    transaction = sql.transaction()
    await transaction.start()
    for _ in range(chance.randint(1, 4)):
        statement = chance.choice(
            (
                f"insert into chatgenius.messages (channel_id, user_id, content) values ($2, $3, {VERSION})",
                f"insert into chatgenius.messages (channel_id, user_id, content) values ($2, $3, {VERSION} + 1)",
                f"update chatgenius.messages set content = {VERSION} where id = {some}",
                f"update chatgenius.messages set channel_id = $2 where id = {some}",
                "update chatgenius.messages set deleted_at = case when deleted_at is null then now() end"
                f" where id = {some}",
                f"delete from chatgenius.messages where id = {some}",
            )
        )
        unused = "$1::text[] is not null and $2::text is not null and $3::text is not null"
        await sql.execute(
            f"with parameters as (select {unused}) {statement}", channels, chance.choice(channels), chat.ada
        )
        for _ in range(chance.randrange(20)):
            await asyncio.sleep(0)
    await (transaction.rollback() if chance.random() < 0.1 else transaction.commit())


def apply(rows: dict[str, str], frame: Frame) -> None:
    """Apply changes. No row may go back in time."""
    for change in frame["changes"]:
        key = change["key"]["id"]
        if change["kind"] == "delete":
            rows.pop(key, None)
        else:
            content = change["record"]["content"]
            assert int(rows.get(key, 0)) <= int(content), change
            rows[key] = content


States = dict[int, dict[str, str]]
"""The messages of a topic, by the position up to which a client has got its changes."""


def seq_of(frame: Frame) -> int:
    return int(frame["pos"].rpartition(":")[2])


async def followed(client: Client, last: str) -> States:
    """The states of a client that follows the topic from its beginning, up to the message `last`."""
    rows: dict[str, str] = {}
    states: States = {0: {}}
    while last not in rows.values():
        frame = await client.next()
        apply(rows, frame)
        states[seq_of(frame)] = dict(rows)
    return states


async def joined(client: Client, found: dict[str, list[Any]], last: str) -> States:
    """The states of a client that begins with these rows, from its `resumed` on."""
    states: States = {}
    rows = {row["key"]["id"]: row["record"]["content"] for row in found["messages"]}
    while not states or last not in rows.values():
        frame = await client.next()
        if frame["op"] == "changes":
            apply(rows, frame)
        if states or frame["op"] == "resumed":
            states[seq_of(frame)] = dict(rows)
    return states


async def test_snapshots_and_changes_are_the_table_at_every_position_while_others_write(
    database: str, daemon: Daemon, chat: Chat
) -> None:
    chance, last = random.Random(SEED), str(10**9 + 1)
    starts = [asyncio.Event() for _ in range(READERS)]
    committed = iter(range(1, WRITERS * TRANSACTIONS + 1))

    async def writer(own: random.Random) -> None:
        sql = await connect(database, application_name="writer")
        for _ in range(TRANSACTIONS):
            await write(sql, chat, own)
            done = next(committed)
            starts[done * READERS // (WRITERS * TRANSACTIONS + 1)].set()
        await sql.close()

    async def hindrance() -> None:
        """Now and then nothing is numbered until the transactions of two groups are committed."""
        sql = await connect(database, application_name="hindrance")
        for begin, end in zip(starts[::3], starts[2::3], strict=True):
            await begin.wait()
            async with sql.transaction():
                await sql.execute("select from rowcast.lease for update")
                await end.wait()
        await sql.close()

    async def reader(number: int) -> States:
        async with daemon.client(chat.ada) as client:
            await starts[number].wait()
            rows = await snapshot_of(client, chat.topic, {"limit": LIMIT - number})  # no two share a read
            return await joined(client, rows, last)

    async with daemon.client(chat.ada) as client, asyncio.TaskGroup() as group:
        await client.subscribe(chat.topic)
        truth = group.create_task(followed(client, last))
        readers = [group.create_task(reader(number)) for number in range(READERS)]
        writers = [group.create_task(writer(random.Random(chance.random()))) for _ in range(WRITERS)]
        group.create_task(hindrance())
        await asyncio.gather(*writers)
        await chat.say(last)
    states = await truth
    compared = 0
    for read in readers:
        for position, state in (await read).items():
            assert states[max(seq for seq in states if seq <= position)] == state, position
            compared += 1
    assert compared > READERS
    stored = await chat.sql.fetch(
        "select id, content from chatgenius.messages where channel_id = $1 and deleted_at is null", chat.channel
    )
    assert states[max(states)] == {row["id"]: row["content"] for row in stored}


@pytest.mark.parametrize(
    "members",
    [
        {"snapshot": 1},
        {"snapshot": "yes"},
        {"snapshot": []},
        {"snapshot": {"limit": 0}},
        {"snapshot": {"limit": -1}},
        {"snapshot": {"limit": "5"}},
        {"snapshot": {"limit": 2**31}},
        {"snapshot": {"limit": 5, "order": "id"}},
        {"snapshot": True, "since": "epoch:0"},
    ],
)
async def test_a_snapshot_that_is_asked_for_wrongly_is_refused_and_the_topic_is_not_followed(
    daemon: Daemon, chat: Chat, members: dict[str, object]
) -> None:
    async with daemon.client(chat.ada) as client:
        refused = await client.subscribe(chat.topic, id=1, **members)
        assert ("error", "bad_frame", 1) == (refused["op"], refused["code"], refused["id"])
        assert "subscribed" == (await client.subscribe(chat.topic))["op"]


async def test_a_topic_that_is_too_large_is_refused_and_its_newest_rows_are_not(daemon: Daemon, chat: Chat) -> None:
    await chat.sql.execute(
        "insert into chatgenius.messages (channel_id, user_id, content)"
        " select $1, $2, n::text from generate_series(1, $3) as n",
        chat.channel,
        chat.ada,
        LIMIT + 1,
    )
    newest = await chat.say("newest")
    async with daemon.client(chat.ada) as client:
        refused = await client.subscribe(chat.topic, snapshot=True)
        assert ("error", "too_large", False) == (refused["op"], refused["code"], refused["retry"])
        rows = await snapshot_of(client, chat.topic, {"limit": 3})
        assert (3, {"id": newest}) == (len(rows["messages"]), rows["messages"][-1]["key"])


async def test_a_snapshot_needs_the_right_to_the_topic_and_ends_with_it(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.bob) as client:
        refused = await client.subscribe(chat.topic, snapshot=True)
        assert ("error", "no_such_topic") == (refused["op"], refused["code"])
        await chat.sql.execute(
            "insert into chatgenius.channel_members (channel_id, user_id) values ($1, $2)", chat.channel, chat.bob
        )
        rows = await snapshot_of(client, chat.topic)
        assert {chat.ada, chat.bob} == {row["key"]["user_id"] for row in rows["channel_members"]}
        await client.until("resumed")
        await chat.sql.execute("delete from chatgenius.channel_members where user_id = $1", chat.bob)
        assert "revoked" == (await client.until("revoked"))[-1]["op"]


async def test_a_crowd_that_asks_at_once_costs_few_reads(daemon: Daemon, chat: Chat) -> None:
    async def reads() -> float:
        _, text = await get(f"{daemon.http}/metrics")
        [line] = [line for line in text.splitlines() if line.startswith("rowcast_snapshot_seconds_count ")]
        return float(line.split()[1])

    await chat.say("hello")
    before = await reads()

    async def ask(client: Client) -> int:
        return len((await snapshot_of(client, chat.topic))["messages"])

    async with AsyncExitStack() as stack:
        connecting = [stack.enter_async_context(daemon.client(chat.ada)) for _ in range(200)]
        clients = await asyncio.gather(*connecting)  # all before the first asks
        assert [1] * 200 == await asyncio.gather(*map(ask, clients))
    assert await reads() - before <= 20  # one user has only so much of the processor, so some ask a little later


async def test_a_snapshot_has_numbers_in_the_form_that_the_client_has_chosen(daemon: Daemon, chat: Chat) -> None:
    largest = 2**63 - 1
    message = await chat.say("with a file")
    await chat.sql.execute(
        "insert into chatgenius.files (message_id, name, type, size, url)"
        " values ($1, 'a', 'text/plain', $2, 'https://example.com/a')",
        message,
        largest,
    )
    async with daemon.client(chat.ada) as plain, daemon.client(chat.ada, numbers="string") as exact:
        rows, exact_rows = await snapshot_of(plain, chat.topic), await snapshot_of(exact, chat.topic)
    assert [largest, str(largest)] == [found["files"][0]["record"]["size"] for found in (rows, exact_rows)]
