"""The writers, and the truth about what committed, kept in tables that Rowcast does not know."""

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import asyncpg

from daemon.postgres.connect import Connection
from daemon.postgres.errors import DRIVER_ERRORS as BROKEN

# Each statement records the truth in its own transaction. It computes a row's version while it holds the row's lock,
# so versions follow the order in which the row changed.
SETUP = """
create schema oracle;
create table oracle.writes (
    token text primary key, topic text not null, row_id text not null, version bigint not null, tag text not null
);
"""
UPDATE = """
with written as (
    update chatgenius.messages
    set content = (content::bigint + 1)::text, metadata = jsonb_build_object('token', $2::text)
    where id = $1 returning id, channel_id, content
)
insert into oracle.writes select $2, 'channel:' || channel_id, id, content::bigint, $3 from written
"""
INSERT = """
with written as (
    insert into chatgenius.messages (channel_id, user_id, content, metadata)
    values ($1, $4, '1', jsonb_build_object('token', $2::text)) returning id, channel_id
)
insert into oracle.writes select $2, 'channel:' || channel_id, id, 1, $3 from written
"""


@dataclass(frozen=True, slots=True)
class Write:
    """One committed change of a message: its row's version grows by one with each."""

    token: str
    topic: str
    row: str
    version: int
    tag: str


@dataclass
class Style:
    """How writers behave. Times are in seconds, shares between 0 and 1."""

    pause: float = 0.01  # the longest pause between two transactions
    linger: float = 0.0  # the longest time that a transaction stays open
    rollback: float = 0.0
    savepoint: float = 0.0
    prepare: float = 0.0  # in two phases
    early_xid: float = 0.0  # takes its transaction id before its row locks
    insert: float = 0.2
    settings: dict[str, str] = field(default_factory=dict)


