"""Rights that end: in log order, at once, for whoever follows or is being replayed."""

import asyncio
import random

from tests.acceptance.conftest import Chat
from tests.support.daemon import Client, Daemon, Frame


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


async def test_a_removed_member_is_told_so_and_hears_nothing_more_while_others_do(daemon: Daemon, chat: Chat) -> None:
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
        told = await ada.changes(3)
    assert ["messages", "channel_members", "messages"] == [change["table"] for change in told]
    assert told[1]["seq"] == seq_of(revoked)


async def test_a_right_that_is_given_again_can_be_used_again(daemon: Daemon, chat: Chat) -> None:
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


async def test_a_deleted_channel_is_lost_to_all_its_members(daemon: Daemon, chat: Chat) -> None:
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


async def test_under_load_nothing_comes_behind_the_end_of_a_right_live_or_in_a_replay(
    daemon: Daemon, chat: Chat
) -> None:
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
            hearing = [asyncio.create_task(_until_revoked(client)) for client in (live, returning)]
            for _ in range(random.randint(0, 10)):
                await chat.say("more")
            await leave(chat, chat.bob)
            for _ in range(5):
                await chat.say("not to Bob")
            for seqs, end in await asyncio.gather(*hearing):
                assert all(seq < end for seq in seqs)
                assert sorted(set(seqs)) == seqs
            await chat.sql.execute("update chatgenius.users set updated_at = now() where id = $1", chat.bob)
            for client in (live, returning):
                assert "pong" == (await _answer(client))["op"]


async def _until_revoked(client: Client) -> tuple[list[int], int]:
    """The numbers of the topic's changes, and where the right to it ended."""
    seqs: list[int] = []
    while (frame := await client.next())["op"] != "revoked":
        seqs += [change["seq"] for change in frame.get("changes", ())]
    return seqs, seq_of(frame)


async def _answer(client: Client) -> Frame:
    """What comes next, if not the end of the replay: a pong, unless something came that must not."""
    await client.say(op="ping")
    frame = await client.next()
    return await client.next() if frame["op"] == "resumed" else frame
