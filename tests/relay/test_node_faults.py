"""What clients of a gateway get while something between them and the database fails, with real processes."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import pytest

from daemon.core.signals import Message, Signal, pieces
from daemon.postgres.connect import Connection, connect
from daemon.relay.publisher import BEAT, SIGNALS
from tests.acceptance.chat import Chat
from tests.faults.proxy import Proxy
from tests.support.crash import ADA, QUICK, read_until
from tests.support.crash import Server as CrashServer
from tests.support.crash import follow as follow_ada
from tests.support.daemon import Client, Daemon, Frame, get, token
from tests.support.event_stream import event_stream
from tests.support.gateways import contents, follow, gateway, heartbeat, member, read
from tests.support.nats import NatsServer, running_cluster, running_link, running_nats
from tests.support.postgres import Server, chosen_binaries, passable_directory, prepare_cluster

MIB = 2**20


class Pair(NamedTuple):
    """A member and a gateway."""

    member: Daemon
    gateway: Daemon
    sql: Connection
    url: str


@pytest.fixture(scope="module")
async def pair(postgres: Server, nats: NatsServer) -> AsyncIterator[Pair]:
    """One for all tests of this module that break neither."""
    async with postgres.chatgenius() as dsn:
        sql = await connect(dsn, application_name="test")
        async with member(dsn, nats.url, "pair") as one, gateway(nats.url, "pair") as two:
            yield Pair(one, two, sql, nats.url)
        await sql.close()


@pytest.fixture
async def shared(pair: Pair) -> Chat:
    """An empty ChatGenius in the database of the pair."""
    return await Chat.begin_again(pair.sql, pair.gateway)


@pytest.fixture
async def chat(sql: Connection) -> Chat:
    return await Chat.begin(sql)


async def insert(chat: Chat, rows: int, size: int) -> None:
    await chat.sql.execute(
        """insert into chatgenius.messages (channel_id, user_id, content)
           select $1, $2, n || repeat('x', $3) from generate_series(1, $4) as n""",
        chat.channel,
        chat.ada,
        size,
        rows,
    )


async def presence(client: Client) -> Frame:
    return next(frame for frame in reversed(await client.until("presence")) if frame["op"] == "presence")


async def test_a_row_that_is_too_large_to_be_sent_to_all_is_asked_for(pair: Pair, shared: Chat) -> None:
    async with AsyncExitStack() as stack:
        client = await follow(stack, pair.gateway, shared)
        await insert(shared, 1, 3 * MIB)
        await shared.say("after")
        large, after = await client.changes(2)
    assert (1 + 3 * MIB, "after") == (len(large["record"]["content"]), after["record"]["content"])


async def test_a_large_transaction_comes_whole_and_one_that_is_too_large_is_a_reset(pair: Pair, shared: Chat) -> None:
    async with AsyncExitStack() as stack:
        client = await follow(stack, pair.gateway, shared)
        await insert(shared, 20_000, 1)
        assert [f"{number}x" for number in range(1, 20_001)] == contents(await client.changes(20_000))
        await insert(shared, 200, MIB)
        await shared.say("after")
        frame = (await client.until("reset"))[-1]
        assert ("limit", shared.topic) == (frame["reason"], frame["topic"])
        assert ["after"] == contents(await client.changes(1))


async def test_a_truncate_resets_the_topics_of_a_gateway(pair: Pair, shared: Chat) -> None:
    async with AsyncExitStack() as stack:
        client = await follow(stack, pair.gateway, shared)
        await shared.say("before")
        await shared.sql.execute("truncate chatgenius.messages cascade")
        await shared.say("after")
        frames = await client.until("reset")
        assert "truncate" == frames[-1]["reason"]
        assert ["after"] == await read_past_resets(client)


async def test_a_gateway_that_passes_no_resets_on_does_not_show_a_truncate(pair: Pair, shared: Chat) -> None:
    async with gateway(pair.url, "pair", "no_resets") as mutated, AsyncExitStack() as stack:
        client = await follow(stack, mutated, shared)
        await shared.sql.execute("truncate chatgenius.messages cascade")
        await shared.say("after")
        assert ["after"] == contents(await client.changes(1))


async def read_past_resets(client: Client) -> list[str]:
    """The contents of the next changes; a truncate of several tables may reset a topic more than once."""
    frames = await client.until("changes")
    assert {"reset"} >= {frame["op"] for frame in frames[:-1]}
    return contents(frames[-1]["changes"])


async def test_no_replay_at_a_gateway_shows_a_row_that_was_deleted_in_another_topic(pair: Pair, shared: Chat) -> None:
    async with AsyncExitStack() as stack:
        client = await follow(stack, pair.gateway, shared)
        since = client.welcome["pos"]
        message = await shared.say("secret")
        assert ["secret"] == contents(await client.changes(1))
    move = "update chatgenius.messages set channel_id = $2 where id = $1"
    await shared.sql.execute(move, message, shared.other)
    await shared.sql.execute("delete from chatgenius.messages where id = $1", message)
    await shared.say("kept")
    await shared.settled(pair.gateway)
    for node in pair.gateway, pair.member:
        async with node.client(shared.ada, since) as client:
            await client.say(op="subscribe", topic=shared.topic)
            frames = await client.until("resumed")
        assert "kept" in str(frames)
        assert "secret" not in str(frames)


async def test_a_gateway_sends_a_snapshot_and_what_a_filter_shows(pair: Pair, shared: Chat) -> None:
    for content in ("keep 1", "other 1", "keep 2"):
        await shared.say(content)
    await shared.settled(pair.member)
    where = {"messages": {"content": {"like": "keep %"}}}
    async with pair.gateway.client(shared.ada) as client:
        await client.say(op="subscribe", topic=shared.topic, snapshot=True, where=where)
        frames = await client.until("resumed")
        rows = [
            row
            for frame in frames
            if frame["op"] == "snapshot" and frame["table"] == "messages"
            for row in frame["rows"]
        ]
        assert ["keep 1", "keep 2"] == [row["record"]["content"] for row in rows]
        await shared.say("other 2")
        await shared.say("keep 3")
        assert ["keep 3"] == contents(await client.changes(1))


async def test_a_stream_of_events_is_followed_and_resumed_at_a_gateway_and_at_a_member(
    pair: Pair, shared: Chat
) -> None:
    async with event_stream(pair.gateway.address, token(shared.ada), shared.topic) as stream:
        assert (200, "subscribed") == (stream.status, (await stream.until("subscribed"))[-1].op)
        await shared.say("live")
        assert ["live"] == contents((await stream.until("changes"))[-1].frame["changes"])
        since = stream.last_id
    for content, node in (("meanwhile", pair.member), ("later", pair.gateway)):
        await shared.say(content)
        await shared.settled(node)
        async with event_stream(node.address, token(shared.ada), shared.topic, last_id=since) as stream:
            replayed = [event.frame for event in await stream.until("resumed") if event.op == "changes"]
            assert [content] == [found for frame in replayed for found in contents(frame["changes"])]
            since = stream.last_id
    async with event_stream(pair.gateway.address, token(shared.bob), shared.topic) as stream:
        assert (404, True) == (stream.status, b"no_such_topic" in await stream.body())
    async with event_stream(pair.gateway.address, "none", shared.topic) as stream:
        assert 401 == stream.status


async def test_people_at_a_gateway_and_at_a_member_see_each_other(pair: Pair, shared: Chat) -> None:
    async with pair.gateway.client(shared.ada, device="a") as near, pair.member.client(shared.ada, device="b") as far:
        await near.subscribe(shared.topic, presence={"data": {"at": "gateway"}})
        assert ["a"] == [one["device"] for one in (await presence(near))["state"][shared.ada]]
        await far.subscribe(shared.topic, presence={})
        assert {"a", "b"} == {one["device"] for one in (await presence(far))["state"][shared.ada]}
        assert ["b"] == [one["device"] for one in (await presence(near))["joined"]]
        await far.say(op="unsubscribe", topic=shared.topic)
        await far.until("unsubscribed")
        assert ["b"] == [one["device"] for one in (await presence(near))["left"]]


async def test_what_a_device_acknowledges_at_a_gateway_is_known_at_a_member(pair: Pair, shared: Chat) -> None:
    async with pair.gateway.client(shared.ada, device="laptop") as client:
        since = client.welcome["pos"]
        await client.say(op="ack", pos=since)
    stored = "select count(*) from rowcast.acks where user_id = $1"
    while not await pair.sql.fetchval(stored, shared.ada):
        await asyncio.sleep(0.05)
    async with pair.member.client(shared.ada, "stored", device="laptop") as client:
        assert since == client.welcome["since"]


async def test_a_gateway_says_that_a_member_has_another_version(pair: Pair, nats: NatsServer) -> None:
    async with running_link(nats.url, "pair") as link:
        await link.connected.wait()
        link.publish("log", b"\2\0\0\0\2[]")
        while (answer := await get(f"{pair.gateway.http}/readyz"))[0] == 200:
            await asyncio.sleep(0.05)
    assert "another version" in answer[1]
    assert 1 == len([event for event in pair.gateway.events() if event["event"] == "relay_unreadable"])
    while (await get(f"{pair.gateway.http}/readyz"))[0] != 200:
        await asyncio.sleep(0.1)


async def test_a_client_of_a_gateway_that_is_killed_goes_on_at_another(
    database: str, chat: Chat, nats: NatsServer, prefix: str
) -> None:
    async with (
        member(database, nats.url, prefix),
        gateway(nats.url, prefix) as one,
        gateway(nats.url, prefix) as two,
        AsyncExitStack() as stack,
    ):
        client = await follow(stack, one, chat)
        await chat.say("before")
        since = (await client.until("changes"))[-1]["pos"]
        one.process.send_signal(signal.SIGKILL)
        await client.closed()
        await chat.say("meanwhile")
        client = await stack.enter_async_context(two.client(chat.ada, since))
        await client.say(op="subscribe", topic=chat.topic)
        await chat.say("after")
        assert ["meanwhile", "after"] == await read_subscribed(client, "after")


async def read_subscribed(client: Client, last: str) -> list[str]:
    assert "subscribed" == (await client.next())["op"]
    return await read(client, last)


async def test_a_gateway_that_was_stopped_behind_thousands_of_writes_gets_them_all(
    database: str, chat: Chat, nats: NatsServer, prefix: str
) -> None:
    async with member(database, nats.url, prefix), gateway(nats.url, prefix) as two, AsyncExitStack() as stack:
        client = await follow(stack, two, chat)
        two.process.send_signal(signal.SIGSTOP)
        for _ in range(50):
            await insert(chat, 60, 1)
        two.process.send_signal(signal.SIGCONT)
        await chat.say("last")
        found = await read(client, "last")
    assert [f"{number}x" for number in range(1, 61)] * 50 + ["last"] == found


async def test_a_gateway_that_nats_has_cut_off_since_it_hung_gets_all_when_it_goes_on(
    database: str, chat: Chat, prefix: str
) -> None:
    async with (
        running_nats() as nats,
        member(database, nats.url, prefix) as leader,
        gateway(nats.url, prefix) as gate,
        AsyncExitStack() as stack,
    ):
        there, client = await follow(stack, leader, chat), await follow(stack, gate, chat)
        gate.process.send_signal(signal.SIGSTOP)
        sent: list[str] = []
        while "WriteDeadline of 4s exceeded" not in nats.log:  # the sockets are full
            await insert(chat, 100, 2000)
            # One batch each: two together would be too large to be sent, and had to be asked for.
            sent += await read(there, "100" + "x" * 2000)
        gate.process.send_signal(signal.SIGCONT)
        await chat.say("last")
        assert [*sent, "last"] == await read(client, "last")
        assert (await get(f"{gate.http}/readyz"))[0] == 200


async def test_clients_of_a_gateway_miss_nothing_when_the_leader_is_cut_off(
    database: str, chat: Chat, nats: NatsServer, prefix: str
) -> None:
    async with (
        Proxy(("127.0.0.1", nats.port)).serving() as proxy,
        member(database, f"nats://127.0.0.1:{proxy.port}", prefix, "quick_relay_pings") as leader,
        member(database, nats.url, prefix),
        gateway(nats.url, prefix, ROWCAST_HEARTBEAT="0.5") as gate,
        AsyncExitStack() as stack,
    ):
        client = await follow(stack, gate, chat)
        proxy.hold()
        for number in range(5):
            await chat.say(str(number))
            assert [str(number)] == await read(client, str(number))
        while not any(event["event"] == "relay_lost" for event in leader.events()):
            await asyncio.sleep(0.1)
        proxy.heal()
        await chat.say("last")
        assert ["last"] == await read(client, "last")
        assert not (await heartbeat(client)).get("stale")


async def test_only_clients_of_a_gateway_that_nats_does_not_reach_learn_that_it_is_stale(
    database: str, chat: Chat, nats: NatsServer, prefix: str
) -> None:
    async with (
        Proxy(("127.0.0.1", nats.port)).serving() as proxy,
        member(database, nats.url, prefix),
        gateway(nats.url, prefix, ROWCAST_HEARTBEAT="0.5") as one,
        gateway(f"nats://127.0.0.1:{proxy.port}", prefix, ROWCAST_HEARTBEAT="0.5") as two,
        AsyncExitStack() as stack,
    ):
        served, held = [await follow(stack, node, chat) for node in (one, two)]
        proxy.hold()
        await chat.say("meanwhile")
        assert ["meanwhile"] == await read(served, "meanwhile")
        while not (await heartbeat(held)).get("stale"):
            pass
        assert not (await heartbeat(served)).get("stale")
        proxy.heal()
        await chat.say("last")
        assert ["meanwhile", "last"] == await read(held, "last")
        assert ["last"] == await read(served, "last")


async def test_clients_of_a_gateway_miss_nothing_when_servers_of_nats_are_killed(
    database: str, chat: Chat, prefix: str
) -> None:
    async with running_cluster() as servers, AsyncExitStack() as stack:
        urls = ",".join(server.url for server in servers)
        await stack.enter_async_context(member(database, urls, prefix))
        gate = await stack.enter_async_context(gateway(urls, prefix))
        client = await follow(stack, gate, chat)
        for server in servers:
            await server.kill()
            for number in range(5):
                await chat.say(str(number))
            assert [*map(str, range(5))] == await read(client, "4")
            await server.start()


@asynccontextmanager
async def crash_server() -> AsyncIterator[CrashServer]:
    with passable_directory() as directory:
        server = CrashServer(directory)
        await prepare_cluster(directory, chosen_binaries())
        await server.embedded.start()
        await server.execute(
            f"""insert into chatgenius.users (id, auth0_id, email, username)
                values ('{ADA}', 'a', 'a@example.com', 'ada')"""
        )
        try:
            yield server
        finally:
            await server.embedded.stop()


async def test_what_a_crash_of_postgres_takes_back_is_a_reset_at_a_gateway(nats: NatsServer, prefix: str) -> None:
    async with (
        crash_server() as server,
        member(server.embedded.dsn, nats.url, prefix, **QUICK),
        gateway(nats.url, prefix) as gate,
        gate.client(ADA) as client,
    ):
        await follow_ada(client)
        await server.stop_wal_writer()
        await server.say("kept")  # the writer commits synchronously, the sequencer does not
        _, [lost], _ = await read_until(client, "kept")
        await server.crash()
        await server.embedded.start()
        reset = (await client.until("reset"))[-1]
        assert "crash" == reset["reason"]
        await server.say("after")
        said, seqs, resets = await read_until(client, "after")
        assert ["kept", "after"][-len(said) :] == said
        assert not resets
        assert min(seqs) > int(reset["pos"].rpartition(":")[2]) > lost


async def test_clients_of_a_gateway_are_reset_when_the_members_have_another_database(
    postgres: Server, nats: NatsServer, prefix: str
) -> None:
    async with AsyncExitStack() as stack:
        names = [await stack.enter_async_context(postgres.chatgenius()) for _ in range(2)]
        for dsn in names:
            sql = await connect(dsn, application_name="test")
            await sql.execute(
                f"""insert into chatgenius.users (id, auth0_id, email, username)
                    values ('{ADA}', 'a', 'a@example.com', 'ada')"""
            )
            await sql.close()
        async with member(names[0], nats.url, prefix):
            gate = await stack.enter_async_context(gateway(nats.url, prefix))
            client = await stack.enter_async_context(gate.client(ADA))
            await follow_ada(client)
        async with member(names[1], nats.url, prefix):
            frames = await client.until("reset")
            assert "epoch" == frames[-1]["reason"]
            assert f"user:{ADA}" == frames[-1]["topic"]
            sql = await stack.enter_async_context(postgres_session(names[1]))
            await sql.execute(
                f"""insert into chatgenius.user_settings (user_id, preferences)
                    values ('{ADA}', jsonb_build_object('said', 'there'))"""
            )
            assert (["there"], []) == (await read_until(client, "there"))[::2]


async def test_clients_of_a_gateway_get_nothing_of_another_database_with_the_same_prefix(
    postgres: Server, database: str, chat: Chat, nats: NatsServer, prefix: str
) -> None:
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        dsn = await enter(postgres.chatgenius())
        foreign = await Chat.begin(await enter(postgres_session(dsn)))
        await foreign.take_over(chat.channel)
        own = await enter(member(database, nats.url, prefix))
        gate = await enter(gateway(nats.url, prefix))
        client, near = await follow(stack, gate, chat), await follow(stack, own, chat)
        other = await enter(member(dsn, nats.url, prefix))
        while "ROWCAST_NATS_PREFIX" not in (await get(f"{gate.http}/readyz"))[1]:
            await foreign.say("foreign")
            await chat.say("mine")
            assert [["mine"]] * 2 == [contents(await one.changes(1)) for one in (client, near)]
        signaller = await follow(stack, other, foreign)
        link, signalled = await enter(running_link(nats.url, prefix)), asyncio.Event()
        link.subscribe(SIGNALS, lambda _: signalled.set())
        beats = asyncio.Event()
        link.subscribe(BEAT, lambda _: beats.set())
        await beats.wait()  # so the server knows both subscriptions
        await signaller.say(op="signal", topic=foreign.topic, name="typing", data="foreign")
        await signalled.wait()
        for sender, receiver in ((client, near), (near, client)):
            await sender.say(op="signal", topic=chat.topic, name="typing", data="mine")
            assert ("signal", "mine") == ((frame := await receiver.next())["op"], frame["data"])
        link.publish(SIGNALS, of_an_older_node(chat.topic))
        async with gate.client(chat.ada, client.welcome["pos"]) as late:
            await late.say(op="subscribe", topic=chat.topic, snapshot=True)
            frames = await late.until("resumed")
            assert '"mine"' in str(frames).replace("'", '"')
            assert "foreign" not in str(frames)
        await chat.say("last")
        assert ["last"] == contents((await client.next())["changes"])
        while not (mixed := [event for event in gate.events() if event["event"] == "relay_mixed"]):
            await asyncio.sleep(0.01)  # it is logged at the next check; the page says it at once
        assert 1 == len(mixed)


async def test_signals_of_an_older_node_reach_clients_while_there_is_one_database(pair: Pair, shared: Chat) -> None:
    async with AsyncExitStack() as stack:
        clients = [await follow(stack, node, shared) for node in (pair.member, pair.gateway)]
        async with running_link(pair.url, "pair") as link:
            await link.connected.wait()
            link.publish(SIGNALS, of_an_older_node(shared.topic))
            assert ["older"] * 2 == [(await client.next())["data"] for client in clients]


def of_an_older_node(topic: str) -> bytes:
    """A signal as nodes have sent it that name no epoch."""
    signal = Signal(topic=topic, name="typing", user="older", data='"older"')
    [piece] = pieces("older", 1, Message(signals=[signal]))
    return piece.encode()


@asynccontextmanager
async def postgres_session(dsn: str) -> AsyncIterator[Connection]:
    sql = await connect(dsn, application_name="test")
    try:
        yield sql
    finally:
        await sql.close()