class Oracle:
    """Users, channels and messages of one database, and the writers that change them.

    `dsn` is called for each connection. `acknowledged` are the tokens whose commit the server confirmed, `errors`
    the number of failed transactions by SQLSTATE or exception, `waits` the seconds that each transaction took.
    """

    USERS: ClassVar = "abcdefghijklmnopqrstuvwxyz"

    def __init__(self, dsn: Callable[[], str], seed: int) -> None:
        self._dsn = dsn
        self.seed = seed
        self.users: list[str] = []
        self.channels: list[str] = []
        self.rows: list[str] = []
        self.tag = ""
        self.acknowledged: set[str] = set()
        self.errors: Counter[str] = Counter()
        self.waits: list[float] = []
        self._tokens = itertools.count()
        self._marks: dict[str, str] = {}

    def move(self, dsn: Callable[[], str]) -> None:
        """Use another server from now on."""
        self._dsn = dsn

    async def connect(self, **settings: str) -> Connection:
        """A new connection, which the caller closes."""
        connection: Connection = await asyncpg.connect(self._dsn(), server_settings=settings, timeout=10)
        return connection

    async def execute(self, statement: str, *arguments: object) -> None:
        """Run one statement on its own connection."""
        connection = await self.connect()
        try:
            await connection.execute(statement, *arguments)
        finally:
            await connection.close()

    async def set_up(self, users: int = 4, channels: int = 3, rows: int = 8) -> None:
        """Create users and channels, with every user in every channel; `rows` rows a channel, and one for marks."""
        connection = await self.connect()
        await connection.execute(SETUP)
        names = [f"{letter}{number}" for number in range(users // 26 + 1) for letter in self.USERS][:users]
        self.users = [
            await connection.fetchval(
                "insert into chatgenius.users (auth0_id, email, username) "
                "values ($1::text, $1::text || '@example.com', $1::text) returning id",
                name,
            )
            for name in names
        ]
        for number in range(channels):
            channel = await connection.fetchval(
                "insert into chatgenius.channels (name) values ($1) returning id", f"channel {number}"
            )
            self.channels.append(channel)
            await connection.execute(
                "insert into chatgenius.channel_members (channel_id, user_id) select $1, unnest($2::text[])",
                channel,
                self.users,
            )
            made = [
                await connection.fetchval(
                    "insert into chatgenius.messages (channel_id, user_id, content) values ($1, $2, '0') "
                    "returning id",
                    channel,
                    self.users[0],
                )
                for _ in range(rows + 1)
            ]
            self._marks[channel], self.rows = made[0], self.rows + made[1:]
        await connection.close()

    @property
    def topics(self) -> list[str]:
        """The topic of each channel."""
        return [f"channel:{channel}" for channel in self.channels]

    def token(self) -> str:
        """A new name for a write."""
        return f"{self.seed}.{next(self._tokens)}"

    async def mark(self, channel: str, tag: str = "mark") -> str:
        """Write to a channel's row for marks, and retry until that has committed; the token."""
        token = ""
        while token not in self.acknowledged:
            token = self.token()
            try:
                await self.execute(UPDATE, self._marks[channel], token, tag)
                self.acknowledged.add(token)
            except BROKEN:
                await asyncio.sleep(0.02)
        return token

    async def write_until(self, stop: asyncio.Event, number: int, style: Style) -> None:
        """Run one writer: transactions of a few statements, on a connection that is replaced when it breaks."""
        chance = random.Random(f"{self.seed}.{number}")
        while not stop.is_set():
            try:
                connection = await self.connect(**style.settings)
                try:
                    while not stop.is_set():
                        await self._write(connection, chance, style)
                        await asyncio.sleep(chance.uniform(0, style.pause))
                finally:
                    connection.terminate()
            except BROKEN as error:
                self.errors[getattr(error, "sqlstate", None) or type(error).__name__] += 1
                await asyncio.sleep(chance.uniform(0, 0.05))

    async def _write(self, connection: Connection, chance: random.Random, style: Style) -> None:
        tokens: list[str] = []
        began = time.monotonic()
        name = ""
        try:
            await connection.execute("begin")
            if chance.random() < style.prepare:
                name = self.token()
                await connection.execute("set local rowcast.ring = off")
            if chance.random() < style.early_xid:
                await connection.execute("select pg_current_xact_id()")
                await self._linger(connection, chance, style)
            for row in sorted(chance.sample(self.rows, chance.randint(1, 3))):
                if chance.random() < style.savepoint:
                    await connection.execute("savepoint s")
                    await connection.execute(UPDATE, row, self.token(), self.tag)
                    await connection.execute("rollback to savepoint s")
                await connection.execute(UPDATE, row, self._added(tokens), self.tag)
            if chance.random() < style.insert:
                channel = chance.choice(self.channels)
                await connection.execute(INSERT, channel, self._added(tokens), self.tag, self.users[0])
            await self._linger(connection, chance, style)
            if chance.random() < style.rollback:
                await connection.execute("rollback")
                return
            if name:
                await connection.execute(f"prepare transaction '{name}'")
                await connection.execute(f"commit prepared '{name}'")
            else:
                await connection.execute("commit")
        except asyncpg.PostgresError as error:
            self.errors[error.sqlstate or "?"] += 1
            if connection.is_in_transaction():
                await connection.execute("rollback")
            return
        self.waits.append(time.monotonic() - began)
        self.acknowledged.update(tokens)

    def _added(self, tokens: list[str]) -> str:
        tokens.append(self.token())
        return tokens[-1]

    async def _linger(self, connection: Connection, chance: random.Random, style: Style) -> None:
        if style.linger:
            await connection.execute("select pg_sleep($1)", chance.uniform(0, style.linger))

    async def truth(self, topics: Sequence[str] | None = None) -> dict[str, Write]:
        """All committed writes by token; retries until the database answers."""
        found: dict[str, Write] | None = None
        while found is None:
            try:
                connection = await self.connect()
                try:
                    rows = await connection.fetch(
                        "select token, topic, row_id, version, tag from oracle.writes "
                        "where $1::text[] is null or topic = any ($1)",
                        topics,
                    )
                finally:
                    connection.terminate()
                found = {row["token"]: Write(*row) for row in rows}
            except BROKEN:
                await asyncio.sleep(0.02)
        return found
