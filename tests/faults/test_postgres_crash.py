"""Postgres is killed under a daemon with clients: no commit is lost, and no number is used for two changes."""

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import asyncpg
import pytest

from daemon.embedded.server import EmbeddedPostgres
from tests.support.daemon import Client, Daemon, daemon_process, token
from tests.support.postgres import chosen_binaries, passable_directory, prepare_cluster
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


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    with passable_directory() as directory:
        server = Server(directory)
        await prepare_cluster(directory, chosen_binaries())
        await server.embedded.start()
        await server.execute(
            f"""insert into chatgenius.users (id, auth0_id, email, username)
                values ('{ADA}', 'a', 'a@example.com', 'ada')"""
        )
        yield server
        await server.embedded.stop()


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


async def test_a_crash_loses_no_commit_and_reuses_no_number(server: Server) -> None:
    async with daemon_process(server.embedded.dsn, environment=QUICK) as daemon, daemon.client(ADA) as client:
        await follow(client)
        everything: list[str] = []
        numbers: list[int] = []
        for round_ in range(3):
            for number in range(5):
                await server.say(f"{round_}.{number}")
            said, seqs, _ = await read_until(client, f"{round_}.4")
            everything += said
            numbers += seqs
            await server.crash()
            await server.embedded.start()
        await server.say("end")
        said, seqs, resets = await read_until(client, "end")
        assert set(resets) <= {"crash"}
    expected = [f"{round_}.{number}" for round_ in range(3) for number in range(5)]
    assert {*expected, "end"} == {*everything, *said}
    assert sorted(set(numbers + seqs)) == numbers + seqs


async def test_numbers_undone_by_a_crash_cause_a_reset_and_are_never_reused(server: Server) -> None:
    async with daemon_process(server.embedded.dsn, environment=QUICK) as daemon:
        async with daemon.client(ADA) as client:
            await follow(client)
            await server.stop_wal_writer()
            await server.say("kept")  # the writer commits synchronously, the sequencer does not
            [_], [lost], _ = await read_until(client, "kept")
            before = client.welcome["pos"]
            since = f"{before.rpartition(':')[0]}:{lost}"
            await server.crash()
            await server.embedded.start()
            await server.say("after")
            said, seqs, resets = await read_until(client, "after")
        assert ["crash"] == resets
        assert ["kept", "after"] == said
        assert min(seqs) > lost + 2**17
        await _resumes_with(daemon, since, "crash")
        async with daemon.raw() as back:  # from an earlier position, having seen more than that
            await back.say(op="hello", token=token(ADA), since=before, seen=since)
            assert "welcome" == (await back.next())["op"]
            await follow(back)
            assert "crash" == (await back.next())["reason"]


async def test_with_synchronous_numbering_a_crash_undoes_nothing_that_was_delivered(server: Server) -> None:
    environment = QUICK | {"ROWCAST_ORDER_COMMIT": "sync"}
    async with daemon_process(server.embedded.dsn, environment=environment) as daemon, daemon.client(ADA) as client:
        await follow(client)
        await server.stop_wal_writer()
        await server.say("kept")
        assert ["kept"] == (await read_until(client, "kept"))[0]
        await server.crash()
        await server.embedded.start()
        await server.say("after")
        assert (["after"], []) == (await read_until(client, "after"))[::2]


async def _resumes_with(daemon: Daemon, since: str, reason: str) -> None:
    async with daemon.client(ADA, since=since) as client:
        await follow(client)
        assert reason == (await client.next())["reason"]


async def test_the_start_of_a_right_survives_a_crash_that_undoes_other_numbers(server: Server) -> None:
    """Otherwise changes from before the right began could get numbers after it."""
    async with daemon_process(server.embedded.dsn, environment=QUICK) as daemon, daemon.client(ADA) as client:
        await follow(client)
        await server.stop_wal_writer()
        await server.execute(
            f"""with channel as (insert into chatgenius.channels (name) values ('one') returning id)
                insert into chatgenius.channel_members (channel_id, user_id) select id, '{ADA}' from channel"""
        )
        assert "channel_members" == (await client.next())["changes"][0]["table"]
        await server.crash()
        await server.embedded.start()
        await server.say("after")
        assert (["after"], []) == (await read_until(client, "after"))[::2]


async def test_clients_stay_connected_while_postgres_is_away(server: Server) -> None:
    async with daemon_process(server.embedded.dsn, environment=QUICK) as daemon, daemon.client(ADA) as client:
        await follow(client)
        await server.crash()
        await client.say(op="ping", id=1)
        assert "pong" == (await client.next())["op"]
        await client.say(op="subscribe", id=2, topic="users")
        error = await client.next()
        assert ("error", "unavailable", True) == (error["op"], error["code"], error["retry"])
        await asyncio.gather(server.embedded.start())
        await server.say("back")
        assert "back" in (await read_until(client, "back"))[0]
