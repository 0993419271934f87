"""A small ChatGenius in which tests write rows."""

from dataclasses import dataclass

from daemon.postgres.connect import Connection
from tests.support.daemon import Daemon

# Triggers do not fire for a replica, so these deletes are not captured.
EMPTY = """
set session_replication_role = replica;
do $$
declare name text;
begin
    for name in
        select c.oid::regclass from pg_class as c
        where c.relnamespace = 'chatgenius'::regnamespace and c.relkind = 'r' and c.relname <> 'alembic_version'
    loop
        execute 'delete from ' || name;
    end loop;
    delete from rowcast.dead_letters;
end $$;
reset session_replication_role;
"""


@dataclass
class Chat:
    """Two users and two channels. Ada is a member of both channels, Bob of none."""

    sql: Connection
    ada: str
    bob: str
    channel: str
    other: str

    @property
    def topic(self) -> str:
        return f"channel:{self.channel}"

    @classmethod
    async def begin(cls, sql: Connection) -> "Chat":
        """Insert the users, channels and memberships into an empty ChatGenius."""

        async def user(name: str) -> str:
            found: str = await sql.fetchval(
                "insert into chatgenius.users (auth0_id, email, username) values ($1, $2, $1) returning id",
                name,
                f"{name}@example.com",
            )
            return found

        async def channel(name: str) -> str:
            found: str = await sql.fetchval("insert into chatgenius.channels (name) values ($1) returning id", name)
            return found

        async with sql.transaction():  # members may read everything from their transaction on
            chat = cls(sql, await user("ada"), await user("bob"), await channel("general"), await channel("random"))
            for joined in (chat.channel, chat.other):
                await sql.execute(
                    "insert into chatgenius.channel_members (channel_id, user_id) values ($1, $2)", joined, chat.ada
                )
        return chat

    @classmethod
    async def begin_again(cls, sql: Connection, daemon: Daemon) -> "Chat":
        """Empty a used ChatGenius, fill it again, and wait until this daemon has delivered the new rows."""
        await sql.execute(EMPTY)
        chat = await cls.begin(sql)
        await chat.settled(daemon)
        return chat

    async def take_over(self, channel: str) -> None:
        """Use a channel with this id, which another database has, too."""
        async with self.sql.transaction():
            await self.sql.execute("insert into chatgenius.channels (id, name) values ($1, 'general too')", channel)
            await self.sql.execute(
                "insert into chatgenius.channel_members (channel_id, user_id) values ($1, $2)", channel, self.ada
            )
        self.channel = channel

    async def say(self, content: str, channel: str | None = None) -> str:
        """Insert a message from Ada; return its id."""
        found: str = await self.sql.fetchval(
            "insert into chatgenius.messages (channel_id, user_id, content) values ($1, $2, $3) returning id",
            channel or self.channel,
            self.ada,
            content,
        )
        return found

    async def settled(self, daemon: Daemon) -> None:
        """Wait until the daemon has delivered everything written so far."""
        async with daemon.client(self.ada) as client:
            await client.subscribe(f"user:{self.ada}")
            marker = await self.sql.fetchval(
                "insert into chatgenius.sync_state (user_id, sync_type) values ($1, 'full') returning id", self.ada
            )
            keys: list[str | None] = []
            while marker not in keys:
                keys += [change["key"].get("id") for change in (await client.next())["changes"]]
