"""The databases of the benchmarks: a chat with users, channels, members and messages."""

import asyncio
from collections.abc import Sequence

import asyncpg

from bench.rig import HERE, Server
from daemon.schema import migrate

CHANNELS = 32  # over which messages are spread
USERS = 10_000

INSERT = """
insert into chatgenius.messages (channel_id, user_id, content)
select $1, $2, '@' || (extract(epoch from clock_timestamp()) * 1000000)::bigint
    || ' a message, as long as people write them in a chat'
from generate_series(1, $3)
"""
"""$1 channel   $2 author   $3 number of rows. The timestamp is that of the insert, before the commit."""

USERS_SQL = """
insert into chatgenius.users (id, auth0_id, email, username)
select '01JH000000VSER' || lpad(n::text, 12, '0'), 'bench|' || n, n || '@example.com', 'user ' || n
from generate_series(0, $1::integer - 1) as n
"""
CHANNELS_SQL = """
insert into chatgenius.channels (id, name)
select '01JH000000CHAN' || lpad(n::text, 12, '0'), 'channel ' || n from generate_series(0, $1::integer - 1) as n
"""
MEMBERS_SQL = """
insert into chatgenius.channel_members (channel_id, user_id)
select '01JH000000CHAN' || lpad(c::text, 12, '0'), '01JH000000VSER' || lpad(u::text, 12, '0')
from unnest($1::integer[], $2::integer[]) as n (c, u)
"""


def user(number: int) -> str:
    """The id of a user."""
    return f"01JH000000VSER{number:012}"


def channel(number: int) -> str:
    """The id of a channel."""
    return f"01JH000000CHAN{number:012}"


def ignore(line: str) -> None:
    """Discard the progress of a migration."""


async def apply(dsn: str) -> None:
    """Apply Rowcast's schema and the pack ChatGenius."""
    await migrate.apply(dsn, ("chatgenius",), report=ignore)


async def fill(dsn: str, users: int, channels: int, members: Sequence[tuple[int, int]]) -> None:
    """Insert users, channels and memberships (channel, user) without capturing them."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("set session_replication_role = replica")  # no trigger runs
        await connection.execute(USERS_SQL, users)
        await connection.execute(CHANNELS_SQL, channels)
        await connection.execute(MEMBERS_SQL, [c for c, _ in members], [u for _, u in members])
        await connection.execute("vacuum analyze")
    finally:
        await connection.close()


async def chat(server: Server) -> str:
    """The template of a captured database: all users are in the first channel, and the first user is in all."""

    async def build(dsn: str) -> None:
        await apply(dsn)
        everyone = [(0, number) for number in range(USERS)]
        await fill(dsn, USERS, CHANNELS, everyone + [(number, 0) for number in range(1, CHANNELS)])

    return await server.template("chat", build)


async def plain(server: Server) -> str:
    """The template of the same without any trigger on messages."""

    async def build(dsn: str) -> None:
        await run(dsn, "select rowcast.unwatch('chatgenius.messages')")

    return await server.template("plain", build, await chat(server))


async def notifying(server: Server) -> str:
    """The template of the same with a trigger on messages that notifies with the row."""

    async def build(dsn: str) -> None:
        await run(dsn, await asyncio.to_thread((HERE / "relay.sql").read_text))

    return await server.template("notifying", build, await plain(server))


async def wide(server: Server, users: int, channels: int) -> str:
    """The template of a captured database: each channel has one member, each user the same number of channels."""

    async def build(dsn: str) -> None:
        await apply(dsn)
        await fill(dsn, users, channels, [(number, number * users // channels) for number in range(channels)])

    return await server.template(f"wide {channels}", build)


async def run(dsn: str, sql: str) -> None:
    """Run SQL on its own connection."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(sql)
    finally:
        await connection.close()
