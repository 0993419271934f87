"""Large records: what one client writes costs the others neither memory nor time."""

import asyncio
import os
from pathlib import Path

from tests.acceptance.chat import Chat
from tests.support.daemon import Client, Daemon

MIB = 2**20


def peak_memory(daemon: Daemon) -> int:
    """The most memory that the process has had, in MiB."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text(encoding="ascii")
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024


async def insert(chat: Chat, rows: int, size: int, channel: str | None = None) -> None:
    await chat.sql.execute(
        """insert into chatgenius.messages (channel_id, user_id, content)
           select $1, $2, n || repeat('x', $3) from generate_series(1, $4) as n""",
        channel or chat.channel,
        chat.ada,
        size,
        rows,
    )


async def test_one_insert_of_200_rows_of_1_mib_is_a_reset_and_takes_no_memory(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as one, daemon.client(chat.ada) as two:
        for client in (one, two):
            assert "subscribed" == (await client.subscribe(chat.topic))["op"]
        before = peak_memory(daemon)
        await insert(chat, 200, MIB)
        for client in (one, two):
            frame = await client.next()
            assert ("reset", "limit", chat.topic) == (frame["op"], frame["reason"], frame["topic"])
        assert before + 30 > peak_memory(daemon)
        await chat.say("after it")
        for client in (one, two):
            assert "after it" == (await client.changes())[0]["record"]["content"]


async def test_200_rows_of_1_mib_are_delivered_one_by_one_in_little_memory(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        before = peak_memory(daemon)
        writing = asyncio.create_task(insert_each(chat, 200))
        assert 200 == len([change for _ in range(200) for change in await client.changes()])
        await writing
        assert before + 120 > peak_memory(daemon)


async def insert_each(chat: Chat, count: int) -> None:
    for _ in range(count):
        await insert(chat, 1, MIB)


async def test_a_row_of_15_mib_in_a_topic_nobody_follows_delays_nobody(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        pinging = asyncio.create_task(slowest_pong(client, daemon))
        await insert(chat, 1, 15 * MIB, chat.other)
        await chat.say("after it")
        assert 1.0 > await pinging


async def slowest_pong(client: Client, daemon: Daemon) -> float:
    """The most processor time that the daemon took to answer a ping until a change arrived (seconds)."""
    slowest = 0.0
    while True:
        began = processor_time(daemon)
        await client.say(op="ping")
        if "pong" != (await client.next())["op"]:
            return slowest
        slowest = max(slowest, processor_time(daemon) - began)


def processor_time(daemon: Daemon) -> float:
    """The seconds for which the process has used a processor."""
    state = Path(f"/proc/{daemon.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(state[11]) + int(state[12])) / os.sysconf("SC_CLK_TCK")
