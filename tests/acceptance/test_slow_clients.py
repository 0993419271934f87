"""Clients that read slowly or not at all: each is served at its own pace without delaying others."""

import asyncio
import json
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from websockets.frames import Opcode

from tests.acceptance.chat import Chat
from tests.gateway.peers import frame as bytes_of
from tests.support.daemon import Client, Daemon, Frame, token
from tests.support.gateways import PLACES, node

SMALL = 4096  # bytes of a receive buffer
LIMIT = 100_000  # bytes that may be queued for a client
LONG = 60_000  # characters of a message: kernels buffer megabytes for a client that does not read


@pytest.fixture(params=PLACES)
async def daemon(request: pytest.FixtureRequest, database: str, chat: Chat) -> AsyncIterator[Daemon]:
    settings = {"ROWCAST_QUEUE_BYTES": str(LIMIT), "ROWCAST_HEARTBEAT": "0.1"}
    async with node(request.param, database, environment=settings) as process:
        yield process


@asynccontextmanager
async def sleeper(daemon: Daemon, user: str, *topics: str, since: str | None = None) -> AsyncIterator[Client]:
    """A client that follows these topics and then reads only when the test asks it for a frame."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, daemon.address)
    async with daemon.raw(sock=connection, max_queue=1) as client:
        await client.say(op="hello", token=token(user), since=since)
        client.welcome = await client.next()
        for topic in topics:
            await client.subscribe(topic)
        try:
            yield client
        finally:
            client.connection.transport.abort()  # it would not read the answer to a close frame


async def write_much(chat: Chat, *, count: int = 150, start: int = 0, channel: str | None = None) -> None:
    """Write long messages, each in its own transaction: more than all buffers hold."""
    for number in range(start, start + count):
        await chat.say(f"{number} " + "x" * LONG, channel)


async def write_in_batches(chat: Chat, daemon: Daemon) -> None:
    """The same in more than one batch: a client falls behind by what waits for it when the next batch comes."""
    await write_much(chat, count=75)
    await chat.settled(daemon)
    await write_much(chat, count=75, start=75)


async def number_of(daemon: Daemon, metric: str) -> float:
    reader, writer = await asyncio.open_connection(*daemon.address)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
    page = (await reader.read()).decode()
    writer.close()
    found = re.search(rf"^{re.escape(metric)} (.+)$", page, re.MULTILINE)
    assert found
    return float(found[1])


async def until_behind(daemon: Daemon, count: int = 1) -> None:
    while await number_of(daemon, "rowcast_clients_behind") < count:
        await asyncio.sleep(0.05)


def seq_of(position: str) -> int:
    return int(position.rpartition(":")[2])


def first_words(frames: list[Frame]) -> list[str]:
    return [
        change["record"]["content"].partition(" ")[0]
        for frame in frames
        if frame["op"] == "changes"
        for change in frame["changes"]
        if change["table"] == "messages"
    ]


async def all_until(client: Client, last: str) -> list[Frame]:
    """Every frame, including heartbeats, up to the message that begins with this word."""
    frames: list[Frame] = []
    while last not in first_words(frames[-1:]):
        frames.append(json.loads(await client.connection.recv()))
    return frames


def check_by_the_rules(frames: list[Frame], start: str, topics: dict[str, str]) -> None:
    """Check what the protocol promises every client: no gaps, no repeats, and positions that only grow."""
    known = {topic: seq_of(pos) for topic, pos in topics.items()}
    position = seq_of(start)
    for frame in frames:
        if frame["op"] == "subscribed":
            known[frame["topic"]] = seq_of(frame["pos"])
        if frame["op"] == "changes":
            assert seq_of(frame["prev"]) <= known[frame["topic"]]
            assert [change["seq"] for change in frame["changes"] if change["seq"] <= known[frame["topic"]]] == []
            known[frame["topic"]] = seq_of(frame["pos"])
        if frame["op"] == "resumed":
            known = {topic: max(known[topic], seq_of(frame["pos"])) for topic in known}
        if frame["op"] in {"changes", "head", "resumed"} and "pos" in frame:
            assert seq_of(frame["pos"]) >= position
            position = seq_of(frame["pos"])


async def test_a_slow_client_receives_everything_once_while_others_are_served(daemon: Daemon, chat: Chat) -> None:
    other = f"channel:{chat.other}"
    async with daemon.client(chat.ada) as fast, sleeper(daemon, chat.ada, chat.topic, other) as slow:
        await fast.subscribe(chat.topic)
        for number in range(80):
            await chat.say(f"{number} " + "x" * LONG)
            await chat.say(f"other-{number} " + "x" * LONG, chat.other)
            await fast.changes()
        await until_behind(daemon)
        await chat.say("last", chat.other)
        await chat.settled(daemon)  # so that "last" is among what the client has missed
        frames = await all_until(slow, "last")
        frames += [await slow.next()]
        await chat.say("live again")
        await chat.say("both of them", chat.other)
        frames += await all_until(slow, "both")
    expected = [word for number in range(80) for word in (str(number), f"other-{number}")]
    assert [*expected, "last", "live", "both"] == first_words(frames)
    assert ["resumed"] == [frame["op"] for frame in frames if frame["op"] not in {"changes", "head"}]
    start = slow.welcome["pos"]
    check_by_the_rules(frames, start, {chat.topic: start, other: start})


async def test_resuming_from_any_position_of_a_slow_client_restores_all_topics(daemon: Daemon, chat: Chat) -> None:
    topics = (chat.topic, f"channel:{chat.other}")
    async with sleeper(daemon, chat.ada, *topics) as slow:
        for _ in range(10):
            await write_much(chat, count=8)
            await write_much(chat, count=8, channel=chat.other)
            await chat.settled(daemon)
        await until_behind(daemon)
        await chat.say("last")
        frames = await all_until(slow, "last")
    places = [place for place, frame in enumerate(frames) if "pos" in frame]
    for place in places[:: len(places) // 5]:
        rest = [change["seq"] for later in frames[place + 1 :] for change in later.get("changes", ())]
        found: list[int] = []
        async with daemon.client(chat.ada, since=frames[place]["pos"]) as client:
            for topic in topics:
                await client.say(op="subscribe", topic=topic)
                for frame in await client.until("resumed"):
                    found += [change["seq"] for change in frame.get("changes", ())]
        assert sorted(rest) == sorted(found)


async def test_a_topic_that_a_slow_client_subscribes_to_is_delivered_in_order(daemon: Daemon, chat: Chat) -> None:
    other = f"channel:{chat.other}"
    async with sleeper(daemon, chat.ada, chat.topic) as slow:
        await write_in_batches(chat, daemon)
        await until_behind(daemon)
        await slow.say(op="subscribe", topic=other)
        frames = [await slow.next()]
        while frames[-1]["op"] != "subscribed":  # once the client reads again, the daemon does too
            frames.append(await slow.next())
        await write_much(chat, channel=chat.other)
        await chat.say("last", chat.other)
        frames += await all_until(slow, "last")
    assert [*map(str, range(150)), *map(str, range(150)), "last"] == first_words(frames)
    check_by_the_rules(frames, slow.welcome["pos"], {chat.topic: slow.welcome["pos"]})


async def test_a_slow_client_receives_nothing_from_after_its_right_ended(daemon: Daemon, chat: Chat) -> None:
    key = (chat.channel, chat.bob)
    await chat.sql.execute("insert into chatgenius.channel_members (channel_id, user_id) values ($1, $2)", *key)
    await chat.settled(daemon)
    async with sleeper(daemon, chat.bob, chat.topic, "users") as slow:
        await write_in_batches(chat, daemon)
        await until_behind(daemon)
        await chat.sql.execute("delete from chatgenius.channel_members where channel_id = $1 and user_id = $2", *key)
        await write_much(chat, count=10)
        await chat.sql.execute("update chatgenius.users set full_name = 'Bob' where id = $1", chat.bob)
        await chat.settled(daemon)
        frames = await slow.until("resumed")
    [revoked] = [frame for frame in frames if frame["op"] == "revoked"]
    received = [
        (frame["topic"], change["seq"]) for frame in frames if frame["op"] == "changes" for change in frame["changes"]
    ]
    assert all(seq < seq_of(revoked["pos"]) for topic, seq in received if topic == chat.topic)
    assert sorted({seq for topic, seq in received if topic == chat.topic}) == [
        seq for topic, seq in received if topic == chat.topic
    ]
    assert ["users"] == [topic for topic, _ in received if topic != chat.topic]


async def test_a_transaction_larger_than_the_queue_is_one_frame_and_the_stream_continues(
    daemon: Daemon, chat: Chat
) -> None:
    async with sleeper(daemon, chat.ada, chat.topic) as slow:
        for round_ in range(5):  # the client takes the first frames, although nobody asks it for them
            await chat.sql.execute(
                """insert into chatgenius.messages (channel_id, user_id, content)
                   select $1, $2, $3 || n || ' ' || repeat('x', $4) from generate_series(1, 150) as n""",
                chat.channel,
                chat.ada,
                f"{round_}-",
                LONG,
            )
            await chat.settled(daemon)  # so that each is a batch: a client falls behind between two of them
        await until_behind(daemon)
        await chat.say("last")
        frames = await all_until(slow, "last")
    transactions = [{change["tx"] for change in frame["changes"]} for frame in frames if frame["op"] == "changes"]
    assert 6 == len(set[str]().union(*transactions)) == sum(map(len, transactions))
    assert [*(f"{round_}-{n}" for round_ in range(5) for n in range(1, 151)), "last"] == first_words(frames)
    check_by_the_rules(frames, slow.welcome["pos"], {chat.topic: slow.welcome["pos"]})


async def test_no_heartbeat_names_a_position_during_a_replay(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        start = client.welcome["pos"]
    await write_much(chat)
    await chat.settled(daemon)
    async with sleeper(daemon, chat.ada, since=start) as slow:
        await slow.say(op="subscribe", topic=chat.topic)
        frames: list[Frame] = []
        while "resumed" not in {frame["op"] for frame in frames}:
            frames.append(json.loads(await slow.connection.recv()))
        while frames[-1]["op"] != "head":
            frames.append(json.loads(await slow.connection.recv()))
    begun = [frame["op"] for frame in frames].index("subscribed")
    ended = [frame["op"] for frame in frames].index("resumed")
    assert not any("pos" in frame for frame in frames[begun:ended] if frame["op"] == "head")
    assert frames[ended]["pos"] == frames[-1]["pos"]


CLIENT = """
import asyncio, json, sys
from websockets.asyncio.client import connect

