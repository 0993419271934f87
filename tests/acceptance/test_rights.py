"""Rights that end: revoked in log order and immediately, for live clients and for replays."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from daemon.postgres.connect import Connection
from tests.acceptance.chat import Chat
from tests.support.daemon import Client, Daemon, Frame
from tests.support.gateways import PLACES, node
from tests.support.postgres import Server


@pytest.fixture(scope="module")
async def database(postgres: Server) -> AsyncIterator[str]:
    async with postgres.chatgenius() as dsn:
        yield dsn


@pytest.fixture(scope="module", params=PLACES)
async def daemon(request: pytest.FixtureRequest, database: str) -> AsyncIterator[Daemon]:
    async with node(request.param, database) as process:
        yield process


@pytest.fixture
async def chat(daemon: Daemon, sql: Connection) -> Chat:
    return await Chat.begin_again(sql, daemon)


async def join(chat: Chat, user: str) -> None:
    await chat.sql.execute(
        "insert into chatgenius.channel_members (channel_id, user_id) values ($1, $2)", chat.channel, user
    )


async def leave(chat: Chat, user: str) -> None:
    await chat.sql.execute(
        "delete from chatgenius.channel_members where channel_id = $1 and user_id = $2", chat.channel, user
    )


def seq_of(frame: Frame) -> int:
    return int(frame["pos"].rpartition(":")[2])


async def test_a_removed_member_is_revoked_and_receives_nothing_more_while_others_do(
    daemon: Daemon, chat: Chat
) -> None:
    await join(chat, chat.bob)
    await chat.settled(daemon)
    async with daemon.client(chat.ada) as ada, daemon.client(chat.bob) as bob:
        await ada.subscribe(chat.topic)
        await bob.subscribe(chat.topic)
        await bob.subscribe("users")
        await chat.say("to both")
        assert "to both" == (await bob.changes())[0]["record"]["content"]
        await leave(chat, chat.bob)
        revoked = await bob.next()
        assert ("revoked", chat.topic) == (revoked["op"], revoked["topic"])
        await chat.say("not to Bob")
        await chat.sql.execute("update chatgenius.users set full_name = 'Bob' where id = $1", chat.bob)
        assert ["users"] == [change["table"] for change in await bob.changes()]
        assert "no_such_topic" == (await bob.subscribe(chat.topic))["code"]
        changes = await ada.changes(3)
    assert ["messages", "channel_members", "messages"] == [change["table"] for change in changes]
    assert changes[1]["seq"] == seq_of(revoked)


async def test_a_message_that_a_trigger_writes_when_a_member_leaves_is_not_sent_to_that_member(
    daemon: Daemon, chat: Chat
) -> None:
    await chat.sql.execute("""
        create function chatgenius.say_goodbye() returns trigger language plpgsql as $f$
        begin
            insert into chatgenius.messages (channel_id, user_id, content)
            values (old.channel_id, old.user_id, 'somebody left');
            return null;
        end $f$;
        create trigger goodbye after delete on chatgenius.channel_members
            for each row execute function chatgenius.say_goodbye();
    """)
    try:
        await join(chat, chat.bob)
        await chat.settled(daemon)
        async with daemon.client(chat.ada) as ada, daemon.client(chat.bob) as bob:
            before = bob.welcome["pos"]
            await ada.subscribe(chat.topic)
            await bob.subscribe(chat.topic)
            await leave(chat, chat.bob)
            assert "revoked" == (await bob.next())["op"]
            assert {"messages", "channel_members"} == {change["table"] for change in await ada.changes(2)}
        async with daemon.client(chat.bob, since=before) as bob:
            assert "no_such_topic" == (await bob.subscribe(chat.topic))["code"]
    finally:
        await chat.sql.execute("drop function chatgenius.say_goodbye() cascade")


async def test_a_new_member_gets_a_reset_and_everything_since_joining(daemon: Daemon, chat: Chat) -> None:
    await chat.settled(daemon)
    async with daemon.client(chat.bob) as bob:
        before = bob.welcome["pos"]
    await chat.say("before Bob's time")
    await join(chat, chat.bob)
    await chat.say("to Bob as well")
    await chat.settled(daemon)
    async with daemon.client(chat.bob, since=before) as bob:
        subscribed = await bob.subscribe(chat.topic)
        reset = await bob.next()
        joined, message = await bob.changes(2)
        assert "resumed" == (await bob.next())["op"]
    assert ("reset", "rights", chat.topic) == (reset["op"], reset["reason"], reset["topic"])
    assert before == subscribed["pos"]
    assert ("channel_members", chat.bob) == (joined["table"], joined["record"]["user_id"])
    assert joined["seq"] == seq_of(reset) + 1
    assert "to Bob as well" == message["record"]["content"]


async def test_a_member_who_left_and_rejoined_does_not_see_the_time_between(daemon: Daemon, chat: Chat) -> None:
    await join(chat, chat.bob)
    await chat.settled(daemon)
    async with daemon.client(chat.bob) as bob:
        before = bob.welcome["pos"]
    await chat.say("while Bob is in")
    await leave(chat, chat.bob)
    await chat.say("while Bob is out")
    await join(chat, chat.bob)
    await chat.say("Bob is back")
    await chat.settled(daemon)
    async with daemon.client(chat.bob, since=before) as bob:
        await bob.subscribe(chat.topic)
        assert "rights" == (await bob.next())["reason"]
        changes = await bob.changes(2)
    assert ["channel_members", "messages"] == [change["table"] for change in changes]
    assert "Bob is back" == changes[-1]["record"]["content"]


async def test_resuming_from_where_the_right_began_misses_nothing_and_gets_no_reset(
    daemon: Daemon, chat: Chat
) -> None:
    await chat.settled(daemon)
    async with daemon.client(chat.bob) as bob:
        await bob.subscribe(f"user:{chat.bob}")
        await join(chat, chat.bob)
        frame = await bob.next()
        await chat.say("hello Bob")
        await bob.subscribe(chat.topic, since=frame["pos"])
        frames = await bob.until("changes")
    assert {"changes", "resumed"} >= {frame["op"] for frame in frames}  # in the replay, or live after it
    assert "hello Bob" == frames[-1]["changes"][0]["record"]["content"]


async def test_a_restored_channel_does_not_replay_the_time_it_was_deleted(daemon: Daemon, chat: Chat) -> None:
    await chat.settled(daemon)
    async with daemon.client(chat.ada) as ada:
        before = ada.welcome["pos"]
    for deleted_at in ("now()", "null"):
        await chat.sql.execute(
            f"update chatgenius.channels set deleted_at = {deleted_at} where id = $1", chat.channel
        )
    await chat.settled(daemon)
    async with daemon.client(chat.ada, since=before) as ada:
        await ada.subscribe(chat.topic)
        assert "rights" == (await ada.next())["reason"]
        assert ["restore"] == [change["kind"] for change in await ada.changes()]


async def test_truncating_the_members_revokes_their_topics(daemon: Daemon, chat: Chat) -> None:
    await chat.settled(daemon)
    async with daemon.client(chat.ada) as ada:
        await ada.subscribe(chat.topic)
        await chat.sql.execute("truncate chatgenius.channel_members")
        frames = await ada.until("revoked")
        await chat.say("not to Ada")
        assert "no_such_topic" == (await ada.subscribe(chat.topic))["code"]
        assert "subscribed" == (await ada.subscribe("users"))["op"]
    assert chat.topic == frames[-1]["topic"]


async def test_a_right_that_ends_by_an_update_is_revoked_as_well(daemon: Daemon, chat: Chat) -> None:
    """The row keeps its key and grants the right to another user instead."""
    # A table of its own: one that was dropped and is watched again ends everybody's rights.
    seats = f"chatgenius.seats_{chat.ada.lower()}"
    await chat.sql.execute(f"create table {seats} (id text primary key, user_id text not null, room text not null)")
    await chat.sql.execute(f"""
        select rowcast.watch('{seats}', $$'users'$$, '{{id}}', pack => 'chatgenius', model => 'users',
                             revokes => $$jsonb_build_object('user', r.user_id, 'topic', r.room)$$)
    """)
    await chat.sql.execute(f"insert into {seats} values ('1', $1, $2)", chat.ada, chat.topic)
    await chat.settled(daemon)
    async with daemon.client(chat.ada) as ada:
        await ada.subscribe(chat.topic)
        await chat.sql.execute(f"update {seats} set user_id = $1", chat.bob)
        revoked = await ada.next()
    assert ("revoked", chat.topic) == (revoked["op"], revoked["topic"])


async def test_a_right_that_is_granted_again_can_be_used_again(daemon: Daemon, chat: Chat) -> None:
    await join(chat, chat.bob)
    await chat.settled(daemon)
    async with daemon.client(chat.bob) as bob:
        await bob.subscribe(chat.topic)
        await leave(chat, chat.bob)
        assert "revoked" == (await bob.next())["op"]
        await join(chat, chat.bob)
        await chat.settled(daemon)
        assert "subscribed" == (await bob.subscribe(chat.topic))["op"]
        await chat.say("welcome back")
        assert "welcome back" == (await bob.changes())[0]["record"]["content"]


async def test_deleting_a_channel_revokes_it_for_all_members(daemon: Daemon, chat: Chat) -> None:
    await join(chat, chat.bob)
    await chat.settled(daemon)
    async with daemon.client(chat.ada) as ada, daemon.client(chat.bob) as bob:
        for client in (ada, bob):
            await client.subscribe(chat.topic)
        await chat.sql.execute("update chatgenius.channels set deleted_at = now() where id = $1", chat.channel)
        await chat.say("to nobody")
        for client in (ada, bob):
            assert "revoked" == (await client.next())["op"]
            assert "no_such_topic" == (await client.subscribe(chat.topic))["code"]


async def test_a_deleted_user_loses_every_topic(daemon: Daemon, chat: Chat) -> None:
    topics = {chat.topic, "users", f"user:{chat.ada}"}
    async with daemon.client(chat.ada) as ada:
        for topic in topics:
            await ada.subscribe(topic)
        await chat.sql.execute("update chatgenius.users set deleted_at = now() where id = $1", chat.ada)
        await chat.say("in the name of the deleted")
        frames = [await ada.next() for _ in topics]
    assert {"revoked"} == {frame["op"] for frame in frames}
    assert topics == {frame["topic"] for frame in frames}


async def test_under_load_nothing_follows_a_revoked_right_live_or_in_a_replay(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        start = client.welcome["pos"]
    await chat.sql.execute(
        """insert into chatgenius.messages (channel_id, user_id, content)
           select $1, $2, repeat('x', 1000) from generate_series(1, 5000)""",
        chat.channel,
        chat.ada,
    )
    for _ in range(5):
        await join(chat, chat.bob)
        async with daemon.client(chat.bob) as live, daemon.client(chat.bob, since=start) as returning:
            await live.subscribe(chat.topic)
            await returning.subscribe(chat.topic)
            receiving = [asyncio.create_task(_until_revoked(client)) for client in (live, returning)]
            for _ in range(random.randint(0, 10)):
                await chat.say("more")
            await leave(chat, chat.bob)
            for _ in range(5):
                await chat.say("not to Bob")
            for seqs, end in await asyncio.gather(*receiving):
                assert all(seq < end for seq in seqs)
                assert sorted(set(seqs)) == seqs
            await chat.sql.execute("update chatgenius.users set updated_at = now() where id = $1", chat.bob)
            for client in (live, returning):
                assert "pong" == (await _answer(client))["op"]


async def _until_revoked(client: Client) -> tuple[list[int], int]:
    """The numbers of the topic's changes, and the number at which the right ended."""
    seqs: list[int] = []
    while (frame := await client.next())["op"] != "revoked":
        seqs += [change["seq"] for change in frame.get("changes", ())]
    return seqs, seq_of(frame)


async def _answer(client: Client) -> Frame:
    """The next frame after a ping, other than `resumed`: a pong, unless something was sent that must not be."""
    await client.say(op="ping")
    frame = await client.next()
    return await client.next() if frame["op"] == "resumed" else frame
