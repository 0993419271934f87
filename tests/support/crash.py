"""A Postgres that can be killed, and a client that reads what was said."""

import asyncio
import itertools
import os
import signal
from contextlib import suppress
from pathlib import Path

import asyncpg

from daemon.embedded.server import EmbeddedPostgres
from tests.support.daemon import Client
from tests.support.postgres import chosen_binaries
from tests.support.processes import until_it_ends

ADA = "01JGQ4ZV8M0000000000000ADA"
QUICK = {"ROWCAST_BEAT_EVERY": "0.2", "ROWCAST_BEAT_LIMIT": "1", "ROWCAST_POLL_EVERY": "0.2"}


class Server:
    """A server for one test, with fsync on, that can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.embedded = EmbeddedPostgres(directory, binaries=chosen_binaries())
        self._stopped: list[int] = []

    async def crash(self) -> None:
        with until_it_ends(self.embedded.pid):
            os.kill(self.embedded.pid, signal.SIGKILL)
        while self._stopped:
            os.kill(self._stopped.pop(), signal.SIGKILL)
        await self.embedded.stop()

    async def stop_wal_writer(self) -> None:
        """Stop flushing asynchronous commits, so that a crash is certain to lose them."""
        connection = await asyncpg.connect(self.embedded.dsn)
        pid = await connection.fetchval("select pid from pg_stat_activity where backend_type = 'walwriter'")
        self._stopped.append(pid)
        for patience in itertools.count(1):
            os.kill(pid, signal.SIGSTOP)
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await connection.execute("select pg_current_xact_id()")
                    break
            os.kill(pid, signal.SIGCONT)  # it was stopped while it held the lock that every commit needs
        await connection.close()

    async def execute(self, statement: str) -> None:
        connection = await asyncpg.connect(self.embedded.dsn)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    async def say(self, content: str) -> None:
        await self.execute(
            f"""insert into chatgenius.user_settings (user_id, preferences)
                values ('{ADA}', jsonb_build_object('said', '{content}'))
                on conflict (user_id) do update set preferences = excluded.preferences"""
        )


async def read_until(client: Client, until: str) -> tuple[list[str], list[int], list[str]]:
    """The contents, the numbers, and the reasons of resets, up to the change with this content."""
    said: list[str] = []
    seqs: list[int] = []
    resets: list[str] = []
    while until not in said:
        frame = await client.next()
        if frame["op"] == "reset":
            resets.append(frame["reason"])
        for change in frame.get("changes", ()):
            said.append(change["record"]["preferences"]["said"])
            seqs.append(change["seq"])
    return said, seqs, resets


async def follow(client: Client) -> None:
    assert "subscribed" == (await client.subscribe(f"user:{ADA}"))["op"]
