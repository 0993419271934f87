"""All packs at once: one database with their sample data, one daemon, and a live client for each pack."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from daemon.commands.seed import statements
from daemon.packs import bundled
from daemon.postgres.connect import Connection, connect
from daemon.settings import load
from tests.support.daemon import command, daemon_process

# By pack: a topic that its first sample user follows, and a statement that publishes to it. $1 is that user's id.
WRITES = {
    "antone": (
        "platform:TWITTER",
        "update antone.posts set processed_at = now() where platform = 'TWITTER' and $1::text is not null",
    ),
    "asyncops": (
        "team:blockers",
        "insert into asyncops.blockers (reported_by_id, description, impact)"
        " values ($1::text::integer, 'all', 'none')",
    ),
    "chatgenius": (
        "channel:01JH000000CHAN00000GENERA1",
        "insert into chatgenius.messages (channel_id, user_id, content)"
        " values ('01JH000000CHAN00000GENERA1', $1::text, 'to all')",
    ),
    "disclosure": (
        "owner:{user}",
        "update disclosure.secrets set last_check_in = now() where user_id = $1::text and status = 'active'",
    ),
    "email_unsubscribe": (
        "allow_list",
        "insert into email_unsubscribe.allow_list (entry_type, value)"
        " select 'domain', 'all.example' where $1::text is not null",
    ),
}


@pytest.fixture
async def filled(empty_database: str) -> str:
    """The DSN of a database with every pack and its sample data."""
    for verb in (["--apply-ddl"], ["seed"]):
        code, _, errors = await command("--pack", "all", *verb, DATABASE_URL=empty_database)
        assert 0 == code, errors
    return empty_database


@pytest.fixture
async def sql(filled: str) -> AsyncIterator[Connection]:
    """A connection to it, as its owner."""
    connection = await connect(filled, application_name="test")
    yield connection
    await connection.close()


async def first_user(sql: Connection, pack: str) -> str:
    """The id of the first user that the live page offers."""
    [text] = statements(load(packs=(pack,)), "demo_users.sql")
    rows = await sql.fetch(text)
    return str(rows[0]["id"])


async def test_every_pack_publishes_to_its_own_client_only(filled: str, sql: Connection) -> None:
    assert set(bundled()) == set(WRITES)
    users = {pack: await first_user(sql, pack) for pack in WRITES}
    topics = {pack: topic.format(user=users[pack]) for pack, (topic, _) in WRITES.items()}
    tables = {}
    async with AsyncExitStack() as stack:
        daemon = await stack.enter_async_context(daemon_process(filled, "--pack", "all"))
        clients = {pack: await stack.enter_async_context(daemon.client(user)) for pack, user in users.items()}
        for pack, client in clients.items():
            for other, topic in topics.items():
                answer = await client.subscribe(topic)
                known = users[other] == users[pack]  # two packs may use the same user id
                assert ("subscribed" if known else "no_such_topic") == answer.get("code", answer["op"])
                if known and other != pack:
                    await client.say(op="unsubscribe", topic=topic)
                    await client.until("unsubscribed")
        for pack, client in clients.items():
            await sql.execute(WRITES[pack][1], users[pack])
            frame = await client.next()
            assert ("changes", topics[pack]) == (frame["op"], frame["topic"])
            tables[pack] = {change["table"] for change in frame["changes"]}
    assert {
        "antone": {"posts"},
        "asyncops": {"blockers"},
        "chatgenius": {"messages"},
        "disclosure": {"secrets"},
        "email_unsubscribe": {"allow_list"},
    } == tables


# What the log says is in each topic of a schema: the last version of each row.
LATEST = """
select c.topic, c.table_name, c.key, c.record
from (
    select distinct on (topic, table_name, key) * from rowcast.changes order by topic, table_name, key, seq desc
) as c
where c.schema_name = $1 and c.kind in ('insert', 'update', 'restore')
"""


async def test_a_snapshot_of_every_topic_is_what_the_log_says(filled: str, sql: Connection) -> None:
    shown = set()
    async with daemon_process(filled, "--pack", "all") as daemon:
        for pack in bundled():
            [text] = statements(load(packs=(pack,)), "demo_users.sql")
            users = [str(row["id"]) for row in await sql.fetch(text)]
            rows = await sql.fetch(LATEST, pack)
            for user in users:
                async with daemon.client(user) as client:
                    for topic in sorted({row["topic"] for row in rows}):
                        frames = [await client.subscribe(topic, snapshot=True)]
                        if "error" == frames[0]["op"]:
                            continue
                        frames = await client.until("resumed")
                        assert {"snapshot", "resumed"} == {frame["op"] for frame in frames}
                        found = [(frame["table"], row) for frame in frames[:-1] for row in frame["rows"]]
                        known = [
                            (row["table_name"], {part: json.loads(row[part]) for part in ("key", "record")})
                            for row in rows
                            if row["topic"] == topic
                        ]
                        assert sorted(known, key=str) == sorted(found, key=str)
                        shown |= {(pack, table) for table, _ in found}
                        await client.say(op="unsubscribe", topic=topic)
                        await client.until("unsubscribed")
    watched = await sql.fetch("select schema_name, table_name from rowcast.watched")
    assert {tuple(row.values()) for row in watched} == shown


async def test_each_pack_can_be_rolled_back_while_the_others_stay(filled: str, sql: Connection) -> None:
    remaining = list(bundled())
    while remaining:
        pack = remaining.pop()
        code, _, errors = await command("rollback", pack, DATABASE_URL=filled)
        assert 0 == code, errors
        assert await sql.fetchval("select to_regnamespace($1)", pack) is None
        if remaining:
            chosen = [word for name in remaining for word in ("--pack", name)]
            code, output, errors = await command(*chosen, "check", DATABASE_URL=filled)
            assert (0, "") == (code, errors), output
