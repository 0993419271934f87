"""Snapshots: the rows of a topic, joined to the stream."""

from typing import Any

from tests.acceptance.chat import Chat
from tests.support.daemon import Client, Daemon, Frame


async def snapshot_of(client: Client, topic: str, **members: object) -> tuple[Frame, dict[str, list[Any]]]:
    """Subscribe with a snapshot; the answer, and the rows of each table."""
    answer = await client.subscribe(topic, **{"snapshot": True, **members})
    assert "subscribed" == answer["op"], answer
    rows: dict[str, list[Any]] = {}
    more = True
    while more:
        frame = await client.next()
        assert "snapshot" == frame["op"], frame
        assert topic == frame["topic"]
        rows.setdefault(frame["table"], []).extend(frame["rows"])
        more = frame["more"]
    return answer, rows


async def test_a_snapshot_holds_the_live_rows_of_the_topic_and_then_changes_follow(
    daemon: Daemon, chat: Chat
) -> None:
    first, deleted = await chat.say("first"), await chat.say("deleted")
    await chat.say("elsewhere", chat.other)
    await chat.sql.execute("update chatgenius.messages set deleted_at = now() where id = $1", deleted)
    async with daemon.client(chat.ada) as client:
        answer, rows = await snapshot_of(client, chat.topic)
        assert answer["snapshot"] is True
        assert ["first"] == [row["record"]["content"] for row in rows["messages"]]
        assert [{"id": first}] == [row["key"] for row in rows["messages"]]
        assert [chat.channel] == [row["record"]["id"] for row in rows["channels"]]
        assert [chat.ada] == [row["record"]["user_id"] for row in rows["channel_members"]]
        assert [] == rows["users"]
        assert "resumed" == (await client.next())["op"]
        await chat.say("second")
        [change] = await client.changes()
        assert "second" == change["record"]["content"]