async def main(url, token, topic):
    async with connect(url, subprotocols=["rowcast.v1"], ping_interval=None, max_size=None) as client:
        await client.send(json.dumps({"op": "hello", "token": token}))
        print(json.loads(await client.recv())["session"])
        await client.send(json.dumps({"op": "subscribe", "topic": topic}))
        async for text in client:
            print(json.loads(text)["op"], flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@asynccontextmanager
async def stopped_client(daemon: Daemon, user: str, topic: str) -> AsyncIterator[str]:
    """A client process that follows a topic and is then stopped; yields its session."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, daemon.url, token(user), topic, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout
        session = (await process.stdout.readline()).decode().strip()
        while (op := await process.stdout.readline()) != b"subscribed\n":  # heartbeats may come before the answer
            assert b"head\n" == op
        process.send_signal(signal.SIGSTOP)
        yield session
    finally:
        process.kill()
        await process.communicate()


async def last_close(daemon: Daemon, user: str, session: str) -> Any:
    async with daemon.raw() as client:
        await client.say(op="hello", token=token(user), session=session)
        return (await client.next()).get("last_close")


async def test_clients_that_never_read_are_disconnected_and_learn_why_when_they_return(
    daemon: Daemon, chat: Chat
) -> None:
    """Takes as long as the drain timeout, or twice as long if the kernel took something after it began."""
    async with (
        daemon.client(chat.ada) as fast,
        sleeper(daemon, chat.ada, chat.topic) as slow,
        stopped_client(daemon, chat.ada, chat.topic) as stopped,
    ):
        await fast.subscribe(chat.topic)
        for _ in range(150):
            await write_much(chat, count=1)
            await fast.changes()
        while await number_of(daemon, "rowcast_clients") > 1:
            await chat.say("tick")
            await fast.changes()
            await fast.say(op="ping")
            assert "pong" == (await fast.next())["op"]
        assert 0 == await number_of(daemon, "rowcast_clients_behind")
        for session in (slow.welcome["session"], stopped):
            assert {"code": 4408, "reason": "too_slow"} == await last_close(daemon, chat.ada, session)
            assert await last_close(daemon, chat.bob, session) is None
        assert await last_close(daemon, chat.ada, fast.welcome["session"]) is None


@pytest.mark.parametrize("place", PLACES)
async def test_a_user_who_leaves_too_much_unread_loses_the_connections_that_do_and_no_other(
    place: str, database: str, chat: Chat
) -> None:
    settings = {"ROWCAST_USER_UNREAD_BYTES": str(2**20), "ROWCAST_QUEUE_BYTES": str(2**22)}
    async with (
        node(place, database, environment=settings) as daemon,
        daemon.client(chat.ada) as fast,
        sleeper(daemon, chat.ada, chat.topic) as slow,
    ):
        await fast.subscribe(chat.topic)
        for _ in range(50):
            await write_much(chat, count=1)
            await fast.changes()
        while await number_of(daemon, 'rowcast_aborted_total{reason="user_unread"}') < 1:
            await asyncio.sleep(0.1)
        assert {"code": 4408, "reason": "too_slow"} == await last_close(daemon, chat.ada, slow.welcome["session"])
        await chat.say("undisturbed")
        assert "undisturbed" == (await fast.changes())[0]["record"]["content"]


async def test_a_flood_of_pings_holds_up_only_its_own_connection(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as bystander, sleeper(daemon, chat.ada, chat.topic) as flooding:
        await bystander.subscribe(chat.topic)
        flooding.connection.transport.write(20_000 * bytes_of(Opcode.PING, b"p" * 100))
        await chat.say("undisturbed")
        assert "undisturbed" == (await bystander.changes())[0]["record"]["content"]


async def test_a_client_reads_a_large_snapshot_at_its_own_pace_and_then_what_was_written_meanwhile(
    daemon: Daemon, chat: Chat
) -> None:
    await write_much(chat)
    await chat.settled(daemon)
    async with sleeper(daemon, chat.ada) as slow, daemon.client(chat.ada) as fast:
        await slow.subscribe(chat.topic, snapshot=True)
        await fast.subscribe(chat.topic)
        await chat.say("meanwhile")
        assert ["meanwhile"] == first_words([await fast.next()])
        frames = await slow.until("resumed")
        found = [
            row["record"]["content"].partition(" ")[0]
            for frame in frames
            if frame["op"] == "snapshot" and frame["table"] == "messages"
            for row in frame["rows"]
        ]
        assert list(map(str, range(150))) == found
        assert all(len(frame["rows"]) <= 5 for frame in frames if frame["op"] == "snapshot")
        assert ["meanwhile"] == first_words(frames)
        await chat.say("after")
        assert ["after"] == first_words([await slow.next()])
