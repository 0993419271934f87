"""Postgres is killed under a daemon with clients: no commit is lost, and no number is used for two changes."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.support.crash import ADA, QUICK, Server, follow, read_until
from tests.support.daemon import Daemon, daemon_process, token
from tests.support.postgres import chosen_binaries, passable_directory, prepare_cluster


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
        await client.until("pong")  # heartbeats may come between
        await client.say(op="subscribe", id=2, topic="users")
        error = (await client.until("error"))[-1]
        assert ("error", "unavailable", True) == (error["op"], error["code"], error["retry"])
        await asyncio.gather(server.embedded.start())
        await server.say("back")
        assert "back" in (await read_until(client, "back"))[0]
