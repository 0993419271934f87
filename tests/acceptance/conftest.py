from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from daemon.postgres.connect import Connection
from tests.support.daemon import Daemon, daemon_process


@dataclass
class Chat:
    """A small ChatGenius: two users; only Ada is a member of the channels."""

    sql: Connection
    ada: str
    bob: str
    channel: str
    other: str

    @property
    def topic(self) -> str:
        return f"channel:{self.channel}"

    async def say(self, content: str, channel: str | None = None) -> str:
        """Ada writes a message; its id."""
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


@pytest.fixture
async def chat(sql: Connection) -> Chat:
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

    async with sql.transaction():  # members of the first transaction may read all of it
        chat = Chat(sql, await user("ada"), await user("bob"), await channel("general"), await channel("random"))
        for joined in (chat.channel, chat.other):
            await sql.execute(
                "insert into chatgenius.channel_members (channel_id, user_id) values ($1, $2)", joined, chat.ada
            )
    return chat


@pytest.fixture
async def daemon(database: str, chat: Chat) -> AsyncIterator[Daemon]:
    async with daemon_process(database) as process:
        yield process
